"""Every flag of diffusers' three DreamBooth scripts for Stable Diffusion, and what becomes of it here, as data.

Read off the scripts at diffusers 58eb52c0: names and defaults, no code.
"""

FULL, LORA, LORA_SDXL = "train_dreambooth.py", "train_dreambooth_lora.py", "train_dreambooth_lora_sdxl.py"
ALL = (FULL, LORA, LORA_SDXL)


def sets(**fields: object) -> tuple[str, dict[str, object]]:
    """The flag sets fields; a double underscore stands for a dot."""
    return "sets", {name.replace("__", "."): value for name, value in fields.items()}


def remark(text: str) -> tuple[str, str]:
    """The flag is accepted and changes nothing; the remark that says so begins like this."""
    return "remark", text


def refused(text: str) -> tuple[str, str]:
    """The flag is refused; the message holds this."""
    return "refused", text


PRIOR = ("--with_prior_preservation", "--class_prompt=a dog")
PROMPT = ("--validation_prompt=a sks dog",)
TEXT_ENCODER = ("--train_text_encoder",)
FLAGS = {
    "pretrained_model_name_or_path": (ALL, "=m", (), sets(model__base="m")),
    "revision": (ALL, "=main", (), sets(model__revision="main")),
    "variant": (ALL, "=fp16", (), sets(model__variant="fp16")),
    "tokenizer_name": ((FULL, LORA), "=t", (), refused("the tokenizer is the one in the model's folder")),
    "instance_data_dir": (ALL, "=photos", (), sets(subject__instance_dir="photos")),
    "class_data_dir": (ALL, "=classes", PRIOR, sets(prior__class_dir="classes")),
    "class_data_dir without a prior": (ALL, "=c", (), remark("no effect without --with_prior_preservation")),
    "instance_prompt": (ALL, "=a sks cat", (), sets(subject__instance_prompt="a sks cat")),
    "class_prompt": (ALL, "=a cat", ("--with_prior_preservation",), sets(subject__class_prompt="a cat")),
    "class_prompt without a prior": (ALL, "=a cat", (), remark("no effect without --with_prior_preservation")),
    "with_prior_preservation": (ALL, "", ("--class_prompt=a dog",), sets(prior__enabled=True)),
    "prior_loss_weight": (ALL, "=0.5", PRIOR, sets(prior__loss_weight=0.5)),
    "prior_loss_weight without a prior": (ALL, "=1.0", (), remark("no effect without --with_prior_preservation")),
    "num_class_images": (ALL, "=50", PRIOR, sets(prior__num_class_images=50)),
    "sample_batch_size": (ALL, "=2", PRIOR, sets(prior__sample_batch_size=2)),
    "prior_generation_precision": (ALL, "=no", PRIOR, sets(prior__precision="fp32")),
    "output_dir": (ALL, "=out", (), sets(output_dir="out")),
    "seed": (ALL, "=7", (), sets(seed=7)),
    "resolution": (ALL, "=768", (), sets(data__resolution=768)),
    "center_crop": (ALL, "", (), sets(data__crop="center")),
    "train_text_encoder": (ALL, "", (), sets(training__train_text_encoder=True)),
    "train_batch_size": (ALL, "=2", (), sets(training__train_batch_size=2)),
    "num_train_epochs": (ALL, "=9", (), sets(training__max_train_steps=9)),
    "max_train_steps": (ALL, "=400", (), sets(training__max_train_steps=400)),
    "checkpointing_steps": (ALL, "=100", (), sets(checkpointing__every=100)),
    "checkpoints_total_limit": (ALL, "=3", (), sets(checkpointing__keep=3)),
    "resume_from_checkpoint": (ALL, "=latest", (), ("resumes", None)),
    "gradient_accumulation_steps": (ALL, "=2", (), sets(training__gradient_accumulation_steps=2)),
    "gradient_checkpointing": (ALL, "", (), sets(memory__checkpointing="layers")),
    "learning_rate": (ALL, "=2e-6", (), sets(training__learning_rate=2e-6)),
    "scale_lr": (ALL, "", (), sets(training__scale_learning_rate=True)),
    "lr_scheduler": (ALL, "=cosine_with_restarts", (), sets(training__lr_scheduler="cosine_with_restarts")),
    "lr_warmup_steps": (ALL, "=3", ("--lr_scheduler=linear",), sets(training__lr_warmup_steps=3)),
    "lr_warmup_steps with constant": (
        ALL, "=500", (), remark("no effect without --lr_scheduler=constant_with_warmup"),
    ),
    "lr_num_cycles": (ALL, "=3", ("--lr_scheduler=cosine_with_restarts",), sets(training__lr_num_cycles=3)),
    "lr_num_cycles with constant": (ALL, "=1", (), remark("no effect without --lr_scheduler=cosine_with_restarts")),
    "lr_power": (ALL, "=2.0", ("--lr_scheduler=polynomial",), sets(training__lr_power=2.0)),
    "lr_power with constant": (ALL, "=1.0", (), remark("no effect without --lr_scheduler=polynomial")),
    "use_8bit_adam": (ALL, "", (), sets(optimizer__name="adamw8bit")),
    "dataloader_num_workers": (ALL, "=0", (), remark("no effect; batches come from the caches")),
    "adam_beta1": (ALL, "=0.8", (), sets(optimizer__beta1=0.8)),
    "adam_beta2": (ALL, "=0.99", (), sets(optimizer__beta2=0.99)),
    "adam_weight_decay": (ALL, "=0.1", (), sets(optimizer__weight_decay=0.1)),
    "adam_epsilon": (ALL, "=1e-6", (), sets(optimizer__epsilon=1e-6)),
    "max_grad_norm": (ALL, "=0.5", (), sets(training__max_grad_norm=0.5)),
    "push_to_hub": (ALL, "", (), sets(final__push_to_hub=True)),
    "hub_token": (ALL, "=t", (), refused("hf auth login")),
    "hub_model_id": (ALL, "=me/dog", ("--push_to_hub",), sets(final__hub_model_id="me/dog")),
    "hub_model_id without a push": (ALL, "=me/dog", (), remark("no effect without --push_to_hub")),
    "logging_dir": (ALL, "=logs", (), remark("no effect; TensorBoard's files are in output_dir/tensorboard")),
    "allow_tf32": (ALL, "", (), sets(training__allow_tf32=True)),
    "report_to": (ALL, "=tensorboard", (), sets(logging__tensorboard=True)),
    "report_to, the usual one": (ALL, "=wandb", (), sets(logging__wandb=True)),
    "report_to, all there are": (ALL, "=all", (), sets(logging__tensorboard=None, logging__wandb=None)),
    "report_to, another one": (ALL, "=comet_ml", (), refused("allowed: tensorboard, wandb, all, none")),
    "validation_prompt": (ALL, "=a sks dog", (), sets(sampling__prompts=("a sks dog",))),
    "num_validation_images": (ALL, "=2", PROMPT, sets(sampling__num_images=2)),
    "num_validation_images without a prompt": (ALL, "=4", (), remark("no effect without --validation_prompt")),
    "validation_steps": ((FULL,), "=50", PROMPT, sets(sampling__every=50)),
    "validation_steps without a prompt": ((FULL,), "=100", (), remark("no effect without --validation_prompt")),
    "mixed_precision": (ALL, "=bf16", (), sets(training__mixed_precision="bf16")),
    "local_rank": (ALL, "=-1", (), remark("no effect; the launcher says it in LOCAL_RANK")),
    "local_rank of a second process": (ALL, "=1", (), remark("no effect; the launcher says it in LOCAL_RANK")),
    "enable_xformers_memory_efficient_attention": (ALL, "", (), sets(memory__attention="xformers")),
    "set_grads_to_none": ((FULL,), "", (), remark("gradients are always freed")),
    "offset_noise": ((FULL,), "", (), sets(objective__noise_offset=0.1)),
    "snr_gamma": ((FULL, LORA_SDXL), "=5", (), sets(objective__snr_gamma=5.0)),
    "pre_compute_text_embeddings": ((FULL, LORA), "", (), remark("text embeddings are always computed once")),
    "tokenizer_max_length": ((FULL, LORA), "=77", (), remark("no effect; prompts always have the length")),
    "tokenizer_max_length of another model": ((FULL, LORA), "=256", (), refused("'256' is not supported")),
    "text_encoder_use_attention_mask": ((FULL, LORA), "", (), sets(model__attention_mask=True)),
    "skip_save_text_encoder": ((FULL,), "", (), remark("final/ is always a complete model")),
    "validation_images": ((FULL, LORA), "=a.png", (), remark("no effect, nor has --validation_prompt")),
    "class_labels_conditioning": ((FULL, LORA), "=timesteps", (), remark("no effect; a super-resolution model is")),
    "class_labels_conditioning of another kind": ((FULL, LORA), "=text", (), refused("the level of the noise")),
    "validation_scheduler": ((FULL,), "=DDPMScheduler", PROMPT, sets(sampling__sampler="ddpm")),
    "validation_epochs": ((LORA, LORA_SDXL), "=25", PROMPT, sets(sampling__every=25)),
    "validation_epochs without a prompt": ((LORA, LORA_SDXL), "=50", (), remark("no effect without --validation_pr")),
    "rank": ((LORA, LORA_SDXL), "=8", (), sets(lora__rank=8)),
    "lora_dropout": ((LORA, LORA_SDXL), "=0.1", (), sets(lora__dropout=0.1)),
    "image_interpolation_mode": ((LORA, LORA_SDXL), "=lanczos", (), remark("no effect; photos are always resized")),
    "image_interpolation_mode, another one": ((LORA, LORA_SDXL), "=nearest", (), refused("a Lanczos filter")),
    "pretrained_vae_model_name_or_path": ((LORA_SDXL,), "=v", (), sets(model__vae="v")),
    "dataset_name": ((LORA_SDXL,), "=d", (), refused("--instance_data_dir")),
    "dataset_config_name": ((LORA_SDXL,), "=d", (), refused("--instance_data_dir")),
    "cache_dir": ((LORA_SDXL,), "=c", (), refused("HF_HOME")),
    "image_column": ((LORA_SDXL,), "=image", (), remark("no effect; photos come from a folder")),
    "caption_column": ((LORA_SDXL,), "=text", (), refused("a text file beside its photo")),
    "repeats": ((LORA_SDXL,), "=2", ("--num_train_epochs=9",), sets(training__max_train_steps=18)),
    "repeats without epochs": ((LORA_SDXL,), "=2", ("--max_train_steps=5",), remark("no effect; photos are repeated")),
    "do_edm_style_training": ((LORA_SDXL,), "", (), refused("the noise schedule is the one in the model's folder")),
    "output_kohya_format": ((LORA_SDXL,), "", (), remark("a LoRA in kohya's layout always lies beside the other one")),
    "random_flip": ((LORA_SDXL,), "", (), sets(data__random_flip=True)),
    "text_encoder_lr": ((LORA_SDXL,), "=1e-6", TEXT_ENCODER, sets(training__learning_rate_text_encoder=1e-6)),
    "text_encoder_lr of a frozen one": ((LORA_SDXL,), "=5e-6", (), remark("no effect without --train_text_encoder")),
    "optimizer": ((LORA_SDXL,), "=AdamW", (), remark("no effect; AdamW is the default")),
    "optimizer, another one": ((LORA_SDXL,), "=prodigy", (), refused("'prodigy' is not supported")),
    "prodigy_beta3": ((LORA_SDXL,), "=0.9", (), remark("no effect; only the optimizer prodigy uses it")),
    "prodigy_decouple": ((LORA_SDXL,), "=True", (), remark("no effect; only the optimizer prodigy uses it")),
    "adam_weight_decay_text_encoder": ((LORA_SDXL,), "=1e-3", (), refused("all components share --adam_weight_decay")),
    "prodigy_use_bias_correction": ((LORA_SDXL,), "=True", (), remark("no effect; only the optimizer prodigy uses it")),
    "prodigy_safeguard_warmup": ((LORA_SDXL,), "=True", (), remark("no effect; only the optimizer prodigy uses it")),
    "use_dora": ((LORA_SDXL,), "", (), sets(lora__dora=True)),
}  # fmt: skip
"""By flag, and a word on the case: the scripts that have it, its value, what else stands in the command, its fate."""

DEFAULTS = {
    FULL: {
        "output_dir": "dreambooth-model", "training.learning_rate": 5e-6, "data.resolution": 512,
        "optimizer.weight_decay": 1e-2, "lora.enabled": False, "sampling.every": 100,
    },
    LORA: {
        "output_dir": "lora-dreambooth-model", "training.learning_rate": 5e-4, "data.resolution": 512,
        "optimizer.weight_decay": 1e-2, "lora.enabled": True, "lora.rank": 4, "sampling.every": 50,
    },
    LORA_SDXL: {
        "output_dir": "lora-dreambooth-model", "training.learning_rate": 1e-4, "data.resolution": 1024,
        "optimizer.weight_decay": 1e-4, "lora.enabled": True, "lora.rank": 4, "sampling.every": 50,
    },
}  # fmt: skip
"""Defaults that differ between the scripts; one epoch of three photos is one step."""
DEFAULTS_OF_ALL = {
    "prior.enabled": False, "prior.loss_weight": 1.0, "prior.num_class_images": 100, "prior.sample_batch_size": 4,
    "data.crop": "random", "training.train_text_encoder": False, "training.train_batch_size": 4,
    "training.max_train_steps": 1, "checkpointing.every": 500, "checkpointing.keep": None,
    "training.gradient_accumulation_steps": 1, "training.scale_learning_rate": False,
    "training.lr_scheduler": "constant", "training.lr_num_cycles": 1, "training.lr_power": 1.0,
    "training.lr_warmup_steps": 0, "optimizer.name": "adamw", "optimizer.beta1": 0.9, "optimizer.beta2": 0.999,
    "optimizer.epsilon": 1e-8, "training.max_grad_norm": 1.0, "final.push_to_hub": False, "final.hub_model_id": None,
    "training.allow_tf32": False, "sampling.num_images": 4, "sampling.sampler": "dpm_solver",
    "objective.noise_offset": 0.0, "objective.snr_gamma": None, "lora.dropout": 0.0, "lora.dora": False,
    "training.lr_warmup_from_zero": True, "final.layout": "flat",
}  # fmt: skip
