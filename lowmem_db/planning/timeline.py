"""What each block of a model adds to the peak of a step, from which any mix of placements can be composed.

A block's forward pass leaves bytes for its backward pass. While a block runs backward, the bytes left by earlier blocks
are still there, and those of later blocks are gone. A block's own figures therefore do not depend on how the others are
checkpointed, except for tensors that blocks share.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowmem_db.models.families.blocks import Block
from lowmem_db.planning.costs import CostRecorder
from lowmem_db.planning.tracker import AllocationTracker

END = "end"


@dataclass(frozen=True)
class BlockFigures:
    """Bytes of one block with one placement.

    Attributes:
        left: Bytes that its forward pass leaves for its backward pass.
        peak: Peak bytes while it runs, forward or backward, in addition to those left by earlier blocks.
    """

    left: int
    peak: int


class Timeline:
    """Records a step block by block.

    Args:
        tracker: Counts the bytes.
        costs: Is notified of the blocks too.
    """

    def __init__(self, tracker: AllocationTracker, costs: CostRecorder) -> None:
        self._tracker = tracker
        self._costs = costs
        self._start_bytes = 0
        self._left: dict[str, int] = {}  # bytes after each block's forward pass, relative to the start
        self._peaks: dict[str, int] = {}  # peak while the block ran, relative to the start
        self._running_backward = END

    @contextmanager
    def recorded(self, blocks: Mapping[str, Block]) -> Iterator[None]:
        """Record what runs inside the ``with`` block."""
        handles = []
        for name, block in blocks.items():
            part = block.module
            handles.append(part.register_forward_pre_hook(lambda *_, name=name: self._costs.start_block(name)))
            handles.append(part.register_forward_hook(lambda _, __, made, name=name: self._after_forward(name, made)))
        self._tracker.end_interval()
        self._start_bytes = self._tracker.live_bytes
        try:
            yield
            self._end_interval(self._running_backward)
        finally:
            for handle in handles:
                handle.remove()

    def figures(self) -> dict[str, BlockFigures]:
        """Return the figures of the blocks in the order of the forward pass, then those of the code after them."""
        found: dict[str, BlockFigures] = {}
        before = 0
        for name, live in self._left.items():
            found[name] = BlockFigures(left=live - before, peak=self._peaks[name] - before)
            before = live
        found[END] = BlockFigures(left=0, peak=self._peaks[END] - before)
        return found

    def _after_forward(self, name: str, made: Any) -> None:
        self._costs.end_block()
        self._end_interval(name)
        self._left[name] = self._tracker.live_bytes - self._start_bytes
        self._running_backward = END
        output = made if isinstance(made, Tensor) else made[0]
        if output.requires_grad:  # otherwise nothing up to here trains, and there is no backward pass
            output.register_hook(lambda _: self._before_backward(name))

    def _before_backward(self, name: str) -> None:
        self._end_interval(self._running_backward)
        self._running_backward = name

    def _end_interval(self, name: str) -> None:
        self._peaks[name] = max(self._peaks.get(name, 0), self._tracker.end_interval() - self._start_bytes)


def mixed_peak(figures: Mapping[str, BlockFigures]) -> int:
    """Return the peak of a step, relative to its start, from the figures of its blocks in order."""
    peak = left = 0
    for block in figures.values():
        peak = max(peak, left + block.peak)
        left += block.left
    return peak
