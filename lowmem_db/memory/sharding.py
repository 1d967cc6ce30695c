"""Weights, gradients and optimizer states shared out between processes, with torch's FSDP2 (arXiv:2304.11277).

Each process holds some rows of every large weight. The weights of a layer are put together while it computes, in the
forward pass and once more in the backward pass, where its gradients are added up and shared out again.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lowmem_db.distributed.reduction import Reduction
from lowmem_db.distributed.scattering import Collected
from lowmem_db.distributed.shards import rows_of
from lowmem_db.errors import DependencyError
from lowmem_db.memory import end_of_backward
from lowmem_db.models.denoiser import Denoiser

_NEEDED = "set_custom_reduce_scatter"


def check() -> None:
    """Refuse a torch whose FSDP2 lacks what is used here.

    Raises:
        DependencyError: It is too old.
    """
    from torch.distributed import fsdp

    if not hasattr(getattr(fsdp, "FSDPModule", None), _NEEDED):
        raise DependencyError(
            f"distributed.sharding: 'full' needs FSDPModule.{_NEEDED}, which torch {torch.__version__} does not have; "
            "install a newer torch, or set distributed.sharding=none"
        )


def apply(
    denoiser: Denoiser, device: torch.device, reduction: Reduction, stays_whole: Callable[[nn.Parameter], bool]
) -> None:
    """Share out the weights of a model, and move what this process keeps to its device.

    Args:
        denoiser: The model, on the host; its modules are changed in place.
        device: Device of this process.
        reduction: Adds up the gradients.
        stays_whole: Whether every process holds the whole of a weight.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = reduction.world.mesh(device)
    parameters = [parameter for module in denoiser.modules().values() for parameter in module.parameters()]
    kept = {parameter for parameter in parameters if stays_whole(parameter)}
    for unit in units(denoiser):
        shared: Any = fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
        shared.set_gradient_divide_factor(1.0)  # the loss is a share of the mean already
        shared.set_force_sum_reduction_for_comms(True)
        shared.set_custom_all_gather(Collected(reduction.world))
        shared.set_custom_reduce_scatter(reduction.scattering())
        end_of_backward.apply(unit, device)
    for parameter in kept:
        parameter.data = parameter.data.to(device)


def units(denoiser: Denoiser) -> Iterator[nn.Module]:
    """Yield the parts of a model whose weights are put together at once, inner ones first.

    These are the layers that activation checkpointing knows; what is left of a block; and what is left of a component.
    """
    seen: set[nn.Module] = set()
    for block in denoiser.blocks().values():
        layers: list[nn.Module] = []

        def found(function: Callable[..., Any], part: nn.Module, *, is_outer: bool = True) -> Callable[..., Any]:
            del is_outer
            layers.append(part)  # noqa: B023
            return function

        block.replacements("layers", found)
        for module in (*layers, block.module):
            if module not in seen:
                seen.add(module)
                yield module
    for component in denoiser.modules().values():
        if component not in seen:
            yield component


def shrink(denoiser: Denoiser, num_processes: int, stays_whole: Callable[[nn.Parameter], bool]) -> None:
    """Give a model on the meta device the shapes of what the first of several processes holds."""
    for module in denoiser.modules().values():
        for parameter in module.parameters():
            if not stays_whole(parameter):
                rows = rows_of(len(parameter), num_processes)[0]
                parameter.data = parameter.data[rows].clone()


def passing_bytes(denoiser: Denoiser, stays_whole: Callable[[nn.Parameter], bool]) -> tuple[int, int]:
    """Return the bytes of weights and of gradients that are put together at a time, beside what a process holds.

    Those are the weights of a layer and of the next one, which is fetched meanwhile; its gradients as they were
    computed, packed, and received; and both of what is left of its block and of its component.

    Args:
        denoiser: The model, as a whole.
        stays_whole: As for :func:`apply`.
    """
    taken: set[nn.Parameter] = set()
    layers: list[tuple[int, int]] = [(0, 0)]
    rests: list[tuple[int, int]] = [(0, 0), (0, 0)]
    parts = list(units(denoiser))
    for unit in parts:
        own = [each for each in unit.parameters() if each not in taken and not stays_whole(each)]
        taken.update(own)
        weights = sum(each.nbytes for each in own)
        gradients = sum(each.nbytes for each in own if each.requires_grad)
        inside = set(unit.modules()) - {unit}
        if any(other in inside for other in parts):
            rests.append((weights, gradients))
        else:
            layers.append((2 * weights, 3 * gradients))
    largest = [max(layers, key=sum), *sorted(rests, key=sum)[-2:]]
    return sum(weights for weights, _ in largest), sum(gradients for _, gradients in largest)
