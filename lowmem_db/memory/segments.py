"""A segment of a model: its inputs are kept for backward, its inner activations are recomputed there."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowmem_db.memory.weight_stream import Residence


class Segment:
    """Calls a function so that backward recomputes what it needs.

    The segment keeps tensors that are passed by position. Those passed by keyword, such as text embeddings, are shared
    by many segments and stay where they are.

    Args:
        function: What the segment computes; it must be deterministic.
        part: The part of the model it runs; if this has dropout, the random numbers are repeated.
        keeping: The context in which the segment's inputs are kept.
        residence: Brings the segment's weights to the device while they are needed. Default: they are there.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        part: nn.Module,
        keeping: Callable[[], AbstractContextManager[object]] = nullcontext,
        residence: Residence | None = None,
    ) -> None:
        self._function = function
        self._preserve_rng_state = _has_dropout(part)
        self._keeping = keeping
        self._residence = residence

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the function."""
        if not torch.is_grad_enabled():
            with nullcontext() if self._residence is None else self._residence.on_device():
                return self._function(*args, **kwargs)

        def checkpointed(function: Callable[..., Any]) -> Any:
            # Recomputing stops once all tensors that backward needs exist, so the last layers are not computed again.
            with _without_autocast_cache(), self._keeping():
                return checkpoint(
                    partial(function, **kwargs),
                    *args,
                    use_reentrant=False,
                    preserve_rng_state=self._preserve_rng_state,
                )

        return (
            checkpointed(self._function)
            if self._residence is None
            else self._residence.run(self._function, checkpointed)
        )


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Free weights that autocast converted at the end of their segment; the recomputation does the same."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def _has_dropout(part: nn.Module) -> bool:
    """Return whether there are dropout layers, or attention with a dropout probability."""
    return any(_dropout_of(module) > 0 for module in part.modules())


def _dropout_of(module: nn.Module) -> float:
    if isinstance(module, nn.Dropout):
        return module.p
    dropout = module.__dict__.get("dropout", 0.0)
    return dropout if isinstance(dropout, float) else 0.0
