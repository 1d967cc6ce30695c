"""The strategies a configuration leaves open, and what they are called."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Literal

from lowmem_db import environment
from lowmem_db.config.rules import refusals
from lowmem_db.config.schema import BaseWeights, Config, Placement, Weights
from lowmem_db.config.strategy import Strategy, resolve_clipping, with_strategy
from lowmem_db.errors import ConfigError
from lowmem_db.planning.cards import Card
from lowmem_db.records import Refusal

_Precision = Literal["no", "fp16", "bf16"]


def candidates(config: Config, card: Card, block_names: Sequence[str]) -> tuple[list[Strategy], list[Refusal]]:
    """Return every strategy that the configuration and the card leave open, and those a rule refuses.

    What a field of the configuration gives is a constraint; what it leaves out is enumerated.

    Args:
        config: The configuration.
        card: Where the run takes place.
        block_names: Blocks that can have a placement of their own.
    """
    memory = config.memory
    kept: list[Strategy] = []
    refused: dict[str, Refusal] = {}
    base_weights = list(_base_weights(config, card))
    if config.lora.enabled and not environment.is_installed("bitsandbytes") and len(base_weights) > 1:
        quantized = base_weights.pop()
        reason = "bitsandbytes is missing"
        refused[reason] = Refusal(strategy=f"LoRA beside {quantized} weights", reason=reason)
    for weights, base, in_backward, streams, (placement, offloads) in product(
        _weights(config, card),
        base_weights,
        _choices_of_full(memory.optimizer_in_backward, config),
        _choices_of_full(memory.stream_optimizer_state, config, card),
        _placements(config, card, block_names),
    ):
        strategy = Strategy(
            weights=weights,
            mixed_precision=_precision(config, card, weights, base),
            optimizer_in_backward=in_backward,
            stream_optimizer_state=streams,
            checkpointing=placement,
            offload_checkpoints=offloads,
            clipping=resolve_clipping(config, optimizer_in_backward=in_backward),
            tiled_samples=bool(memory.tiled_samples),
            base_weights=base,
        )
        problems = [*_beyond(card, strategy), *refusals(with_strategy(config, strategy))]
        if not problems:
            kept.append(strategy)
        elif problems[0] not in refused:
            refused[problems[0]] = Refusal(strategy=describe(strategy), reason=problems[0])
    return kept, list(refused.values())


def _beyond(card: Card, strategy: Strategy) -> Iterator[str]:
    """Say what a card cannot compute."""
    if card.is_cpu and strategy.base_weights in {"int8", "nf4"}:
        yield f"lora.base_weights: {strategy.base_weights!r} needs a CUDA device; allowed on the CPU: fp32, fp16, bf16"
    if strategy.mixed_precision != "bf16" or card.has_bf16 or card.is_cpu:
        return
    if strategy.base_weights == "bf16":
        yield f"lora.base_weights: 'bf16' is not native on {card.name}; allowed there: fp16, fp32, nf4, int8"
    elif strategy.weights == "fp32":
        yield f"training.mixed_precision: 'bf16' is not native on {card.name}; allowed there: fp16, no"
    else:
        yield (
            f"memory.weights: {strategy.weights!r} computes in bf16, which is not native on {card.name}; set "
            "memory.weights=fp32 (with training.mixed_precision=fp16), or leave both out"
        )


def open_choices(config: Config, card: Card) -> list[Strategy]:
    """Return the candidates but for mixtures of placements, the first of them with the fewest measures.

    Raises:
        ConfigError: A rule refuses all of them.
    """
    kept, refused = candidates(config, card, [])
    if not kept:
        raise ConfigError("\n".join(refusal.reason for refusal in refused))
    return kept


def differ_in_when_alone(strategy: Strategy, other: Strategy) -> bool:
    """Say whether two strategies differ in when the optimizer steps at most."""
    changed = {"optimizer_in_backward": other.optimizer_in_backward, "clipping": other.clipping}
    return replace(strategy, **changed) == other


def describe(strategy: Strategy) -> str:
    """Return what a strategy is called on the screen."""
    weights = strategy.weights if strategy.base_weights is None else f"LoRA beside {strategy.base_weights} weights"
    words = [weights + (f" with {strategy.autocast} autocast" if strategy.autocast != "no" else "")]
    words.append(_describe_placement(strategy.checkpointing))
    if strategy.optimizer_in_backward:
        words.append("optimizer in backward")
    if strategy.stream_optimizer_state:
        words.append("streamed optimizer state")
    if strategy.offload_checkpoints:
        words.append("checkpoints on the host")
    if strategy.tiled_samples:
        words.append("tiled samples")
    return ", ".join(words)


def num_measures(strategy: Strategy) -> tuple[int, ...]:
    """Return how much a strategy does to save memory, as something that can be compared."""
    placement = strategy.checkpointing
    depth = {"none": 0, "layers": 1, "segments": 2, "nested": 3}
    depths = [depth[placement]] if isinstance(placement, str) else [depth[kind] for kind in placement.values()]
    return (
        ("fp32", "bf16_extra_bits", "bf16_stochastic").index(strategy.weights),
        (None, "fp32", "fp16", "bf16", "int8", "nf4").index(strategy.base_weights),
        strategy.optimizer_in_backward + strategy.stream_optimizer_state + strategy.offload_checkpoints,
        max(depths) if isinstance(placement, str) else 1,
        len(depths),
    )


def placement_of(strategy: Strategy, block: str) -> Placement:
    """Return the placement of one block."""
    placement = strategy.checkpointing
    return placement.get(block, "none") if isinstance(placement, Mapping) else placement


def _describe_placement(placement: Placement | Mapping[str, Placement]) -> str:
    if placement == "none":
        return "no checkpointing"
    if isinstance(placement, str):
        return f"checkpointed {placement}"
    blocks = [name for name, kind in placement.items() if kind != "none"]
    return f"checkpointed {' and '.join(blocks)}" if len(blocks) <= 2 else f"checkpointed {len(blocks)} blocks"


def _weights(config: Config, card: Card) -> Iterator[Weights]:
    if config.memory.weights is not None:
        yield config.memory.weights
    elif config.lora.enabled or config.training.mixed_precision in {"no", "fp16"} or not card.has_bf16:
        yield "fp32"
    else:
        yield "bf16_extra_bits"
        yield "bf16_stochastic"


def _base_weights(config: Config, card: Card) -> Iterator[BaseWeights | None]:
    """Yield types of the frozen weights of a LoRA run, the exact one first; None where all weights train."""
    lora, precision = config.lora, config.training.mixed_precision
    if not lora.enabled:
        yield None
    elif lora.base_weights is not None:
        yield lora.base_weights
    elif card.is_cpu or precision == "no":
        yield "fp32"
    else:
        yield precision or ("bf16" if card.has_bf16 else "fp16")
        if not lora.dora:
            yield "nf4"


def _precision(config: Config, card: Card, weights: Weights, base: BaseWeights | None) -> _Precision:
    if weights != "fp32":
        return "bf16"
    if config.training.mixed_precision is not None:
        return config.training.mixed_precision
    if base == "fp16" or base == "bf16":
        return base
    if card.is_cpu:
        return "no"
    return "bf16" if card.has_bf16 else "fp16"


def _choices(given: bool | None) -> tuple[bool, ...]:
    return (False, True) if given is None else (given,)


def _choices_of_full(given: bool | None, config: Config, card: Card | None = None) -> tuple[bool, ...]:
    """Return the choices of what saves gradients or optimizer states, which are small where adapters train."""
    if given is None and config.lora.enabled:
        return (False,)
    return _choices(given) if card is None else _choices_of_card(given, card)


def _choices_of_card(given: bool | None, card: Card) -> tuple[bool, ...]:
    """Return the choices of what moves memory to the host, which saves nothing where the host is the device."""
    return (False,) if given is None and card.is_cpu else _choices(given)


def _placements(
    config: Config, card: Card, block_names: Sequence[str]
) -> list[tuple[Placement | Mapping[str, Placement], bool]]:
    """Return placements, each with whether what checkpointed segments start from goes to the host."""
    memory = config.memory
    offloads = _choices_of_card(memory.offload_checkpoints, card)
    if memory.checkpointing is not None:
        return [(memory.checkpointing, choice) for choice in offloads if not choice or memory.checkpointing != "none"]
    placements = ["none", *_partial(block_names), "segments", "nested"]
    kept = [(placement, False) for placement in placements if False in offloads]
    return kept + [(placement, True) for placement in ("segments", "nested") if True in offloads]


def _partial(block_names: Sequence[str]) -> Iterator[Mapping[str, Placement]]:
    """Yield placements with one block more checkpointed each time, the one of the highest resolution first."""
    chosen: dict[str, Placement] = {}
    for name in sorted(block_names, key=_steps_from_the_ends(block_names))[:-1]:
        chosen[name] = "segments"
        yield dict(chosen)


def _steps_from_the_ends(block_names: Sequence[str]) -> Callable[[str], tuple[int, int]]:
    unet = [name for name in block_names if name.startswith("unet.")]

    def steps(name: str) -> tuple[int, int]:
        if name not in unet:
            return len(unet), 0
        index = unet.index(name)
        return min(index, len(unet) - 1 - index), -index

    return steps
