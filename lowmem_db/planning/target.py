"""What a run is planned for: a card, and how much of its memory may be used."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowmem_db import environment, memory_limits
from lowmem_db.config.schema import Config
from lowmem_db.environment import GIB
from lowmem_db.errors import ConfigError
from lowmem_db.planning.allowance import context_in_use, held_by_others
from lowmem_db.planning.cards import ASSUMED, CPU, Card, card_here, find_card, is_known

_UNKNOWN = 1 << 62  # if the system does not tell what is free


@dataclass(frozen=True, kw_only=True)
class Target:
    """A device and a budget.

    Attributes:
        card: The device.
        budget_bytes: Bytes of its memory that the run may use.
        notes: Assumptions that were made.
        host_bytes: Free memory of the host beside a card; None: it is not known, or the card is the host itself.
    """

    card: Card
    budget_bytes: int
    notes: tuple[str, ...] = ()
    host_bytes: int | None = None


def find_target(
    config: Config, *, gpu: str | None = None, budget_bytes: int | None = None, here: bool = False
) -> Target:
    """Find the device and the budget of a plan.

    A named card comes first, then the device in the configuration. If that is ``auto``, this machine has no CUDA device
    and a budget is given, a card with this budget is assumed.

    Args:
        config: The configuration; ``memory.budget`` is the default budget.
        gpu: Name of a card.
        budget_bytes: Bytes that the run may use.
        here: Whether the plan must be for a device of this machine.

    Raises:
        ConfigError: The card is unknown, or the device does not exist.
    """
    if budget_bytes is not None:
        memory = config.memory.model_copy(update={"budget": budget_bytes})
        config = config.model_copy(update={"memory": memory})
    budget = None if config.memory.budget == "auto" else config.memory.budget
    if gpu is not None and here:
        raise ConfigError(f"--gpu: {gpu!r} cannot be verified here; leave --gpu out with --verify")
    if gpu is not None:
        card = find_card(gpu)
        return Target(card=card, budget_bytes=budget or card.usable_bytes)
    if config.device == "auto" and budget is not None and not here and not torch.cuda.is_available():
        note = (
            f"no CUDA device here: planned for a card that supports bf16 and is as fast as an {ASSUMED.name}; name "
            "yours with --gpu, or plan for this CPU with device=cpu"
        )
        return Target(card=ASSUMED, budget_bytes=budget, notes=(note,))
    return target_of_device(config, environment.resolve_device(config.device))


def target_of_device(config: Config, device: torch.device) -> Target:
    """Return the target for a device of this machine, with ``memory.budget`` or the memory that is free now."""
    given = None if config.memory.budget == "auto" else config.memory.budget
    if device.type != "cuda":
        return _target_of_host(given, environment.free_host_bytes())
    properties = torch.cuda.get_device_properties(device)
    free = environment.free_bytes(device) or _UNKNOWN  # beside the context, which a budget includes
    available = min(properties.total_memory, free + context_in_use())
    notes = []
    if not is_known(properties.name):
        notes.append(f"the planner does not know {properties.name}: its times are those of an {ASSUMED.name}")
    if (held := held_by_others(device)) > 0:
        notes.append(f"other programs hold {held / GIB:.1f} GiB of {properties.name}; nvidia-smi lists them")
    if given is not None and given > available:
        notes.append(f"memory.budget: only {available / GIB:.1f} GiB of {given / GIB:.1f} GiB are free here")
    host_bytes = environment.free_host_bytes()
    return Target(card=card_here(device), budget_bytes=given or available, notes=tuple(notes), host_bytes=host_bytes)


def smallest(targets: Sequence[Target]) -> Target:
    """Return the target with the smallest budget: a plan for it fits all."""
    return min(targets, key=lambda target: target.budget_bytes)


def _target_of_host(given: int | None, free: int | None) -> Target:
    """Return the target for the CPU: what is free, or less if the configuration gives less."""
    limit = memory_limits.tightest()
    notes = []
    if limit is not None and free is not None and limit.free_bytes <= free:
        notes.append(f"{limit.name} leaves this process {free / GIB:.1f} GiB of memory")
    if given is not None and free is not None and given > free:
        notes.append(f"memory.budget: only {free / GIB:.1f} GiB of {given / GIB:.1f} GiB are free here")
    budget = min((size for size in (given, free) if size is not None), default=_UNKNOWN)
    return Target(card=CPU, budget_bytes=budget, notes=tuple(notes))
