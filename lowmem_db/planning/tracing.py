"""Makes code on the meta device take the same paths as on the real device."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lowmem_db.memory import segments

_LOW_PRECISION = {
    functional.linear, functional.conv1d, functional.conv2d, functional.conv3d, torch.matmul, torch.bmm, torch.mm,
    torch.baddbmm, torch.addmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm,
    functional.scaled_dot_product_attention,
}  # fmt: skip
_FULL_PRECISION = {
    functional.layer_norm, functional.group_norm, functional.softmax, functional.mse_loss, functional.interpolate,
    torch.softmax, Tensor.softmax, torch.pow, Tensor.pow, Tensor.__pow__, torch.exp, Tensor.exp, torch.rsqrt,
    Tensor.rsqrt,
}  # fmt: skip


@contextmanager
def real_paths(*, on_cpu: bool, autocast: bool) -> Iterator[None]:
    """Let attention and autocast on the meta device behave as on a CUDA device or on the CPU.

    Args:
        on_cpu: Whether the trace is for the CPU.
        autocast: Whether autocast is used inside the block.
    """
    attention, real_autocast = functional.scaled_dot_product_attention, torch.autocast
    mode, checkpoint = MetaAutocast(raises=not on_cpu), segments.checkpoint

    def autocast_on_meta(device_type: str, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        if device_type != "meta":
            return real_autocast(device_type, dtype, **kwargs)
        return nullcontext() if dtype is None else mode.enabled(dtype)

    functional.scaled_dot_product_attention = _cpu_attention if on_cpu else _cuda_attention
    torch.autocast = autocast_on_meta  # type: ignore[misc, assignment]
    if autocast:  # modes of the forward pass are off in the backward pass, where segments are recomputed
        segments.checkpoint = partial(checkpoint, context_fn=lambda: (nullcontext(), mode))
    try:
        with mode if autocast else nullcontext():
            yield
    finally:
        segments.checkpoint = checkpoint
        functional.scaled_dot_product_attention, torch.autocast = attention, real_autocast  # type: ignore[misc]


def _cuda_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Run what SDPA chooses on a CUDA device; on meta it would choose the path that keeps the attention matrix."""
    del enable_gqa
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


def _cpu_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Run what SDPA chooses on the CPU."""
    del enable_gqa
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


class MetaAutocast(TorchFunctionMode):
    """Autocast for the meta device, which torch lacks: with CUDA's lists of operators, without a cache.

    It casts inside its ``enabled`` block, and afterwards in recomputations of the backward pass.

    Args:
        raises: Whether norms and the like compute in fp32, as on CUDA devices; the CPU's autocast leaves them alone.
    """

    def __init__(self, *, raises: bool) -> None:
        super().__init__()
        self._raised = _FULL_PRECISION if raises else set()
        self._dtype: torch.dtype | None = None
        self._is_enabled = False

    @contextmanager
    def enabled(self, dtype: torch.dtype) -> Iterator[None]:
        """Cast inside the block."""
        self._dtype, self._is_enabled = dtype, True
        try:
            yield
        finally:
            self._is_enabled = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        dtype = self._dtype if self._is_enabled or _is_in_backward() else None
        if dtype is not None and func in _LOW_PRECISION:
            args, kwargs = _cast(args, kwargs, torch.float32, dtype)
        elif dtype is not None and func in self._raised:
            args, kwargs = _cast(args, kwargs, dtype, torch.float32)
        return func(*args, **kwargs)


def _cast(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], source: torch.dtype, target: torch.dtype
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def cast(value: Any) -> Any:
        is_source = isinstance(value, Tensor) and value.is_meta and value.dtype == source
        return value.to(target) if is_source else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


def _is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
