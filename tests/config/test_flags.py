"""Commands of diffusers' README for Stable Diffusion, and the flags of its relatives.

``tests/cli/test_commands_of_diffusers.py`` has every flag of its scripts.
"""

import re
import shlex
from pathlib import Path

import pytest

from lowmem_db.config import flag_tables
from lowmem_db.config.flags import KNOWN_FLAGS, parse_arguments
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
FLAGS_OF_ITS_RELATIVES = """
  --cache_latents --text_encoder_lr=1e-6 --train_text_encoder_frac=0.5 --noise_offset=0.1 --caption_column=c --repeats=2
  --use_ema --offload_ema --optimizer=AdamW --use_dora --rank=4 --min_snr_gamma=5 --fused_backward_pass
  --stop_text_encoder_training=100 --cache_latents_to_disk --enable_bucket --save_model_as=ckpt --full_bf16
  --multires_noise_iterations=6 --zero_terminal_snr --masked_loss --debiased_estimation_loss --not_cache_latents
  --read_prompts_from_txts --lora_alpha=8 --lora_dropout=0.1 --lora_layers=to_k
  --output_kohya_format --validation_epochs=5 --do_edm_style_training --image_interpolation_mode=lanczos
  --bucket_reso_steps=64 --min_bucket_reso=256 --max_bucket_reso=1024
  --learning_rate_te1=1e-6 --learning_rate_te2=1e-6 --v_parameterization --prediction_type=epsilon --random_flip
  --pretrained_vae_model_name_or_path=v
"""
ALL_FLAGS = shlex.split(FLAGS_OF_ITS_RELATIVES)


def config_of(command: str) -> Config:
    parsed = parse_arguments(shlex.split(command))
    assert parsed.positional == []
    return load_config(None, [*parsed.defaults.items(), *parsed.overrides])


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
    assert load_config(None, [*parsed.defaults.items(), *parsed.overrides]) == config_of(COMMANDS[name])


def test_the_12_gb_command_says_that_gradients_are_always_freed() -> None:
    assert "--set_grads_to_none: gradients are always freed" in parse_arguments(shlex.split(COMMANDS["12 GB"])).notes


@pytest.mark.parametrize("argument", ALL_FLAGS)
def test_no_known_flag_falls_through(argument: str) -> None:
    name = argument.removeprefix("--").partition("=")[0]
    try:
        parsed = parse_arguments([argument])
    except ConfigError as refused:
        assert name in flag_tables.REFUSED_FLAGS
        way_out = str(refused).removeprefix(f"--{name}: is not supported; ")
        assert way_out == flag_tables.REFUSED_FLAGS[name]
    else:
        if name in flag_tables.LORA_FLAGS:
            assert parsed.overrides.pop(0) == ("lora.enabled", True)
        assert bool(parsed.overrides) + bool(parsed.notes) + bool(parsed.counts) == 1
        for path, _ in parsed.overrides:
            assert path in set(field_paths())


def test_flags_are_in_one_table_only() -> None:
    tables = [
        flag_tables.VALUE_FLAGS, flag_tables.SWITCH_FLAGS, flag_tables.CHOICE_FLAGS, flag_tables.ALWAYS_SO,
        flag_tables.CHANGES_NOTHING, flag_tables.COUNTS, flag_tables.REFUSED_FLAGS,
    ]  # fmt: skip
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "value", "field_value"),
    [
        ("prior_generation_precision", "no", "fp32"),
        ("prior_generation_precision", "fp16", "fp16"),
        ("lr_scheduler", "constant_with_warmup", "constant_with_warmup"),
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
        ("--report_to=comet_ml", "--report_to: 'comet_ml' is not supported; allowed: tensorboard, wandb, all, none"),
        ("--resume_from_checkpoint=step4", "--resume_from_checkpoint: 'step4' is not a checkpoint; allowed: latest, "),
        ("--seed=", "--seed: is empty; set a value"),
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
        parse_arguments(["--tokenizer_name", "3", "--nope", "5", "=1", "--report_to", "x", "run.yaml"])
    assert [line.partition(":")[0] for line in str(refused.value).splitlines()] == [
        "--tokenizer_name", "--nope", "=1", "--report_to",
    ]  # fmt: skip


def test_values_may_hold_equal_signs_quotes_and_dashes() -> None:
    parsed = parse_arguments(
        ["--instance_prompt=a=b", "--class_prompt", "a 'dog' - old", "--seed", "-1", "--with_prior_preservation"]
    )
    assert dict(parsed.overrides) == {
        "prior.enabled": True,
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


@pytest.mark.parametrize(
    "flag",
    [
        "pretrained_unet_model_name_or_path", "learning_rate_unet", "adam_beta3",
        "train_text_encoder_2", "use_4bit_adam", "text_encoder_2_lr", "instance_dir", "lora_bias",
        "num_prior_images", "class_images", "prior_loss", "lr_end", "epochs", "max_train_samples", "hub_private_repo",
    ],
)  # fmt: skip
def test_a_flag_of_another_meaning_is_never_proposed(flag: str) -> None:
    assert flag not in KNOWN_FLAGS
    with pytest.raises(ConfigError) as refused:
        parse_arguments([f"--{flag}=1"])
    assert "did you mean" not in str(refused.value)


@pytest.mark.parametrize("flag", sorted(KNOWN_FLAGS)[::4])
def test_a_typo_in_a_flag_is_recognised(flag: str) -> None:
    for typo in (flag.replace("_", "", 1), f"{flag}s", flag[:4] + flag[5:]):
        if typo not in KNOWN_FLAGS and len(min(typo.split("_"), key=len)) > 2 and not any(map(str.isdigit, flag)):
            with pytest.raises(ConfigError, match=r"did you mean --\w+\?"):
                parse_arguments([f"--{typo}"])


def test_flags_of_kohya_s_scripts_for_captions_and_prompts_are_understood() -> None:
    given = "--clip_skip 2 --max_token_length 225 --shuffle_caption --keep_tokens 1 --caption_tag_dropout_rate 0.1"
    parsed = parse_arguments([*given.split(), "--flip_aug", "--vae", "vae.safetensors"])
    assert dict(parsed.overrides) == {
        "model.clip_skip": "2",
        "model.prompt_chunks": 3,
        "data.shuffle_tags": True,
        "data.keep_tags": "1",
        "data.tag_dropout": "0.1",
        "data.random_flip": True,
        "model.vae": "vae.safetensors",
    }


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("\\", "is left over from a line break"),
        ("\\\n", "is left over from a line break"),
        (" ", "is left over from a line break"),
        ("`", "is left over from a line break"),
        ("", "is an empty argument"),
        ("\u2014seed=3", "begins with a dash for printing, as text processors make it; use --seed=3"),
        ("\u2013-seed=3", "use --seed=3"),
    ],
)
def test_what_pasting_leaves_is_named(argument: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as refused:
        parse_arguments(["demo", argument, "--resolution=64"])
    assert len(str(refused.value).splitlines()) == 1


def test_flag_after_a_line_break_in_one_line_is_read() -> None:
    """The shell reads ``a \\ --seed=3`` in one line as ``a`` and `` --seed=3``."""
    assert parse_arguments([" --seed=3", "\n--resolution", "64"]).overrides == [
        ("seed", "3"),
        ("data.resolution", "64"),
    ]


def test_prompt_beside_validation_images_leaves_no_default_behind() -> None:
    command = "--pretrained_model_name_or_path=x --instance_data_dir=y --validation_prompt=z --validation_images a.png"
    parsed = parse_arguments(command.split())
    assert {"sampling.every", "sampling.prompts"} & {*parsed.defaults, *dict(parsed.overrides)} == set()
