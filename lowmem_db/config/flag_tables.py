"""The flags of diffusers' scripts and their relatives as data: each flag stands in one table.

Names are spelled with underscores.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Harmless:
    """A flag that has no counterpart but changes nothing.

    Attributes:
        note: Why it changes nothing.
        values: Values that change nothing; empty for all.
        otherwise: What to use instead of another value.
    """

    note: str
    values: tuple[str, ...] = ()
    otherwise: str = ""


VALUE_FLAGS = {
    "pretrained_model_name_or_path": "model.base",
    "base": "model.base",
    "pretrained_vae_model_name_or_path": "model.vae",
    "pretrained_vae_name_or_path": "model.vae",
    "vae": "model.vae",
    "clip_skip": "model.clip_skip",
    "revision": "model.revision",
    "variant": "model.variant",
    "instance_data_dir": "subject.instance_dir",
    "instance_prompt": "subject.instance_prompt",
    "class_prompt": "subject.class_prompt",
    "train_data_dir": "subject.instance_dir",
    "placeholder_token": "textual_inversion.token",
    "initializer_token": "textual_inversion.initializer",
    "num_vectors": "textual_inversion.num_vectors",
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
    "keep_tokens": "data.keep_tags",
    "caption_tag_dropout_rate": "data.tag_dropout",
    "caption_dropout_rate": "objective.conditioning_dropout",
    "train_batch_size": "training.train_batch_size",
    "max_train_steps": "training.max_train_steps",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "learning_rate": "training.learning_rate",
    "text_encoder_lr": "training.learning_rate_text_encoder",
    "learning_rate_te1": "training.learning_rate_text_encoder",
    "learning_rate_te2": "training.learning_rate_text_encoder_2",
    "lr_scheduler": "training.lr_scheduler",
    "lr_warmup_steps": "training.lr_warmup_steps",
    "lr_num_cycles": "training.lr_num_cycles",
    "lr_power": "training.lr_power",
    "stop_text_encoder_training": "training.stop_text_encoder_training",
    "mixed_precision": "training.mixed_precision",
    "max_grad_norm": "training.max_grad_norm",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_weight_decay": "optimizer.weight_decay",
    "adam_epsilon": "optimizer.epsilon",
    "prediction_type": "objective.prediction_type",
    "snr_gamma": "objective.snr_gamma",
    "min_snr_gamma": "objective.snr_gamma",
    "noise_offset": "objective.noise_offset",
    "checkpointing_steps": "checkpointing.every",
    "save_interval": "checkpointing.every",
    "checkpoints_total_limit": "checkpointing.keep",
    "num_validation_images": "sampling.num_images",
    "n_save_sample": "sampling.num_images",
    "save_sample_negative_prompt": "sampling.negative_prompt",
    "save_guidance_scale": "sampling.guidance_scale",
    "save_infer_steps": "sampling.num_inference_steps",
    "validation_steps": "sampling.every",
    "hub_model_id": "final.hub_model_id",
    "rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
}
"""Flags that take a value, and the field that gets it unchanged."""

SWITCH_FLAGS = {
    "with_prior_preservation": ("prior.enabled", True),
    "train_text_encoder": ("training.train_text_encoder", True),
    "text_encoder_use_attention_mask": ("model.attention_mask", True),
    "gradient_checkpointing": ("memory.checkpointing", "layers"),
    "use_8bit_adam": ("optimizer.name", "adamw8bit"),
    "fused_backward_pass": ("memory.optimizer_in_backward", True),
    "enable_xformers_memory_efficient_attention": ("memory.attention", "xformers"),
    "center_crop": ("data.crop", "center"),
    "random_flip": ("data.random_flip", True),
    "flip_aug": ("data.random_flip", True),
    "hflip": ("data.random_flip", True),
    "shuffle_caption": ("data.shuffle_tags", True),
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

CHOICE_FLAGS: dict[str, dict[str, dict[str, Any]]] = {
    "prior_generation_precision": {
        "no": {"prior.precision": "fp32"},
        "fp32": {"prior.precision": "fp32"},
        "fp16": {"prior.precision": "fp16"},
        "bf16": {"prior.precision": "bf16"},
    },
    "max_token_length": {str(75 * chunks): {"model.prompt_chunks": chunks} for chunks in (1, 2, 3)},
    "validation_scheduler": {
        "DPMSolverMultistepScheduler": {"sampling.sampler": "dpm_solver"},
        "DDPMScheduler": {"sampling.sampler": "ddpm"},
        "DDIMScheduler": {"sampling.sampler": "ddim"},
    },
    "learnable_property": {
        "object": {"textual_inversion.templates": "object"},
        "style": {"textual_inversion.templates": "style"},
    },
    "report_to": {
        "tensorboard": {"logging.tensorboard": True},
        "wandb": {"logging.wandb": True},
        "all": {"logging.tensorboard": None, "logging.wandb": None},
        "none": {"logging.tensorboard": False},
    },
}
"""Flags whose values have different names here, and the fields that each value sets."""

ALWAYS_SO = {
    "set_grads_to_none": "gradients are always freed",
    "pre_compute_text_embeddings": "text embeddings are always computed once while the text encoder is frozen",
    "cache_latents": "latents are always cached",
    "cache_latents_to_disk": "latents are always cached",
    "output_kohya_format": "a LoRA in kohya's layout always lies beside the other one in final/",
    "skip_save_text_encoder": "final/ is always a complete model",
    "save_as_full_pipeline": "final/ is the embedding, which load_textual_inversion adds to the model",
    "pad_tokens": "prompts always have the length of the model's tokenizer",
    "read_prompts_from_txts": "a text file beside a photo always replaces its prompt",
}
"""Switches for what is always done: accepted, with a remark."""

CHANGES_NOTHING = {
    "dataloader_num_workers": Harmless("batches come from the caches, without workers"),
    "log_interval": Harmless("every step is logged"),
    "save_min_steps": Harmless(
        "checkpoints are saved from the start", ("0",), "checkpoints are saved from the start; leave it out"
    ),
    "logging_dir": Harmless("TensorBoard's files are in output_dir/tensorboard"),
    "tokenizer_max_length": Harmless(
        "prompts always have the length of the model's tokenizer", ("77",), "leave it out"
    ),
    "class_labels_conditioning": Harmless(
        "a super-resolution model is told the level of the noise on the pictures that it enlarges",
        ("timesteps",),
        "a super-resolution model is told the level of the noise on the pictures that it enlarges; leave it out",
    ),
    "local_rank": Harmless("the launcher says it in LOCAL_RANK"),
    "image_interpolation_mode": Harmless(
        "photos are always resized with a Lanczos filter",
        ("lanczos",),
        "photos are always resized with a Lanczos filter",
    ),
    "image_column": Harmless("photos come from a folder", ("image",), "photos come from a folder: --instance_data_dir"),
    "optimizer": Harmless(
        "AdamW is the default", ("AdamW", "adamw", "adamW"), "for 8-bit AdamW use --use_8bit_adam; AdamW needs no flag"
    ),
    "prodigy_beta3": Harmless("only the optimizer prodigy uses it"),
    "prodigy_decouple": Harmless("only the optimizer prodigy uses it"),
    "prodigy_use_bias_correction": Harmless("only the optimizer prodigy uses it"),
    "prodigy_safeguard_warmup": Harmless("only the optimizer prodigy uses it"),
}
"""Flags with a value that changes nothing here: accepted, with a remark."""

COUNTS = {
    "num_train_epochs": "counted in optimizer steps: `training.max_train_steps`",
    "validation_epochs": "counted in optimizer steps: `sampling.every`",
    "repeats": "photos per epoch, for these two",
}
"""Flags that count passes through the photos, and what becomes of them."""

TEXTUAL_INVERSION_FLAGS = {
    "placeholder_token", "initializer_token", "learnable_property", "num_vectors", "save_steps",
    "save_as_full_pipeline", "no_safe_serialization",
}  # fmt: skip
"""Flags of the embedding of a new word: each of them enables Textual Inversion."""

LORA_FLAGS = {"rank", "lora_alpha", "lora_dropout", "use_dora"}
"""Flags of adapters: each of them enables adapters."""

REFUSED_FLAGS = {
    "tokenizer_name": "the tokenizer is the one in the model's folder: --pretrained_model_name_or_path",
    "hub_token": "log in with: hf auth login",
    "train_text_encoder_frac": "give the step instead: --stop_text_encoder_training",
    "dataset_name": "photos come from a folder: --instance_data_dir",
    "dataset_config_name": "photos come from a folder: --instance_data_dir",
    "cache_dir": "the hub's cache is where HF_HOME says; class images, latents and embeddings: cache_dir=FOLDER",
    "adam_weight_decay_text_encoder": "all components share --adam_weight_decay; leave it out",
    "caption_column": "a caption is a text file beside its photo, with the same name",
    "no_safe_serialization": "only safetensors are written, which load_textual_inversion reads too; leave it out",
    "offload_ema": "the average stays on the device; leave it out",
    "lora_layers": "choose what gets adapters: lora.targets=[attention, unet.mid_block.*]",
    "do_edm_style_training": "the noise schedule is the one in the model's folder; leave it out",
    "save_model_as": "final/ is always a folder of safetensors in diffusers' layout; leave it out",
    "full_bf16": "bf16 weights lose small updates: memory.weights=bf16_extra_bits keeps eight more bits",
    "multires_noise_iterations": "multi-resolution noise is not supported: --noise_offset",
    "masked_loss": "the loss always covers the whole image; leave it out",
    "not_cache_latents": "latents are always cached, as moments that every step samples from; leave it out",
}
"""Flags without a counterpart, and what to use instead."""
