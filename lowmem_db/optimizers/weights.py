"""Formats of trained weights: fp32, bf16 with eight extra bits (24-bit weights), bf16 with stochastic rounding.

The extra bits, an int8 tensor of the parameter's shape, are part of the optimizer's state. The parameter itself is the
nearest bf16: the model computes with it, and a checkpoint of the model needs nothing else. Formats and rounding are
those of ``lowmem_db_kernels``.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from lowmem_db_kernels.rounding import (
    pack_extra_bits_eager,
    round_stochastically_eager,
    rounding_key_eager,
    unpack_extra_bits_eager,
)
from torch import Tensor, nn

from lowmem_db.config.schema import Weights

EXTRA_BITS = "extra_bits"
_CHUNK = 1 << 22  # elements rounded at once, because rounding needs tens of bytes for each


def apply(modules: Mapping[str, nn.Module], kind: Weights) -> dict[str, Tensor]:
    """Convert fp32 weights to a format, in place; weights in bf16 are in it already.

    Returns:
        The extra bits of each converted parameter by ``component.name``; empty for other formats.
    """
    extra_bits: dict[str, Tensor] = {}
    convert = converter(kind, extra_bits)
    for name, parameter in named_parameters(modules).items():
        if convert is not None and parameter.dtype == torch.float32:
            parameter.data = convert(name, parameter.data)
    return extra_bits


def converter(kind: Weights, extra_bits: dict[str, Tensor]) -> Callable[[str, Tensor], Tensor] | None:
    """Return what converts one fp32 weight to a format; None for fp32.

    Args:
        kind: The format.
        extra_bits: Takes the extra bits of each converted weight, by the name that the function is called with.
    """

    def split(name: str, weight: Tensor) -> Tensor:
        high, extra_bits[name] = _split(weight)
        return high

    return {"fp32": None, "bf16_stochastic": lambda _, weight: weight.to(torch.bfloat16), "bf16_extra_bits": split}[
        kind
    ]


def undo(modules: Mapping[str, nn.Module], extra_bits: Mapping[str, Tensor]) -> None:
    """Convert weights back to fp32, in place, with their extra bits if they have any."""
    for name, parameter in named_parameters(modules).items():
        parameter.data = in_fp32(parameter.data, extra_bits.get(name))


def named_parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return the parameters of all components by ``component.name``."""
    return {
        f"{component}.{name}": parameter
        for component, module in modules.items()
        for name, parameter in module.named_parameters()
    }


def in_fp32(parameter: Tensor, extra_bits: Tensor | None) -> Tensor:
    """Return a weight in fp32: the parameter itself, or a new tensor."""
    if extra_bits is None:
        return parameter.float()
    return unpack_extra_bits_eager(parameter, extra_bits.to(parameter.device))


@contextmanager
def stepped_in_fp32(
    parameter: Tensor, extra_bits: Tensor | None, *, rounding_seed: int | None, step: Tensor
) -> Iterator[Tensor]:
    """Return a context with a weight in fp32, to be stepped in place; afterwards it is rounded to its format.

    Args:
        parameter: fp32 or bf16.
        extra_bits: Extra bits of a bf16 weight, written as well.
        rounding_seed: Seed of the stochastic rounding of a bf16 weight without extra bits.
        step: Number of the step; the rounding depends on it.
    """
    if parameter.dtype == torch.float32:
        yield parameter
        return
    weight = in_fp32(parameter, extra_bits)
    yield weight
    if extra_bits is not None:
        _split_into(weight, parameter, extra_bits)
    else:
        assert rounding_seed is not None, "a bf16 weight without extra bits needs a seed for its rounding"
        key = rounding_key_eager(rounding_seed, step)
        for index, (part, rounded) in enumerate(_in_parts(weight, parameter)):
            rounded.copy_(round_stochastically_eager(part, key, start=index * _CHUNK))


def _split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Split an fp32 weight into bf16 and extra bits."""
    high = torch.empty_like(weight, dtype=torch.bfloat16)
    low = torch.empty_like(weight, dtype=torch.int8)
    if not weight.is_meta:  # a trace needs only their sizes, and thousands of operators would take half its time
        _split_into(weight, high, low)
    return high, low


def _split_into(weight: Tensor, high: Tensor, low: Tensor) -> None:
    for part, high_part, low_part in _in_parts(weight, high, low):
        packed = pack_extra_bits_eager(part)
        high_part.copy_(packed[0])
        low_part.copy_(packed[1])


def _in_parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield slices of dense tensors with the same shape and strides, in memory order."""
    flat = [tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors]
    yield from zip(*(tensor.split(_CHUNK) for tensor in flat), strict=True)
