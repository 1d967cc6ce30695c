"""The costs of each operator in a trace: floating-point operations, bytes read and written, bytes over PCIe."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, no_type_check

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

DECODER = "decoder"
"""The block of what draws images from latents; a sampling step does not repeat it."""
COMPUTE_TYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNELS = "lowmem_db_kernels"
"""The namespace of their operators."""
_FREE = {
    torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default, torch.ops.aten.new_empty_strided.default,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Operators of a trace, one row each.

    Attributes:
        flops: Floating-point operations of matrix products and convolutions.
        moved_bytes: Bytes that are read and written.
        compute_type: Index into ``COMPUTE_TYPES``.
        is_kernel: 1 for an operator of ``lowmem_db_kernels``, whose launch costs the host more than torch's own.
        in_backward: 1 for what runs in the backward pass.
        block: Index into ``block_names``, or -1 for none.
        block_names: Blocks of the model to which the rows belong.
        host_to_device_bytes: Bytes copied from the host over PCIe.
        device_to_host_bytes: Bytes copied to the host over PCIe.
        host_bytes_in_backward: Bytes that the host's own operators read and write beside the backward pass.
        host_bytes: The same, for what runs at another time.
        num_on_host: How many operators the host computes itself.
        attentions: What attention computes the backward pass of.
    """

    flops: np.ndarray
    moved_bytes: np.ndarray
    compute_type: np.ndarray
    is_kernel: np.ndarray
    in_backward: np.ndarray
    block: np.ndarray
    block_names: tuple[str, ...] = ()
    host_to_device_bytes: int = 0
    device_to_host_bytes: int = 0
    host_bytes_in_backward: int = 0
    host_bytes: int = 0
    num_on_host: int = 0
    attentions: frozenset["Attention"] = frozenset()


class Attention(NamedTuple):
    """The queries of one attention.

    Attributes:
        num_heads: Heads of all samples.
        num_queries: Tokens of each head.
        width: Channels of each head.
        dtype: Their type.
    """

    num_heads: int
    num_queries: int
    width: int
    dtype: torch.dtype


class Row(NamedTuple):
    """One operator: see :class:`Costs`."""

    flops: int
    moved_bytes: int
    compute_type: int
    is_kernel: bool


class CostRecorder:
    """Collects the rows of :class:`Costs`."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, ...]] = []
        self._block_names: list[str] = []
        self._block = -1
        self._crossed = [0, 0]
        self._on_host, self._num_on_host = [0, 0], 0
        self._attentions: set[Attention] = set()

    def clear(self) -> None:
        """Forget all rows."""
        self._rows.clear()
        self._attentions.clear()
        self._crossed = [0, 0]
        self._on_host, self._num_on_host = [0, 0], 0

    def start_block(self, name: str) -> None:
        """Assign the following operators to a block, until :meth:`end_block`."""
        if name not in self._block_names:
            self._block_names.append(name)
        self._block = self._block_names.index(name)

    def end_block(self) -> None:
        """Assign the following operators to no block."""
        self._block = -1

    @no_type_check
    def add(self, row: Row) -> None:
        """Add one operator."""
        self._rows.append((*row, torch._C._current_graph_task_id() != -1, self._block))

    @no_type_check
    def add_several(self, count: int, moved_bytes: int) -> None:
        """Add operators without matrix products in them, which move so many bytes together."""
        row = (0, moved_bytes // count, 0, False, torch._C._current_graph_task_id() != -1, self._block)
        self._rows.extend([row] * count)

    @no_type_check
    def add_attention(self, query: Tensor) -> None:
        """Add a backward pass of attention, by its queries, shape ``(batch, heads, tokens, channels)``."""
        batch, heads, tokens, channels = query.shape
        self._attentions.add(Attention(batch * heads, tokens, channels, query.dtype))

    @no_type_check
    def add_crossing(self, num_bytes: int, *, to_host: bool) -> None:
        """Add a copy to the host, or from it."""
        self._crossed[to_host] += num_bytes

    @no_type_check
    def add_on_host(self, row: Row) -> None:
        """Add an operator that the host computes beside the card."""
        self._on_host[torch._C._current_graph_task_id() != -1] += row.moved_bytes
        self._num_on_host += 1

    def costs(self) -> Costs:
        """Return all rows so far."""
        table = np.array(self._rows, dtype=np.int64).reshape(-1, len(Row._fields) + 2)
        return Costs(
            flops=table[:, 0],
            moved_bytes=table[:, 1],
            compute_type=table[:, 2],
            is_kernel=table[:, 3],
            in_backward=table[:, 4],
            block=table[:, 5],
            block_names=tuple(self._block_names),
            host_to_device_bytes=self._crossed[0],
            device_to_host_bytes=self._crossed[1],
            host_bytes=self._on_host[0],
            host_bytes_in_backward=self._on_host[1],
            num_on_host=self._num_on_host,
            attentions=frozenset(self._attentions),
        )


def row_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], made: Any) -> Row | None:
    """Return the costs of an operator that is not a view, or None if it costs nothing."""
    if func in _FREE:
        return None
    tensors = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
    count = flop_registry.get(func._overloadpacket)
    flops = 0 if count is None else int(count(*args, **kwargs, out_val=made))
    moved = sum(tensor.nbytes for tensor in tensors) + sum(tensor.nbytes for tensor in _tensors((made,)))
    dtype = tensors[0].dtype if tensors else torch.float32
    compute_type = COMPUTE_TYPES.index(dtype) if dtype in COMPUTE_TYPES else 0
    return Row(flops, moved, compute_type, func.namespace == KERNELS)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
