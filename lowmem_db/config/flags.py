"""The flags of diffusers' ``train_dreambooth.py`` and ``train_dreambooth_lora.py``, mapped to fields.

Underscores and hyphens are equivalent. A flag without a counterpart is an error that says what to use instead.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lowmem_db.config.loading import parse_override
from lowmem_db.errors import ConfigError

VALUE_FLAGS = {
    "pretrained_model_name_or_path": "model.base",
    "revision": "model.revision",
    "variant": "model.variant",
    "instance_data_dir": "subject.instance_dir",
    "instance_prompt": "subject.instance_prompt",
    "class_prompt": "subject.class_prompt",
    "class_data_dir": "prior.class_dir",
    "prior_loss_weight": "prior.loss_weight",
    "num_class_images": "prior.num_class_images",
    "sample_batch_size": "prior.sample_batch_size",
    "output_dir": "output_dir",
    "seed": "seed",
    "resolution": "data.resolution",
    "bucket_reso_steps": "data.bucket_step",
    "min_bucket_reso": "data.min_bucket_side",
    "max_bucket_reso": "data.max_bucket_side",
    "train_batch_size": "training.train_batch_size",
    "max_train_steps": "training.max_train_steps",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "learning_rate": "training.learning_rate",
    "text_encoder_lr": "training.learning_rate_text_encoder",
    "learning_rate_te1": "training.learning_rate_text_encoder",
    "learning_rate_te2": "training.learning_rate_text_encoder_2",
    "lr_warmup_steps": "training.lr_warmup_steps",
    "stop_text_encoder_training": "training.stop_text_encoder_training",
    "mixed_precision": "training.mixed_precision",
    "max_grad_norm": "training.max_grad_norm",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_weight_decay": "optimizer.weight_decay",
    "adam_epsilon": "optimizer.epsilon",
    "snr_gamma": "objective.snr_gamma",
    "min_snr_gamma": "objective.snr_gamma",
    "noise_offset": "objective.noise_offset",
    "checkpointing_steps": "checkpointing.every",
    "checkpoints_total_limit": "checkpointing.keep",
    "num_validation_images": "sampling.num_images",
    "validation_steps": "sampling.every",
    "hub_model_id": "final.hub_model_id",
    "rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "train_data_dir": "subject.instance_dir",
    "placeholder_token": "textual_inversion.token",
    "initializer_token": "textual_inversion.initializer",
    "num_vectors": "textual_inversion.num_vectors",
    "save_steps": "checkpointing.every",
}
"""Flags that take a value, and the field that gets it unchanged."""

SWITCH_FLAGS = {
    "with_prior_preservation": ("prior.enabled", True),
    "train_text_encoder": ("training.train_text_encoder", True),
    "gradient_checkpointing": ("memory.checkpointing", "layers"),
    "use_8bit_adam": ("optimizer.name", "adamw8bit"),
    "fused_backward_pass": ("memory.optimizer_in_backward", True),
    "enable_xformers_memory_efficient_attention": ("memory.attention", "xformers"),
    "center_crop": ("data.crop", "center"),
    "enable_bucket": ("data.aspect_ratio_buckets", True),
    "offset_noise": ("objective.noise_offset", 0.1),
    "allow_tf32": ("training.allow_tf32", True),
    "scale_lr": ("training.scale_learning_rate", True),
    "debiased_estimation_loss": ("objective.debiased", True),
    "v_parameterization": ("objective.prediction_type", "v_prediction"),
    "zero_terminal_snr": ("objective.zero_terminal_snr", True),
    "use_ema": ("ema.enabled", True),
    "push_to_hub": ("final.push_to_hub", True),
    "use_dora": ("lora.dora", True),
}
"""Flags without a value, and the field and value that they set."""

CHOICE_FLAGS = {
    "prior_generation_precision": (
        "prior.precision",
        {"no": "fp32", "fp32": "fp32", "fp16": "fp16", "bf16": "bf16"},
    ),
    "lr_scheduler": (
        "training.lr_scheduler",
        {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine"},
    ),
    "validation_scheduler": (
        "sampling.sampler",
        {"DPMSolverMultistepScheduler": "dpm_solver", "DDPMScheduler": "ddpm", "DDIMScheduler": "ddim"},
    ),
    "learnable_property": ("textual_inversion.templates", {"object": "object", "style": "style"}),
    "report_to": ("logging.tensorboard", {"tensorboard": True, "none": False}),
}
"""Flags whose values have different names here."""

ALWAYS_SO = {
    "set_grads_to_none": "gradients are always freed",
    "pre_compute_text_embeddings": "text embeddings are always computed once while the text encoder is frozen",
    "cache_latents": "latents are always cached",
    "cache_latents_to_disk": "latents are always cached",
    "read_prompts_from_txts": "a text file beside a photo always replaces its prompt",
}
"""Switches for what is always done: accepted, with a remark."""

REFUSED_FLAGS = {
    "num_train_epochs": "count optimizer steps instead: --max_train_steps",
    "tokenizer_name": "the tokenizer is the one in the model's folder: --pretrained_model_name_or_path",
    "tokenizer_max_length": "the length is that of the model's tokenizer; leave it out",
    "text_encoder_use_attention_mask": "Stable Diffusion attends to all tokens; leave it out",
    "skip_save_text_encoder": "final/ is always a complete model; leave it out",
    "lr_num_cycles": "restarts are not supported: --lr_scheduler constant, linear or cosine",
    "lr_power": "polynomial decay is not supported: --lr_scheduler constant, linear or cosine",
    "logging_dir": "TensorBoard's files are in output_dir/tensorboard: --output_dir",
    "dataloader_num_workers": "batches come from the caches, without workers; leave it out",
    "hub_token": "log in with: hf auth login",
    "validation_images": "set the prompts instead: --validation_prompt",
    "class_labels_conditioning": "only upscalers use it; leave it out",
    "local_rank": "training uses one device; leave it out",
    "train_text_encoder_frac": "give the step instead: --stop_text_encoder_training",
    "caption_column": "a caption is a text file beside its photo, with the same name",
    "repeats": "photos are repeated until --max_train_steps are done; leave it out",
    "offload_ema": "the average stays on the device; leave it out",
    "optimizer": "for 8-bit AdamW use --use_8bit_adam; AdamW in fp32 needs no flag",
    "lora_layers": "choose what gets adapters: lora.targets=[attention, unet.mid_block.*]",
    "save_as_full_pipeline": "final/ holds the embedding alone, which pipelines load; leave it out",
    "output_kohya_format": "export it when the run is done: lowmem-db export RUN --format lora-kohya",
    "validation_epochs": "count optimizer steps instead: --validation_steps",
    "do_edm_style_training": "the noise schedule is the one in the model's folder; leave it out",
    "image_interpolation_mode": "photos are always resized with a Lanczos filter; leave it out",
    "save_model_as": "final/ is always a folder of safetensors in diffusers' layout; leave it out",
    "full_bf16": "bf16 weights lose small updates: memory.weights=bf16_extra_bits keeps eight more bits",
    "multires_noise_iterations": "multi-resolution noise is not supported: --noise_offset",
    "masked_loss": "the loss always covers the whole image; leave it out",
    "not_cache_latents": "latents are always cached, as moments that every step samples from; leave it out",
    "concepts_list": "a run has one subject: --instance_data_dir, --instance_prompt, --class_prompt",
}
"""Flags without a counterpart, and what to use instead."""

LORA_FLAGS = {"rank", "lora_alpha", "lora_dropout", "use_dora"}
"""Flags of diffusers' ``train_dreambooth_lora.py`` and its relatives: each of them enables adapters."""

TEXTUAL_INVERSION_FLAGS = {"placeholder_token", "initializer_token", "num_vectors", "learnable_property"}
"""Flags of diffusers' ``textual_inversion.py`` and its relative for SDXL: each of them learns an embedding."""

_KNOWN = {
    *VALUE_FLAGS, *SWITCH_FLAGS, *CHOICE_FLAGS, *ALWAYS_SO, *REFUSED_FLAGS,
    "validation_prompt", "resume_from_checkpoint", "resume",
}  # fmt: skip


@dataclass
class Arguments:
    """The parsed command line.

    Attributes:
        overrides: Fields and their values, in order.
        resume: Continue from the newest complete checkpoint.
        notes: Remarks about the given flags.
        flags: Names of the flags given.
        positional: Arguments that are neither flags nor overrides.
    """

    overrides: list[tuple[str, Any]] = field(default_factory=list)
    resume: bool = False
    notes: list[str] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)
    positional: list[str] = field(default_factory=list)


def parse_arguments(arguments: Sequence[str]) -> Arguments:
    """Read flags, ``section.key=value`` overrides and positional arguments, in any order.

    Without a configuration file, diffusers' default for prior preservation applies: off unless its flag is given.

    Raises:
        ConfigError: With every argument that cannot be understood, one per line.
    """
    parsed, problems, rest = Arguments(), [], list(arguments)
    while rest:
        argument = rest.pop(0)
        try:
            if argument.startswith("--"):
                _read_flag(argument, rest, parsed)
            elif "=" in argument:
                parsed.overrides.append(parse_override(argument))
            else:
                parsed.positional.append(argument)
        except ConfigError as problem:
            problems.append(str(problem))
    if problems:
        raise ConfigError("\n".join(problems))
    if not parsed.positional and "pretrained_model_name_or_path" in parsed.flags:
        parsed.overrides.insert(0, ("prior.enabled", False))
    if parsed.flags & LORA_FLAGS:
        parsed.overrides.insert(0, ("lora.enabled", True))
    if parsed.flags & TEXTUAL_INVERSION_FLAGS:
        _learn_embedding(parsed)
    return parsed


def _learn_embedding(parsed: Arguments) -> None:
    """Read the flags as those of Textual Inversion: the learning rate is the embedding's, and prompts are templates."""
    moved = {"training.learning_rate": "textual_inversion.learning_rate"}
    parsed.overrides = [(moved.get(path, path), value) for path, value in parsed.overrides]
    parsed.overrides.insert(0, ("textual_inversion.enabled", True))
    token = dict(parsed.overrides).get("textual_inversion.token")
    if token is not None and not parsed.positional and "instance_prompt" not in parsed.flags:
        parsed.overrides.append(("subject.instance_prompt", f"a photo of a {token}"))


def _read_flag(argument: str, rest: list[str], parsed: Arguments) -> None:
    text, separator, inline = argument.removeprefix("--").partition("=")
    name = text.replace("-", "_")
    parsed.flags.add(name)
    if name in REFUSED_FLAGS:
        _skip_value(separator, rest)
        raise ConfigError(f"--{name}: is not supported; {REFUSED_FLAGS[name]}")
    if separator and name in {*ALWAYS_SO, *SWITCH_FLAGS, "resume"}:
        raise ConfigError(f"--{name}: takes no value, but {inline!r} was given; use --{name}, or leave it out")
    if name in ALWAYS_SO:
        parsed.notes.append(f"--{name}: {ALWAYS_SO[name]}")
    elif name in SWITCH_FLAGS:
        parsed.overrides.append(SWITCH_FLAGS[name])
    elif name == "resume":
        parsed.resume = True
    elif name in _KNOWN:
        _read_value_flag(name, inline if separator else _value(name, rest), parsed)
    else:
        _skip_value(separator, rest)
        nearest = difflib.get_close_matches(name, _KNOWN, n=1)
        hint = f"did you mean --{nearest[0]}?" if nearest else "a field without a flag is set as section.key=value"
        raise ConfigError(f"--{text}: unknown flag; {hint}")


def _read_value_flag(name: str, value: str, parsed: Arguments) -> None:
    if name in VALUE_FLAGS:
        parsed.overrides.append((VALUE_FLAGS[name], value))
    elif name in CHOICE_FLAGS:
        path, choices = CHOICE_FLAGS[name]
        if value not in choices:
            raise ConfigError(f"--{name}: {value!r} is not supported; allowed: {', '.join(choices)}")
        parsed.overrides.append((path, choices[value]))
    elif name == "validation_prompt":
        parsed.overrides.append(("sampling.prompts", [value]))
    elif value == "latest":
        parsed.resume = True
    else:
        raise ConfigError(
            f"--{name}: {value!r} is not supported; allowed: latest, the newest complete checkpoint in --output_dir"
        )


def _value(name: str, rest: list[str]) -> str:
    if not rest or rest[0].startswith("--"):
        raise ConfigError(f"--{name}: needs a value: --{name}=VALUE")
    return rest.pop(0)


def _skip_value(separator: str, rest: list[str]) -> None:
    """Drop the value of a flag that is refused anyway, so that it is not reported as a second problem."""
    if not separator and rest and not rest[0].startswith("--") and "=" not in rest[0]:
        rest.pop(0)
