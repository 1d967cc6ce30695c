"""The table of refused combinations: each row has a condition and a message with the way out."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

from lowmem_db.config import choices, strategy
from lowmem_db.config.schema import Config, LoraConfig, TextualInversionConfig, TrainingConfig


@dataclass(frozen=True)
class Rule:
    """A combination of fields that is refused.

    Attributes:
        refuses: Whether a configuration holds the combination.
        message: The field, what is allowed and the way out; a format string with ``config``.
    """

    refuses: Callable[[Config], bool]
    message: str


def _no_effect(field: str, when: Callable[[Config], bool], why: str) -> Rule:
    """Return the rule that refuses a field when it has no effect."""
    value = attrgetter(field)
    return Rule(
        lambda c: value(c) not in (None, ()) and when(c),
        f"{field}: {{config.{field}}} has no effect {why}, or leave it out",
    )


def _learns(rule: Callable[[Config], bool]) -> Callable[[Config], bool]:
    return lambda c: c.textual_inversion.enabled and rule(c)


def _streams(rule: Callable[[Config], bool]) -> Callable[[Config], bool]:
    return lambda c: bool(c.memory.stream_weights) and rule(c)


def _steps_on_host(rule: Callable[[Config], bool]) -> Callable[[Config], bool]:
    return lambda c: c.memory.optimizer_step == "host" and rule(c)


def _shares_out(rule: Callable[[Config], bool]) -> Callable[[Config], bool]:
    return lambda c: c.distributed.sharding == "full" and rule(c)


_TEXTUAL_INVERSION = (
    Rule(
        lambda c: not c.textual_inversion.enabled and c.textual_inversion != TextualInversionConfig(),
        "textual_inversion.enabled: false gives the other fields of textual_inversion no effect; set "
        "textual_inversion.enabled=true, or leave them out",
    ),
    Rule(
        _learns(lambda c: c.lora.enabled),
        "lora.enabled: true trains adapters, and textual_inversion.enabled=true an embedding; set one of them to false",
    ),
    Rule(
        _learns(lambda c: c.prior.enabled),
        "prior.enabled: true has nothing to preserve, because Textual Inversion changes no weights; set it to "
        "false, or leave it out",
    ),
    Rule(
        _learns(lambda c: c.training.train_text_encoder),
        "training.train_text_encoder: true trains weights, and textual_inversion.enabled=true an embedding alone; "
        "leave it out",
    ),
    Rule(
        _learns(lambda c: bool(c.training.layers)),
        "training.layers: {config.training.layers!r} selects weights of a full fine-tuning, and "
        "textual_inversion.enabled=true trains an embedding alone; leave it out",
    ),
    Rule(
        _learns(lambda c: c.training.learning_rate != TrainingConfig().learning_rate),
        "training.learning_rate: {config.training.learning_rate} is for weights; set textual_inversion.learning_rate",
    ),
    Rule(
        _learns(lambda c: c.initializer is None),
        "textual_inversion.initializer: is missing, and there is no subject.class_prompt to take it from; set "
        "textual_inversion.initializer=dog (your class noun)",
    ),
    Rule(
        _learns(lambda c: c.textual_inversion.token not in c.subject.instance_prompt),
        "subject.instance_prompt: {config.subject.instance_prompt!r} does not have the new word; set "
        "subject.instance_prompt='a {config.textual_inversion.token}'",
    ),
)
_STREAMED_WEIGHTS = (
    Rule(
        _streams(lambda c: _checkpoints_nothing(c)),
        "memory.stream_weights: true streams the weights of checkpointed segments, and memory.checkpointing is none; "
        "set memory.checkpointing=segments, or leave stream_weights out",
    ),
    Rule(
        _streams(lambda c: c.trains_weights and c.memory.optimizer_in_backward is False),
        "memory.stream_weights: true takes weights back to the host in the backward pass, where they must have been "
        "stepped; set memory.optimizer_in_backward=true, or leave stream_weights out",
    ),
    Rule(
        _streams(lambda c: c.training.compile),
        "training.compile: true has not been tested with memory.stream_weights; set one of them to false",
    ),
    Rule(
        _streams(lambda c: c.lora.base_weights in {"int8", "nf4"}),
        "lora.base_weights: {config.lora.base_weights!r} has weights of its own kind, which memory.stream_weights "
        "cannot move; set lora.base_weights=bf16, or memory.stream_weights=false",
    ),
)
_STEP_ON_HOST = (
    Rule(
        _steps_on_host(lambda c: not c.trains_weights),
        "memory.optimizer_step: host is for weights that stream, but adapters and embeddings stay on the device and "
        "are stepped there; set memory.optimizer_step=device, or leave it out",
    ),
    Rule(
        _steps_on_host(lambda c: c.trains_weights and c.memory.stream_weights is False),
        "memory.optimizer_step: host steps weights that are on the host, but memory.stream_weights is "
        "false; set memory.stream_weights=true (with memory.checkpointing=segments), or "
        "memory.optimizer_step=device",
    ),
    Rule(
        _steps_on_host(lambda c: c.trains_weights and c.memory.stream_optimizer_state is False),
        "memory.optimizer_step: host keeps optimizer states in host memory, but memory.stream_optimizer_state is "
        "false; set it to true, or memory.optimizer_step=device",
    ),
)
_SHARED_OUT = (
    Rule(
        _shares_out(lambda c: not c.trains_weights),
        "distributed.sharding: 'full' is for weights that train, and adapters and embeddings leave them as they are; "
        "set distributed.sharding=none, and lora.base_weights=nf4 for less memory",
    ),
    Rule(
        _shares_out(lambda c: bool(c.memory.stream_weights)),
        "memory.stream_weights: true keeps weights on the host, and distributed.sharding=full on other cards; leave "
        "one of them out",
    ),
    Rule(
        _shares_out(lambda c: bool(c.memory.stream_optimizer_state)),
        "memory.stream_optimizer_state: true has not been tested with distributed.sharding=full; leave one of them out",
    ),
    Rule(
        _shares_out(lambda c: bool(c.memory.channels_last)),
        "memory.channels_last: true has weights in another order, whose rows distributed.sharding=full cannot share "
        "out; leave one of them out",
    ),
    Rule(
        _shares_out(lambda c: c.training.compile),
        "training.compile: true has not been tested with distributed.sharding=full; leave one of them out",
    ),
    Rule(
        _shares_out(lambda c: c.optimizer.name == "adafactor"),
        "optimizer.name: 'adafactor' has states of whole rows and columns, which distributed.sharding=full does not "
        "have; set optimizer.name=adamw8bit, or distributed.sharding=none",
    ),
    Rule(
        _shares_out(lambda c: c.memory.weights == "bf16_stochastic"),
        "memory.weights: 'bf16_stochastic' rounds each weight by its place in the whole tensor, and "
        "distributed.sharding=full has parts of it; set memory.weights=bf16_extra_bits, or distributed.sharding=none",
    ),
    Rule(
        _shares_out(lambda c: c.training.stop_text_encoder_training is not None),
        "training.stop_text_encoder_training: {config.training.stop_text_encoder_training} cannot be combined with "
        "distributed.sharding=full; leave it out, or set distributed.sharding=none",
    ),
)
RULES = (
    Rule(
        lambda c: c.prior.enabled and not c.subject.class_prompt,
        "prior.enabled: true needs subject.class_prompt, which is missing; "
        'set subject.class_prompt="a dog" (your class noun: lowmem-db identifiers --class-noun '
        "{config.subject.instance_dir} looks for it), or prior.enabled=false",
    ),
    Rule(
        lambda c: c.prior.enabled and not all(concept.class_prompt for concept in c.subject.concepts),
        "subject.concepts: prior.enabled: true needs the class_prompt of every subject, and one of them has none; "
        "write it (class_prompt: a cat), or set prior.enabled=false",
    ),
    _no_effect("prior.class_prompts", lambda c: not c.prior.enabled, "while prior.enabled is false; set it to true"),
    Rule(
        lambda c: bool(c.prior.class_prompts and c.subject.concepts),
        "prior.class_prompts: belongs to a run of one subject, and subject.concepts has more; leave it out, or give "
        "each subject a class_dir of pictures with text files that hold their prompts",
    ),
    Rule(
        lambda c: c.prior.enabled and len(c.prior.class_prompts) >= c.prior.num_class_images,
        "prior.num_class_images: {config.prior.num_class_images} is too few for one image of every prompt of "
        "prior.class_prompts and of the class prompt; allowed: one for each, and eight are usual. Raise it, or name "
        "fewer prompts",
    ),
    Rule(
        lambda c: len({subject.instance_prompt for subject in c.subjects}) < len(c.subjects),
        "subject.concepts: two subjects have the same instance_prompt, so the model could not tell them apart; give "
        "each an identifier of its own",
    ),
    Rule(
        lambda c: not c.prior.enabled and any(concept.class_dir for concept in c.subject.concepts),
        "subject.concepts: class_dir has no effect while prior.enabled is false; set prior.enabled=true, or leave "
        "class_dir out",
    ),
    Rule(
        lambda c: c.data.resolution % 8 != 0,
        "data.resolution: {config.data.resolution} is not a multiple of 8, the size of a latent pixel; round it",
    ),
    *(
        _no_effect(field, lambda c: not c.data.aspect_ratio_buckets, "without data.aspect_ratio_buckets=true; set that")
        for field in ("data.bucket_step", "data.min_bucket_side", "data.max_bucket_side")
    ),
    *(
        _no_effect(
            field,
            lambda c: not c.data.shuffle_tags and c.data.tag_dropout == 0,
            "while tags are neither shuffled nor left out; set data.shuffle_tags=true or data.tag_dropout=0.1",
        )
        for field in ("data.keep_tags", "data.num_caption_variants")
    ),
    Rule(
        lambda c: bool(c.sampling.negative_prompt) and not (c.sampling.prompts or c.evaluation.every),
        "sampling.negative_prompt: {config.sampling.negative_prompt!r} has no effect without images during training; "
        'set sampling.prompts=["a sks dog"], or leave it out',
    ),
    Rule(
        lambda c: c.sampling.at_start and not c.sampling.prompts,
        "sampling.at_start: true has no effect without sampling.prompts; set "
        'sampling.prompts=["a sks dog"], or leave it out',
    ),
    Rule(
        lambda c: bool(c.objective.zero_terminal_snr) and c.objective.prediction_type == "epsilon",
        "objective.zero_terminal_snr: true makes the last timestep pure noise, from which epsilon teaches nothing; set "
        "objective.prediction_type=v_prediction, or objective.zero_terminal_snr=false",
    ),
    Rule(
        lambda c: c.objective.vlb_weight != 1e-3 and c.objective.variance != "hybrid",
        "objective.vlb_weight: {config.objective.vlb_weight} has no effect without objective.variance=hybrid; set "
        "that, or leave it out",
    ),
    *(
        Rule(
            lambda c, name=name: c.objective.variance == "hybrid" and getattr(c.objective, name) > 0,
            f"objective.{name}: changes the noise, and objective.variance=hybrid holds for plain noise alone; set "
            f"objective.{name}=0, or objective.variance=frozen",
        )
        for name in ("noise_offset", "input_perturbation")
    ),
    Rule(
        lambda c: c.objective.snr_gamma is not None and c.objective.debiased,
        "objective.debiased: true and objective.snr_gamma: {config.objective.snr_gamma} are two weightings of the same "
        "loss; leave one of them out",
    ),
    *(
        _no_effect(
            field,
            lambda c: not c.training.train_text_encoder,
            "while the text encoders are frozen; set training.train_text_encoder=true",
        )
        for field in (
            "training.learning_rate_text_encoder",
            "training.learning_rate_text_encoder_2",
            "training.stop_text_encoder_training",
        )
    ),
    Rule(
        lambda c: c.training.compile and c.lora.enabled,
        "training.compile: true has not been tested with LoRA; set training.compile=false, or lora.enabled=false",
    ),
    Rule(
        lambda c: c.training.lr_warmup_steps >= c.training.max_train_steps and not c.training.lr_warmup_from_zero,
        "training.lr_warmup_steps: {config.training.lr_warmup_steps} leaves no step at the full learning rate; "
        "allowed: less than training.max_train_steps, {config.training.max_train_steps}",
    ),
    Rule(
        lambda c: c.training.lr_num_cycles != 1 and c.training.lr_scheduler != "cosine_with_restarts",
        "training.lr_num_cycles: {config.training.lr_num_cycles} has no effect with training.lr_scheduler="
        "{config.training.lr_scheduler}; set training.lr_scheduler=cosine_with_restarts, or leave it out",
    ),
    Rule(
        lambda c: c.training.lr_power != 1.0 and c.training.lr_scheduler != "polynomial",
        "training.lr_power: {config.training.lr_power} has no effect with training.lr_scheduler="
        "{config.training.lr_scheduler}; set training.lr_scheduler=polynomial, or leave it out",
    ),
    Rule(
        lambda c: c.training.lr_scheduler == "polynomial" and c.training.learning_rate <= 1e-7,
        "training.learning_rate: {config.training.learning_rate} is not above 1e-7, at which "
        "training.lr_scheduler=polynomial ends; raise it, or set training.lr_scheduler=linear",
    ),
    *(
        _no_effect(field, lambda c: c.evaluation.every is None, "without scores; set evaluation.every=100")
        for field in ("evaluation.prompts", "evaluation.patience")
    ),
    Rule(
        lambda c: c.checkpointing.copy_to is not None and c.checkpointing.copy_to.resolve() == c.output_dir.resolve(),
        "checkpointing.copy_to: {config.checkpointing.copy_to} is output_dir itself; choose a folder on another disk",
    ),
    Rule(
        lambda c: c.sampling.every is not None and not c.sampling.prompts,
        "sampling.every: {config.sampling.every} has no effect without sampling.prompts; "
        'set sampling.prompts=["a sks dog"], or leave it out',
    ),
    Rule(
        lambda c: bool(c.memory.optimizer_in_backward) and c.training.gradient_accumulation_steps > 1,
        "memory.optimizer_in_backward: true frees each gradient before the next batch can be added "
        "(training.gradient_accumulation_steps is {config.training.gradient_accumulation_steps}); use a larger "
        "training.train_batch_size, or memory.optimizer_in_backward=false",
    ),
    Rule(
        lambda c: bool(c.memory.optimizer_in_backward) and c.training.clipping == "global",
        "training.clipping: 'global' needs all gradients at once, but memory.optimizer_in_backward frees each of them; "
        "allowed in the backward pass: update_rms, lagged, per_tensor, none",
    ),
    Rule(
        lambda c: c.training.clipping in {"global", "lagged", "per_tensor"} and c.training.max_grad_norm is None,
        "training.clipping: {config.training.clipping!r} needs training.max_grad_norm, which is null; set it, or "
        "training.clipping=none",
    ),
    Rule(
        lambda c: _has_bf16_weights(c) and c.training.mixed_precision in {"no", "fp16"},
        "memory.weights: {config.memory.weights!r} computes in bf16, but training.mixed_precision is "
        "{config.training.mixed_precision!r}; leave that out, or set memory.weights=fp32",
    ),
    Rule(
        lambda c: (
            bool(c.memory.optimizer_in_backward)
            and c.training.mixed_precision == "fp16"
            and c.optimizer.name != "adamw8bit"
        ),
        "training.mixed_precision: 'fp16' with memory.optimizer_in_backward has to skip parameters whose gradient is "
        "not finite, which optimizer.name={config.optimizer.name!r} cannot do; set optimizer.name=adamw8bit, or "
        "memory.optimizer_in_backward=false",
    ),
    Rule(
        lambda c: (
            bool(c.memory.stream_optimizer_state)
            and not c.memory.stream_weights  # with which the average is on the host too
            and c.ema.enabled
            and c.memory.weights == "bf16_extra_bits"
        ),
        "ema.enabled: true averages complete weights, but memory.stream_optimizer_state keeps their extra bits on the "
        "host; set ema.enabled=false, memory.stream_optimizer_state=false, or memory.weights=fp32",
    ),
    *_STREAMED_WEIGHTS,
    *_STEP_ON_HOST,
    *_SHARED_OUT,
    Rule(
        lambda c: (c.memory.micro_batches or 0) > 1 and c.memory.micro_batches not in [*choices.micro_batches(c)],
        "memory.micro_batches: {config.memory.micro_batches} needs a training.train_batch_size that it divides "
        "({config.training.train_batch_size} is set), the optimizer after the backward pass, no buckets, no dropout; "
        "leave it out",
    ),
    Rule(
        lambda c: bool(c.memory.offload_checkpoints) and _checkpoints_nothing(c),
        "memory.offload_checkpoints: true has no effect while memory.checkpointing is none; set "
        "memory.checkpointing=segments, or leave offload_checkpoints out",
    ),
    Rule(
        lambda c: bool(_unregistered(c)),
        "memory.techniques: {config.memory.techniques} names a technique that is not registered; import the package "
        "that registers it first, or leave it out",
    ),
    Rule(
        lambda c: not c.lora.enabled and _adapter_fields(c) != LoraConfig(),
        "lora.enabled: false gives the other fields of lora no effect; set lora.enabled=true, or leave them out",
    ),
    *_TEXTUAL_INVERSION,
    Rule(
        lambda c: not c.trains_weights and _has_bf16_weights(c),
        "memory.weights: {config.memory.weights!r} is for weights that train, but adapters and embeddings train in "
        "fp32; leave it out or set it to fp32; for the type of the frozen weights use lora.base_weights",
    ),
    Rule(
        lambda c: c.lora.enabled and bool(c.training.layers),
        "training.layers: {config.training.layers!r} selects weights of a full fine-tuning; with lora.enabled=true use "
        "lora.targets",
    ),
    Rule(
        lambda c: c.lora.dora and c.lora.base_weights in {"int8", "nf4"},
        "lora.dora: true needs the norms of unquantized weights, but lora.base_weights is {config.lora.base_weights!r}"
        "; allowed: fp32, fp16, bf16",
    ),
    Rule(
        lambda c: c.lora.base_weights not in {None, "fp32"} and c.training.mixed_precision not in _compute_types(c),
        "training.mixed_precision: {config.training.mixed_precision!r} cannot be combined with "
        "lora.base_weights={config.lora.base_weights!r}; frozen weights compute in their own type, int8 and nf4 in "
        "fp16 or bf16; leave it out, or set lora.base_weights=fp32",
    ),
    Rule(
        lambda c: c.final.hub_model_id is not None and not c.final.push_to_hub,
        "final.hub_model_id: {config.final.hub_model_id!r} has no effect without final.push_to_hub=true; set that, or "
        "leave hub_model_id out",
    ),
)


def _has_bf16_weights(config: Config) -> bool:
    return config.memory.weights is not None and config.memory.weights != "fp32"


def _compute_types(config: Config) -> set[str | None]:
    """Return the compute types that can be combined with the frozen weights of a LoRA run."""
    is_quantized = config.lora.base_weights in {"int8", "nf4"}
    return {None, "fp16", "bf16"} if is_quantized else {None, config.lora.base_weights}


def _adapter_fields(config: Config) -> LoraConfig:
    """Return the section ``lora`` without the type of the frozen weights, which Textual Inversion has too."""
    is_used = config.textual_inversion.enabled
    return config.lora.model_copy(update={"base_weights": None}) if is_used else config.lora


def _unregistered(config: Config) -> set[str]:
    is_used = {name: value for name, value in config.memory.techniques.items() if value not in (None, False)}
    return {name for name in is_used if not strategy.is_registered(name)}


def _checkpoints_nothing(config: Config) -> bool:
    placement = config.memory.checkpointing
    return placement == "none" or (isinstance(placement, dict) and set(placement.values()) <= {"none"})


def refusals(config: Config) -> list[str]:
    """Return the messages of all refused combinations in a configuration."""
    return [rule.message.format(config=config) for rule in RULES if rule.refuses(config)]
