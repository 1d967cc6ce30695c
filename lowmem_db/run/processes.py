"""How many processes share a run, as its configuration says it."""

from collections.abc import Mapping
from typing import Any

import torch

from lowmem_db.config.schema import Config
from lowmem_db.console import say
from lowmem_db.distributed.world import World
from lowmem_db.errors import ConfigError

_FIELD = "distributed.num_processes"


def with_processes(config: Config, num_processes: int) -> Config:
    """Return a configuration for as many processes as were started; say so if it was written for others."""
    before = config.distributed.num_processes
    if before not in {1, num_processes}:
        say(f"{_FIELD}: the configuration says {before}, but the number of processes is {num_processes}")
    distributed = config.distributed.model_copy(update={"num_processes": num_processes})
    return config.model_copy(update={"distributed": distributed})


def check_cards(world: World, device: torch.device) -> None:
    """Refuse two processes on one card.

    Raises:
        ConfigError: NCCL would refuse it too, in words that do not say what to do.
    """
    if device.type != "cuda" or world.size == 1:
        return
    cards = world.gathered(str(torch.cuda.get_device_properties(device).uuid))
    same = [rank for rank, card in enumerate(cards) if cards.index(card) < rank]
    if same:
        raise ConfigError(
            f"rank {cards.index(cards[same[0]])} and rank {same[0]} are on the same card; start as many processes on "
            "each machine as it has cards (torchrun --nproc_per_node, accelerate launch --num_processes)"
        )


def say_photos_per_step(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Say if a run that is continued with another number of processes has steps of another size.

    Args:
        before: Values by the paths of fields, as the run had them.
        now: As it has them now.
    """
    old, new = before.get(_FIELD, 1), now[_FIELD]
    photos_before, photos = _photos_per_step(before), _photos_per_step(now)
    if old == new or photos_before == photos:
        return
    rounds, rest = divmod(photos_before, now["training.train_batch_size"] * new)
    way = "" if rest else f"; to go on as before, set training.gradient_accumulation_steps={rounds}"
    say(f"resume: a step has {photos} photos instead of {photos_before}{way}")


def _photos_per_step(fields: Mapping[str, Any]) -> int:
    batches = fields["training.gradient_accumulation_steps"] * fields.get(_FIELD, 1)
    return fields["training.train_batch_size"] * batches
