"""What a trace on the meta device needs so that the code takes the paths it takes on the real device."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

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
    """Let attention and autocast on the meta device do what they do on a CUDA device, or on the CPU.

    Args:
        on_cpu: The trace stands for the CPU.
        autocast: Autocast is used inside the block.
    """
    attention, real_autocast = functional.scaled_dot_product_attention, torch.autocast
    mode = MetaAutocast()

    def autocast_on_meta(device_type: str, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
        return mode.enabled(dtype) if device_type == "meta" else real_autocast(device_type, dtype, *args, **kwargs)

    functional.scaled_dot_product_attention = _cpu_attention if on_cpu else _cuda_attention
    torch.autocast = autocast_on_meta  # type: ignore[misc, assignment]
    try:
        with mode if autocast else nullcontext():
            yield
    finally:
        functional.scaled_dot_product_attention, torch.autocast = attention, real_autocast  # type: ignore[misc]


def _cuda_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Do what SDPA chooses on a CUDA device; on meta it would choose the path that keeps the attention matrix."""
    del enable_gqa
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


def _cpu_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Do what SDPA chooses on the CPU."""
    del enable_gqa
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


class MetaAutocast(TorchFunctionMode):
    """Autocast for the meta device, which torch has none for: the lists of operators of CUDA's autocast.

    It casts inside its ``enabled`` block, where a parameter is cast once, and where the backward pass recomputes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._dtype: torch.dtype | None = None
        self._cast_parameters: dict[int, Tensor] | None = None

    @contextmanager
    def enabled(self, dtype: torch.dtype) -> Iterator[None]:
        """Cast inside the block, and from then on in the backward pass."""
        self._dtype, self._cast_parameters = dtype, {}
        try:
            yield
        finally:
            self._cast_parameters = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_active = self._cast_parameters is not None or (self._dtype is not None and _is_in_backward())
        if not is_active:
            return func(*args, **kwargs)
        if func in _LOW_PRECISION:
            return func(*map(self._lowered, args), **{name: self._lowered(value) for name, value in kwargs.items()})
        if func in _FULL_PRECISION:
            return func(*map(_raised, args), **{name: _raised(value) for name, value in kwargs.items()})
        return func(*args, **kwargs)

    def _lowered(self, value: Any) -> Any:
        assert self._dtype is not None
        if not isinstance(value, Tensor) or not value.is_meta or value.dtype != torch.float32:
            return value
        if self._cast_parameters is None or not (value.is_leaf and value.requires_grad):
            return value.to(self._dtype)
        if id(value) not in self._cast_parameters:
            self._cast_parameters[id(value)] = value.to(self._dtype)
        return self._cast_parameters[id(value)]


def _raised(value: Any) -> Any:
    is_low = isinstance(value, Tensor) and value.is_meta and value.dtype in {torch.float16, torch.bfloat16}
    return value.float() if is_low else value


def _is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
