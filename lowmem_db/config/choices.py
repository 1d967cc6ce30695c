"""What the planner may choose for each strategy field that a configuration leaves open, the mildest choice first.

The functions are called in the order of :data:`lowmem_db.config.strategy.FIELDS`: in the configuration that a function
gets, the earlier fields are already chosen.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from lowmem_db.config.schema import BaseWeights, Clipping, Config, Placement, TrainingConfig, Weights

Precision = Literal["no", "fp16", "bf16"]


@runtime_checkable
class Device(Protocol):
    """The properties of a card that choices depend on."""

    @property
    def is_cpu(self) -> bool:
        """Whether it is the CPU."""
        ...

    @property
    def has_bf16(self) -> bool:
        """Whether it computes in bf16."""
        ...

    @property
    def faster_with(self) -> Collection[str]:
        """Fields of techniques that were measured to make its steps faster."""
        ...


@dataclass(frozen=True)
class Situation:
    """The circumstances of a choice.

    Attributes:
        card: The device.
        block_names: Blocks of the model that can be checkpointed one by one; if empty, all are treated alike.
        open_paths: Fields that the configuration leaves open.
    """

    card: Device
    block_names: Sequence[str] = ()
    open_paths: frozenset[str] = frozenset()


def weights(config: Config, where: Situation) -> Iterator[Weights]:
    """Yield types of the trained weights: 24 bits before stochastic rounding, fp32 if bf16 cannot be used."""
    if not config.trains_weights or config.training.mixed_precision in {"no", "fp16"} or not where.card.has_bf16:
        yield "fp32"
    else:
        yield "bf16_extra_bits"
        if not _shares_out(config):
            yield "bf16_stochastic"


def base_weights(config: Config, where: Situation) -> Iterator[BaseWeights]:
    """Yield types of the frozen weights, the exact one first."""
    precision = config.training.mixed_precision
    if where.card.is_cpu or precision == "no":
        yield "fp32"
    else:
        yield precision or ("bf16" if where.card.has_bf16 else "fp16")
        if not config.lora.dora:
            yield "nf4"


def mixed_precision(config: Config, where: Situation) -> Iterator[Precision]:
    """Yield the type that fits the weights and the card."""
    base = config.lora.base_weights
    if config.memory.weights != "fp32":
        yield "bf16"
    elif base == "fp16" or base == "bf16":
        yield base
    elif where.card.is_cpu:
        yield "no"
    else:
        yield "bf16" if where.card.has_bf16 else "fp16"


def plain_precision(config: Config) -> Precision:
    """Return the compute type of a run without a plan: the type of its weights."""
    if config.memory.weights != "fp32":
        return "bf16"
    base = config.lora.base_weights
    if base is None or base == "fp32":
        return "no"
    return "fp16" if base == "fp16" else "bf16"


def gradients(config: Config, where: Situation) -> Iterator[bool]:
    """Yield whether gradients are freed as soon as they are used; not for adapters, whose gradients are small."""
    del where
    yield False
    if config.trains_weights:
        yield True


def optimizer_states(config: Config, where: Situation) -> Iterator[bool]:
    """Yield whether optimizer states go to the host; not for adapters, whose states are small, nor on the CPU."""
    yield False
    if config.trains_weights and not where.card.is_cpu and not _shares_out(config):
        yield True


def checkpointing(config: Config, where: Situation) -> Iterator[Placement | Mapping[str, Placement]]:
    """Yield placements of activation checkpoints: none, one more block each time, all blocks, all of them twice."""
    if not config.memory.offload_checkpoints:
        yield "none"
        yield from _partial(where.block_names)
    yield "segments"
    yield "nested"


def offload_checkpoints(config: Config, where: Situation) -> Iterator[bool]:
    """Yield whether the inputs of checkpointed segments go to the host."""
    yield False
    placement = config.memory.checkpointing
    is_given = "memory.checkpointing" not in where.open_paths
    if not where.card.is_cpu and placement != "none" and (is_given or isinstance(placement, str)):
        yield True


def stream_weights(config: Config, where: Situation) -> Iterator[bool]:
    """Yield whether weights go to the host too, last of all; not with what cannot be combined with it."""
    yield False
    memory, placement = config.memory, config.memory.checkpointing
    if where.card.is_cpu or not isinstance(placement, str) or placement not in {"segments", "nested"}:
        return
    if _shares_out(config):
        return
    streams_states = memory.stream_optimizer_state or "memory.stream_optimizer_state" not in where.open_paths
    can_train = not config.trains_weights or (memory.optimizer_in_backward and streams_states)
    is_quantized = config.lora.base_weights in {"int8", "nf4"}
    if can_train and not (is_quantized or config.training.compile):
        yield True


def optimizer_steps(config: Config, where: Situation) -> Iterator[Literal["device", "host"]]:
    """Yield where the optimizer steps: also on the host, if its states and the weights are there."""
    yield "device"
    memory = config.memory
    if config.trains_weights and memory.stream_weights and memory.stream_optimizer_state and not where.card.is_cpu:
        yield "host"


def fused_layers(config: Config, where: Situation) -> Iterator[bool]:
    """Yield whether layers are fused; not on the CPU, where the eager twins are slower."""
    del config
    yield False
    if not where.card.is_cpu:
        yield True


def channels_last(config: Config, where: Situation) -> Iterator[bool]:
    """Yield whether convolutions are in channels_last: with fused layers, on cards that were measured to gain by it."""
    yield False
    is_faster = "memory.channels_last" in where.card.faster_with
    if config.trains_weights and config.memory.fused_layers and is_faster and not _shares_out(config):
        yield True


def off(config: Config, where: Situation) -> Iterator[bool]:
    """Yield only False: the planner turns the technique on itself if nothing else fits."""
    del config, where
    yield False


def whole_batches(config: Config, where: Situation) -> Iterator[int]:
    """Yield only 0: batches are split where memory has run out."""
    del config, where
    yield 0


def micro_batches(config: Config) -> Iterator[int]:
    """Yield the numbers of equal parts that a batch can be computed in with the same noise for each sample.

    With buckets the batches themselves depend on their size, and dropout is drawn batch by batch.
    """
    size = config.training.train_batch_size
    if not (config.memory.optimizer_in_backward or config.data.aspect_ratio_buckets or config.lora.dropout):
        yield from (parts for parts in range(2, size + 1) if size % parts == 0)


def clipping(config: Config, where: Situation | None = None) -> Iterator[Clipping]:
    """Yield the one way of clipping, which depends on when the optimizer steps."""
    del where
    training = config.training
    if training.max_grad_norm is None:
        yield "none"
    elif not config.memory.optimizer_in_backward:
        yield "global"
    else:
        is_default = training.max_grad_norm == TrainingConfig.model_fields["max_grad_norm"].default
        yield "update_rms" if is_default else "lagged"


def _shares_out(config: Config) -> bool:
    """Return whether several processes share the model out, which cannot be combined with some choices."""
    return config.distributed.sharding == "full"


def _partial(block_names: Sequence[str]) -> Iterator[Mapping[str, Placement]]:
    """Yield placements with one more block checkpointed each time, the block with the highest resolution first."""
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
