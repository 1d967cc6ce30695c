"""The strategies that a configuration leaves open, each as a resolved configuration."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from lowmem_db import environment
from lowmem_db.config.choices import Situation
from lowmem_db.config.rules import refusals
from lowmem_db.config.schema import Config, Placement
from lowmem_db.config.strategy import changed, describe, fields, open_paths
from lowmem_db.errors import ConfigError
from lowmem_db.memory import fused_layers
from lowmem_db.planning.cards import Card
from lowmem_db.records import Refusal


def candidates(config: Config, card: Card, block_names: Sequence[str]) -> tuple[list[Config], list[Refusal]]:
    """Return every strategy that the configuration and the card leave open, and those that a rule refuses.

    Fields that the configuration gives are constraints; fields that it leaves out are enumerated.

    Args:
        config: The configuration.
        card: The card that the run uses.
        block_names: Blocks that can have their own placement.

    Returns:
        Resolved configurations, starting with the one that does the least; and the refusals of others.
    """
    where = Situation(card=card, block_names=block_names, open_paths=open_paths(config))
    missing = {path: reason for path, reason in _missing(where) if path in where.open_paths}
    kept: list[Config] = []
    refused: dict[str, Refusal] = {}
    for candidate in _enumerate(config, where):
        problems = [*_unsupported(card, candidate, missing), *refusals(candidate)]
        if not problems:
            kept.append(candidate)
        elif problems[0] not in refused:
            refused[problems[0]] = Refusal(strategy=describe(candidate), reason=problems[0])
    return kept, list(refused.values())


def _enumerate(config: Config, where: Situation) -> list[Config]:
    """Return the configuration with every combination of choices for the fields that it leaves open."""
    found = [config]
    for field in fields():
        if field.path in where.open_paths:
            found = [changed(mixed, {field.path: value}) for mixed in found for value in field.choices(mixed, where)]
    return found


def _missing(where: Situation) -> Iterator[tuple[str, str]]:
    """Yield the fields that the planner does not choose on this machine, and why."""
    if not environment.is_installed("bitsandbytes"):
        yield "lora.base_weights", "bitsandbytes is missing"
    if not where.card.is_cpu and torch.cuda.is_available():
        reason = fused_layers.why_not(torch.device("cuda", torch.cuda.current_device()))
        if reason is not None:
            yield "memory.fused_layers", reason


def _unsupported(card: Card, config: Config, missing: Mapping[str, str]) -> Iterator[str]:
    """Yield what the card or this machine does not support."""
    weights, base, precision = config.memory.weights, config.lora.base_weights, config.training.mixed_precision
    if base in {"int8", "nf4"} and "lora.base_weights" in missing:
        yield missing["lora.base_weights"]
    if config.memory.fused_layers and "memory.fused_layers" in missing:
        yield missing["memory.fused_layers"]
    if card.is_cpu and base in {"int8", "nf4"}:
        yield f"lora.base_weights: {base!r} needs a CUDA device; allowed on the CPU: fp32, fp16, bf16"
    if card.is_cpu and config.memory.attention == "xformers":
        yield "memory.attention: 'xformers' needs a CUDA device; use memory.attention=sdpa"
    if precision != "bf16" or card.has_bf16 or card.is_cpu:
        return
    if base == "bf16":
        yield f"lora.base_weights: {card.name} does not support 'bf16'; allowed there: fp16, fp32, nf4, int8"
    elif weights == "fp32":
        yield f"training.mixed_precision: {card.name} does not support 'bf16'; allowed there: fp16, no"
    else:
        yield (
            f"memory.weights: {weights!r} computes in bf16, which {card.name} does not support; set "
            "memory.weights=fp32 (with training.mixed_precision=fp16), or leave both out"
        )


def open_choices(config: Config, card: Card) -> list[Config]:
    """Return the candidates without mixed placements, starting with the one that does the least.

    Raises:
        ConfigError: A rule refuses all of them.
    """
    kept, refused = candidates(config, card, [])
    if not kept:
        raise ConfigError("\n".join(refusal.reason for refusal in refused))
    return kept


def placement_of(config: Config, block: str) -> Placement:
    """Return the placement of one block in a resolved configuration."""
    placement = config.memory.checkpointing or "none"
    return placement.get(block, "none") if isinstance(placement, Mapping) else placement
