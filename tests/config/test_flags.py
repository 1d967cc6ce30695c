"""The flags of diffusers' ``train_dreambooth.py``, and the commands of its README for Stable Diffusion."""

import shlex
from pathlib import Path

import pytest

from lowmem_db.config import flags
from lowmem_db.config.flags import parse_arguments
from lowmem_db.config.loading import field_paths, load_config
from lowmem_db.config.schema import Config
from lowmem_db.errors import ConfigError

PLAIN = """
  --pretrained_model_name_or_path=CompVis/stable-diffusion-v1-4
  --instance_data_dir=path-to-instance-images
  --output_dir=path-to-save-model
  --instance_prompt="a photo of sks dog"
  --resolution=512
  --train_batch_size=1
  --lr_scheduler="constant"
  --lr_warmup_steps=0
"""
PRIOR = """
  --class_data_dir=path-to-class-images
  --with_prior_preservation --prior_loss_weight=1.0
  --class_prompt="a photo of dog"
  --num_class_images=200
  --max_train_steps=800
"""
TEXTUAL_INVERSION = """
  --pretrained_model_name_or_path=CompVis/stable-diffusion-v1-4
  --train_data_dir=cat
  --learnable_property="object"
  --placeholder_token="<cat-toy>" --initializer_token="toy"
  --resolution=512
  --train_batch_size=1
  --gradient_accumulation_steps=4
  --max_train_steps=3000
  --learning_rate=5.0e-04 --scale_lr
  --lr_scheduler="constant"
  --lr_warmup_steps=0
  --push_to_hub
  --output_dir="textual_inversion_cat"
"""
COMMANDS = {
    "basic": PLAIN + "--gradient_accumulation_steps=1 --learning_rate=5e-6 --max_train_steps=400",
    "prior preservation": PLAIN + PRIOR + "--gradient_accumulation_steps=1 --learning_rate=5e-6",
    "16 GB": PLAIN
    + PRIOR
    + "--gradient_accumulation_steps=2 --gradient_checkpointing --use_8bit_adam --learning_rate=5e-6",
    "12 GB": PLAIN
    + PRIOR
    + "--gradient_accumulation_steps=1 --gradient_checkpointing --use_8bit_adam"
    + " --enable_xformers_memory_efficient_attention --set_grads_to_none --learning_rate=2e-6",
    "8 GB": PLAIN
    + PRIOR
    + "--sample_batch_size=1 --gradient_accumulation_steps=1 --gradient_checkpointing --learning_rate=5e-6"
    + " --mixed_precision=fp16",
    "text encoder": PLAIN
    + PRIOR
    + "--train_text_encoder --use_8bit_adam --gradient_checkpointing --learning_rate=2e-6 --push_to_hub",
}
WHAT_THEY_SET = {
    "basic": {"prior.enabled": False, "training.max_train_steps": 400, "optimizer.name": "adamw"},
    "prior preservation": {
        "prior.enabled": True,
        "prior.class_dir": Path("path-to-class-images"),
        "prior.loss_weight": 1.0,
        "prior.num_class_images": 200,
        "subject.class_prompt": "a photo of dog",
        "training.max_train_steps": 800,
    },
    "16 GB": {
        "memory.checkpointing": "layers",
        "optimizer.name": "adamw8bit",
        "training.gradient_accumulation_steps": 2,
    },
    "12 GB": {
        "memory.attention": "xformers",
        "memory.checkpointing": "layers",
        "optimizer.name": "adamw8bit",
        "training.gradient_accumulation_steps": 1,
        "training.learning_rate": 2e-6,
    },
    "8 GB": {"prior.sample_batch_size": 1, "training.mixed_precision": "fp16"},
    "text encoder": {
        "training.train_text_encoder": True,
        "training.learning_rate": 2e-6,
        "final.push_to_hub": True,
        "memory.checkpointing": "layers",
    },
}
IN_ALL = {
    "model.base": "CompVis/stable-diffusion-v1-4",
    "subject.instance_dir": Path("path-to-instance-images"),
    "subject.instance_prompt": "a photo of sks dog",
    "output_dir": Path("path-to-save-model"),
    "data.resolution": 512,
    "training.train_batch_size": 1,
    "training.lr_scheduler": "constant",
    "training.lr_warmup_steps": 0,
}
# Every flag of the script, with a value where it takes one.
FLAGS_OF_THE_SCRIPT = """
  --pretrained_model_name_or_path=m --revision=main --variant=fp16 --tokenizer_name=t --instance_data_dir=i
  --class_data_dir=c --instance_prompt=p --class_prompt=p --with_prior_preservation --prior_loss_weight=1.0
  --num_class_images=100 --sample_batch_size=4 --prior_generation_precision=no --output_dir=o --seed=1 --resolution=512
  --center_crop --train_text_encoder --train_batch_size=4 --num_train_epochs=1 --max_train_steps=5
  --gradient_accumulation_steps=1 --gradient_checkpointing --learning_rate=5e-6 --scale_lr --lr_scheduler=constant
  --lr_warmup_steps=500 --lr_num_cycles=1 --lr_power=1.0 --use_8bit_adam --adam_beta1=0.9 --adam_beta2=0.999
  --adam_weight_decay=1e-2 --adam_epsilon=1e-8 --max_grad_norm=1.0 --set_grads_to_none --mixed_precision=no
  --allow_tf32 --enable_xformers_memory_efficient_attention --offset_noise --snr_gamma=5 --pre_compute_text_embeddings
  --tokenizer_max_length=77 --text_encoder_use_attention_mask --skip_save_text_encoder --checkpointing_steps=500
  --checkpoints_total_limit=2 --resume_from_checkpoint=latest --validation_prompt=p --num_validation_images=4
  --validation_steps=100 --validation_scheduler=DPMSolverMultistepScheduler --validation_images=v
  --report_to=tensorboard --logging_dir=logs --dataloader_num_workers=0 --push_to_hub --hub_token=t --hub_model_id=h
  --class_labels_conditioning=timesteps --local_rank=0
"""
FLAGS_OF_ITS_RELATIVES = """
  --cache_latents --text_encoder_lr=1e-6 --train_text_encoder_frac=0.5 --noise_offset=0.1 --caption_column=c --repeats=2
  --use_ema --offload_ema --optimizer=prodigy --use_dora --rank=4 --min_snr_gamma=5 --fused_backward_pass
  --stop_text_encoder_training=100 --cache_latents_to_disk --enable_bucket --save_model_as=ckpt --full_bf16
  --multires_noise_iterations=6 --zero_terminal_snr --masked_loss --debiased_estimation_loss --not_cache_latents
  --concepts_list=c.json --read_prompts_from_txts --lora_alpha=8 --lora_dropout=0.1 --lora_layers=to_k
  --output_kohya_format --validation_epochs=5 --do_edm_style_training --image_interpolation_mode=lanczos
  --bucket_reso_steps=64 --min_bucket_reso=256 --max_bucket_reso=1024
  --learning_rate_te1=1e-6 --learning_rate_te2=1e-6 --v_parameterization
  --train_data_dir=d --placeholder_token=t --initializer_token=d --num_vectors=1 --learnable_property=style
  --save_steps=500 --save_as_full_pipeline
"""
ALL_FLAGS = shlex.split(FLAGS_OF_THE_SCRIPT + FLAGS_OF_ITS_RELATIVES)


def config_of(command: str) -> Config:
    parsed = parse_arguments(shlex.split(command))
    assert parsed.positional == []
    return load_config(None, parsed.overrides)


def value_of(config: Config, path: str) -> object:
    found: object = config
    for name in path.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_command_of_the_readme_runs_as_it_is(name: str) -> None:
    config = config_of(COMMANDS[name])
    expected = IN_ALL | WHAT_THEY_SET[name]
    assert {path: value_of(config, path) for path in expected} == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_hyphens_and_separate_values_mean_the_same(name: str) -> None:
    arguments = []
    for argument in shlex.split(COMMANDS[name]):
        flag, separator, value = argument.partition("=")
        arguments += [flag.replace("_", "-"), value] if separator else [flag.replace("_", "-")]
    parsed = parse_arguments(arguments)
    assert load_config(None, parsed.overrides) == config_of(COMMANDS[name])


def test_the_12_gb_command_says_that_gradients_are_always_freed() -> None:
    assert parse_arguments(shlex.split(COMMANDS["12 GB"])).notes == ["--set_grads_to_none: gradients are always freed"]


@pytest.mark.parametrize("argument", ALL_FLAGS)
def test_no_known_flag_falls_through(argument: str) -> None:
    name = argument.removeprefix("--").partition("=")[0]
    try:
        parsed = parse_arguments([argument])
    except ConfigError as refused:
        assert name in flags.REFUSED_FLAGS
        way_out = str(refused).removeprefix(f"--{name}: is not supported; ")
        assert way_out == flags.REFUSED_FLAGS[name]
    else:
        if name in flags.LORA_FLAGS:
            assert parsed.overrides.pop(0) == ("lora.enabled", True)
        assert bool(parsed.overrides) + bool(parsed.notes) + parsed.resume == 1
        for path, _ in parsed.overrides:
            assert path in set(field_paths())


def test_the_list_of_flags_is_whole() -> None:
    named = {argument.removeprefix("--").partition("=")[0] for argument in ALL_FLAGS}
    tables = {
        *flags.VALUE_FLAGS, *flags.SWITCH_FLAGS, *flags.CHOICE_FLAGS, *flags.ALWAYS_SO, *flags.REFUSED_FLAGS,
        "validation_prompt", "resume_from_checkpoint",
    }  # fmt: skip
    assert named == tables


def test_flags_are_in_one_table_only() -> None:
    tables = [flags.VALUE_FLAGS, flags.SWITCH_FLAGS, flags.CHOICE_FLAGS, flags.ALWAYS_SO, flags.REFUSED_FLAGS]
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "value", "field_value"),
    [
        ("prior_generation_precision", "no", "fp32"),
        ("prior_generation_precision", "fp16", "fp16"),
        ("lr_scheduler", "constant_with_warmup", "constant"),
        ("validation_scheduler", "DDPMScheduler", "ddpm"),
        ("report_to", "none", False),
    ],
)
def test_value_that_is_called_otherwise_here(name: str, value: str, field_value: object) -> None:
    ((_, found),) = parse_arguments([f"--{name}={value}"]).overrides
    assert found == field_value


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--lr_scheduler=polynomial", "--lr_scheduler: 'polynomial' is not supported; allowed: constant, "),
        ("--report_to=wandb", "--report_to: 'wandb' is not supported; allowed: tensorboard, none"),
        ("--resume_from_checkpoint=checkpoint-500", "--resume_from_checkpoint: 'checkpoint-500' is not supported; "),
        ("--learnin_rate=1", "--learnin_rate: unknown flag; did you mean --learning_rate?"),
        ("--xyzzy", "--xyzzy: unknown flag; a field without a flag is set as section.key=value"),
        ("--learning_rate", "--learning_rate: needs a value: --learning_rate=VALUE"),
        ("--train_text_encoder=false", "--train_text_encoder: takes no value, but 'false' was given; "),
        ("--set_grads_to_none=0", "--set_grads_to_none: takes no value, but '0' was given; "),
        ("--resume=yes", "--resume: takes no value, but 'yes' was given; "),
    ],
)
def test_flag_that_cannot_be_understood_says_what_to_use(argument: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_arguments([argument])
    assert str(refused.value).startswith(message)


def test_flag_without_its_value_does_not_eat_the_next_flag() -> None:
    with pytest.raises(ConfigError, match="--seed: needs a value"):
        parse_arguments(["--seed", "--center_crop"])


def test_every_argument_that_cannot_be_understood_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        parse_arguments(["--num_train_epochs", "3", "--nope", "5", "=1", "--report_to", "wandb", "run.yaml"])
    assert [line.partition(":")[0] for line in str(refused.value).splitlines()] == [
        "--num_train_epochs", "--nope", "=1", "--report_to",
    ]  # fmt: skip


def test_values_may_hold_equal_signs_quotes_and_dashes() -> None:
    parsed = parse_arguments(["--instance_prompt=a=b", "--class_prompt", "a 'dog' - old", "--seed", "-1"])
    assert dict(parsed.overrides) == {
        "subject.instance_prompt": "a=b",
        "subject.class_prompt": "a 'dog' - old",
        "seed": "-1",
    }


def test_flag_of_the_lora_script_asks_for_adapters() -> None:
    lora = config_of(COMMANDS["basic"] + " --rank=4 --lora_alpha=8 --lora_dropout=0.1 --use_dora").lora
    assert (lora.enabled, lora.rank, lora.alpha, lora.dropout, lora.dora) == (True, 4, 8.0, 0.1, True)
    assert not config_of(COMMANDS["basic"]).lora.enabled


def test_a_configuration_file_keeps_its_own_prior_preservation() -> None:
    parsed = parse_arguments(["run.yaml", "--pretrained_model_name_or_path=m", "training.learning_rate=1e-6"])
    assert parsed.positional == ["run.yaml"]
    assert parsed.overrides == [("model.base", "m"), ("training.learning_rate", "1e-6")]


def test_command_of_textual_inversion() -> None:
    """It stands in the README of diffusers' examples/textual_inversion."""
    parsed = parse_arguments(shlex.split(TEXTUAL_INVERSION))
    config = load_config(None, parsed.overrides)
    expected = {
        "textual_inversion.enabled": True,
        "textual_inversion.token": "<cat-toy>",
        "textual_inversion.initializer": "toy",
        "textual_inversion.templates": "object",
        "textual_inversion.learning_rate": 5e-4,
        "subject.instance_prompt": "a photo of a <cat-toy>",
        "training.scale_learning_rate": True,
        "prior.enabled": False,
    }
    for path, value in expected.items():
        assert value_of(config, path) == value, path
    with_prompt = parse_arguments([*shlex.split(TEXTUAL_INVERSION), "--instance_prompt=the <cat-toy>"])
    assert load_config(None, with_prompt.overrides).subject.instance_prompt == "the <cat-toy>"
