"""How a run saves memory: every choice that the configuration leaves open, made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lowmem_db.config.schema import BaseWeights, Clipping, Config, Placement, Weights


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """What the memory engine does.

    Attributes:
        weights: Kind of the weights that train.
        mixed_precision: Type the model computes in; with bf16 weights always ``bf16``.
        optimizer_in_backward: Step each parameter when its gradient is complete.
        stream_optimizer_state: Keep 8-bit states and extra bits on the host.
        checkpointing: Placement, for all blocks or for each.
        offload_checkpoints: Keep what checkpointed segments start from on the host.
        clipping: What is clipped.
        tiled_samples: Draw samples during training one at a time, and decode them in tiles in the type of the weights.
        base_weights: Type of the frozen weights of a LoRA run; None where all weights train.
    """

    weights: Weights
    mixed_precision: Literal["no", "fp16", "bf16"]
    optimizer_in_backward: bool
    stream_optimizer_state: bool
    checkpointing: Placement | Mapping[str, Placement]
    offload_checkpoints: bool
    clipping: Clipping
    tiled_samples: bool = False
    base_weights: BaseWeights | None = None

    @property
    def autocast(self) -> Literal["no", "fp16", "bf16"]:
        """Type of the autocast: none where the weights are bf16 themselves."""
        return self.mixed_precision if self.weights == "fp32" else "no"


def plain_strategy(config: Config) -> Strategy:
    """Return the strategy of a configuration that nobody planned: what it leaves open is not done."""
    memory, training = config.memory, config.training
    weights = memory.weights or "fp32"
    in_backward = bool(memory.optimizer_in_backward)
    base_weights = (config.lora.base_weights or "fp32") if config.lora.enabled else None
    return Strategy(
        weights=weights,
        mixed_precision="bf16" if weights != "fp32" else training.mixed_precision or compute_type(base_weights),
        optimizer_in_backward=in_backward,
        stream_optimizer_state=bool(memory.stream_optimizer_state),
        checkpointing=memory.checkpointing or "none",
        offload_checkpoints=bool(memory.offload_checkpoints),
        clipping=resolve_clipping(config, optimizer_in_backward=in_backward),
        tiled_samples=bool(memory.tiled_samples),
        base_weights=base_weights,
    )


def compute_type(base_weights: BaseWeights | None) -> Literal["no", "fp16", "bf16"]:
    """Return the type that frozen weights compute in where nothing says otherwise."""
    if base_weights in {None, "fp32"}:
        return "no"
    return "fp16" if base_weights == "fp16" else "bf16"


def resolve_clipping(config: Config, *, optimizer_in_backward: bool) -> Clipping:
    """Return what is clipped where ``training.clipping`` leaves it open."""
    training = config.training
    if training.clipping is not None:
        return training.clipping
    if training.max_grad_norm is None:
        return "none"
    if not optimizer_in_backward:
        return "global"
    return "lagged" if "max_grad_norm" in training.model_fields_set else "update_rms"


def with_strategy(config: Config, strategy: Strategy) -> Config:
    """Return the configuration with every choice of a strategy written into it."""
    placement = strategy.checkpointing
    memory = config.memory.model_copy(
        update={
            "weights": strategy.weights,
            "optimizer_in_backward": strategy.optimizer_in_backward,
            "stream_optimizer_state": strategy.stream_optimizer_state,
            "checkpointing": placement if isinstance(placement, str) else dict(placement),
            "offload_checkpoints": strategy.offload_checkpoints,
            "tiled_samples": strategy.tiled_samples,
        }
    )
    training = config.training.model_copy(
        update={"mixed_precision": strategy.mixed_precision, "clipping": strategy.clipping}
    )
    lora = config.lora.model_copy(update={"base_weights": strategy.base_weights})
    return config.model_copy(update={"memory": memory, "training": training, "lora": lora})
