"""Frozen linear layers in 8 or 4 bits through bitsandbytes: LLM.int8 (arXiv:2208.07339) and NF4 (arXiv:2305.14314).

On the meta device, where bitsandbytes does not work, layers of the same size stand in: that is all a plan needs.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowmem_db import environment
from lowmem_db.errors import ConfigError

Kind = Literal["int8", "nf4"]
_NF4_BLOCK = 64  # weights that share an fp32 scale


def check_device(kind: str | None, device: torch.device) -> None:
    """Refuse quantized weights on a device that cannot use them.

    Raises:
        ConfigError: The device is not a CUDA device.
        DependencyError: bitsandbytes is missing.
    """
    if kind not in {"int8", "nf4"}:
        return
    environment.require("bitsandbytes")
    if device.type != "cuda":
        raise ConfigError(
            f"lora.base_weights: {kind!r} needs a CUDA device, but this run is on {device.type!r}; allowed here: fp32, "
            "fp16, bf16"
        )


def quantize(modules: Iterable[nn.Module], kind: Kind, compute_dtype: torch.dtype) -> None:
    """Replace linear layers with quantized ones; their weights are packed when they are moved to the device.

    Args:
        modules: Changed in place.
        kind: Quantization format.
        compute_dtype: Type that nf4 weights are multiplied in.

    Raises:
        DependencyError: bitsandbytes is missing.
    """
    for module in modules:
        linear = [(path, layer) for path, layer in module.named_modules() if type(layer) is nn.Linear]
        for path, layer in linear:
            parent, _, name = path.rpartition(".")
            make = _StandIn if layer.weight.is_meta else _with_bitsandbytes
            setattr(module.get_submodule(parent), name, make(layer, kind, compute_dtype))


def quantize_where_asked(modules: Iterable[nn.Module], kind: str | None, compute_dtype: torch.dtype) -> None:
    """Quantize if the type of the frozen weights is one of :data:`Kind`; see :func:`quantize`."""
    if kind == "int8" or kind == "nf4":
        quantize(modules, kind, compute_dtype)


def _with_bitsandbytes(layer: nn.Linear, kind: Kind, compute_dtype: torch.dtype) -> nn.Module:
    bitsandbytes: Any = environment.require("bitsandbytes")
    sizes = layer.in_features, layer.out_features, layer.bias is not None
    if kind == "nf4":
        made = bitsandbytes.nn.Linear4bit(
            *sizes, compute_dtype=compute_dtype, compress_statistics=False, quant_type="nf4", device="meta"
        )
        made.weight = bitsandbytes.nn.Params4bit(
            layer.weight.data, requires_grad=False, compress_statistics=False, quant_type="nf4", module=made
        )
    else:
        made = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
        made.weight = bitsandbytes.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    return made


class _StandIn(nn.Linear):
    """Stands in for a quantized layer on the meta device, with the same size."""

    def __init__(self, layer: nn.Linear, kind: Kind, compute_dtype: torch.dtype) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self.kind = kind
        self.compute_dtype = compute_dtype
        count = layer.weight.numel()
        packed, scales = (-(-count // 2), -(-count // _NF4_BLOCK)) if kind == "nf4" else (count, layer.out_features)
        self.weight = nn.Parameter(torch.empty(packed, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.scales = nn.Parameter(torch.empty(scales, device="meta"), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply with weights that are unpacked temporarily, in both passes."""
        computed = input.to(self.compute_dtype) if self.kind == "nf4" else input
        return _Unpacked.apply(computed, self.bias, self.out_features, self.kind == "int8").to(input.dtype)


class _Unpacked(torch.autograd.Function):
    """A product with weights that exist only during the computation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, out_features: int, keeps_input: bool) -> Tensor:
        ctx.kept = x if keeps_input else None  # bitsandbytes keeps the input of an int8 layer
        ctx.shape = out_features, x.shape[-1]
        return functional.linear(x, x.new_empty(ctx.shape), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        return gradient @ gradient.new_empty(ctx.shape), None, None, None
