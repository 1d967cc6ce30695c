"""Tells FSDP2 when the backward pass of a module has ended, without changing a bit of its gradients.

FSDP2 puts a function of its own in front of every input of a module, whose backward pass comes last. Where an input is
also used elsewhere, as in skip connections, its gradients are then added up in another order: first those of the
module. Here, FSDP2 gets to see one input that nothing depends on; the others are out of its sight, in a box.

Autograd computes what was recorded last first. The function in front of that input is recorded before anything in the
module, so its backward pass comes after all of the module's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _Box:
    """The arguments of a module; FSDP2 looks into tuples, mappings and dataclasses, but not here."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs


class _Joined(torch.autograd.Function):
    """Return a tensor as it is; a signal takes part in its backward pass."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, signal: Tensor) -> Tensor:
        ctx.signal = signal.shape, signal.device
        return tensor.data  # no view, whose hooks would be lost if it was changed in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        shape, device = ctx.signal
        return gradients[0], torch.zeros(shape, device=device)


def apply(module: nn.Module, device: torch.device) -> None:
    """Hide the inputs of a module from the hooks that it has, and give them a signal instead.

    Args:
        module: The module, after ``fully_shard``.
        device: Its device.
    """
    forward = module.forward

    def hide(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        signal = torch.zeros(1, device=device, requires_grad=True) if torch.is_grad_enabled() else None
        return (_Box(args, kwargs), signal), {}

    def open_box(box: _Box, signal: Tensor | None) -> Any:
        output = forward(*box.args, **box.kwargs)
        return output if signal is None else _with_signal(output, signal)

    module.register_forward_pre_hook(hide, prepend=True, with_kwargs=True)
    module.forward = open_box


def _with_signal(output: Any, signal: Tensor) -> Any:
    """Return an output with the signal in the first tensor that has a gradient, wherever that tensor is in it."""
    first = next((each for each in _tensors(output) if each.requires_grad), None)
    if first is None:
        return output
    joined = _Joined.apply(first, signal)
    return _mapped(output, lambda tensor: joined if tensor is first else tensor)


def _tensors(output: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _mapped(output, lambda tensor: found.append(tensor) or tensor)
    return found


def _mapped(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return an output with its tensors changed; those of diffusers and transformers are mappings, changed in place."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, dict):
        for name, value in list(output.items()):
            output[name] = _mapped(value, change)
        return output
    if isinstance(output, tuple | list):
        return type(output)(_mapped(value, change) for value in output)
    return output
