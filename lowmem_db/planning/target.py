"""What a run is planned for: a card, and how much of its memory may be used."""

from dataclasses import dataclass

import torch

from lowmem_db import environment
from lowmem_db.config.schema import Config
from lowmem_db.errors import ConfigError
from lowmem_db.planning.cards import ASSUMED, CPU, Card, card_of, find_card

_UNKNOWN = 1 << 62  # if the system does not tell what is free


@dataclass(frozen=True, kw_only=True)
class Target:
    """A device and a budget.

    Attributes:
        card: The device.
        budget_bytes: Bytes of its memory that the run may use.
        notes: Assumptions that were made.
    """

    card: Card
    budget_bytes: int
    notes: tuple[str, ...] = ()


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
    budget = given or environment.free_bytes(device) or _UNKNOWN
    if device.type != "cuda":
        return Target(card=CPU, budget_bytes=budget)
    properties = torch.cuda.get_device_properties(device)
    card = card_of(
        properties.name, total_bytes=properties.total_memory, capability=(properties.major, properties.minor)
    )
    return Target(card=card, budget_bytes=budget)
