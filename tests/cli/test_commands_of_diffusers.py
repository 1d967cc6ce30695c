"""Commands for diffusers' DreamBooth scripts: every flag, the defaults, and which script a command is for."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from lowmem_db.cli.arguments import Request, read_arguments
from lowmem_db.config.flag_tables import VALUE_FLAGS
from lowmem_db.config.loading import load_config, write_yaml
from lowmem_db.config.schema import Config
from lowmem_db.errors import LowmemDbError
from tests.cli.commands_of_diffusers import ALL, DEFAULTS, DEFAULTS_OF_ALL, FLAGS, FULL, LORA, LORA_SDXL

NEEDED = {
    "pretrained_model_name_or_path": "some/model", "instance_data_dir": "photos", "instance_prompt": "a sks dog",
}  # fmt: skip
README_LORA = [
    "--pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5", "--instance_data_dir=photos",
    "--output_dir=path-to-save-model", "--instance_prompt=a photo of sks dog", "--resolution=512",
    "--train_batch_size=1", "--gradient_accumulation_steps=1", "--checkpointing_steps=100", "--learning_rate=1e-4",
    "--lr_scheduler=constant", "--lr_warmup_steps=0", "--max_train_steps=500",
    "--validation_prompt=A photo of sks dog in a bucket", "--validation_epochs=50", "--seed=0",
]  # fmt: skip
Said = Callable[[], list[str]]


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """Return what was said, in a folder with four photos, so that an epoch in batches of four is one step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    (tmp_path / "photos").mkdir()
    for index in range(4):
        (tmp_path / "photos" / f"{index}.jpg").touch()
    return lambda: capsys.readouterr().err.splitlines()


def value_of(config: Config, path: str) -> object:
    found: object = config
    for name in path.split("."):
        found = getattr(found, name)
    return str(found) if isinstance(found, Path) else found


def request(*arguments: str, **without: None) -> Request:
    needed = [f"--{name}={value}" for name, value in NEEDED.items() if name not in without]
    return read_arguments([arguments[0], *needed, *arguments[1:]] if arguments else needed)


def check_flags(case: str, table: Mapping[str, Any], request: Callable[..., Request], said: Said) -> None:
    """Give a flag of a table to each of its scripts, and compare what becomes of it with the table."""
    flag = re.split(r"\W", case)[0]
    scripts, value, others, (fate, expected) = table[case]
    for script in scripts:
        command = (script, *others, f"--{flag}{value}")
        if fate == "refused":
            with pytest.raises(LowmemDbError) as raised:
                request(*command)
            assert str(raised.value).startswith(f"--{flag}: ")
            assert str(expected) in str(raised.value)
            assert "\n" not in str(raised.value)
            continue
        asked = request(*command)
        about_it = [line for line in said() if line.startswith(f"--{flag}: ")]
        assert asked.resume is (fate == "resumes")
        if fate == "remark":
            (line,) = about_it
            assert line.startswith(f"--{flag}: {expected}")
            assert asked.config == request(script, *others).config, "the flag changes something"
        elif fate == "sets":
            assert {path: value_of(asked.config, path) for path in expected} == expected
            assert not [line for line in about_it if "no effect" in line]


@pytest.mark.parametrize("case", FLAGS)
def test_each_flag_of_each_script(case: str, said: Said) -> None:
    check_flags(case, FLAGS, request, said)


def test_the_table_holds_every_flag_of_the_scripts_in_both_spellings(said: Said) -> None:
    flags = {re.split(r"\W", case)[0] for case in FLAGS}
    assert {script: len({re.split(r"\W", c)[0] for c in FLAGS if script in FLAGS[c][0]}) for script in ALL} == {
        FULL: 61, LORA: 59, LORA_SDXL: 72,
    }  # fmt: skip
    hyphens = [f"--{flag.replace('_', '-')}" for flag in flags if flag in VALUE_FLAGS and flag in NEEDED]
    assert read_arguments([word for flag in hyphens for word in (flag, "photos")]).config.model.base == "photos"


@pytest.mark.parametrize("script", ALL)
def test_defaults_are_those_of_the_script(script: str, said: Said) -> None:
    config = request(script, "--validation_prompt=a sks dog").config
    expected = DEFAULTS_OF_ALL | DEFAULTS[script]
    assert {path: value_of(config, path) for path in expected} == expected
    first, *others = said()
    assert first.startswith(f"defaults are those of diffusers' {script} (")
    assert first.endswith("; different here: seed=0, so that a run can be repeated, the plan chooses types and "
                          "checkpointing that fit the card")  # fmt: skip
    assert "default of --num_train_epochs=1: training.max_train_steps=1 (1 optimizer steps per epoch)" in others


def test_what_is_better_here_is_named_unless_it_is_set(said: Said) -> None:
    request(FULL, "--seed=1", "--with_prior_preservation", "--class_prompt=a dog", "--mixed_precision=no")
    assert said()[0].endswith("; different here: prior.sampler=ddpm, the paper's")
    request(FULL, "--seed=1", "--mixed_precision=no")
    assert "different here" not in said()[0]


@pytest.mark.parametrize(
    "scheduler", ["constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
def test_warm_up_takes_500_steps_unless_the_rate_is_constant(scheduler: str, said: Said) -> None:
    training = request(FULL, f"--lr_scheduler={scheduler}", "--max_train_steps=400").config.training
    assert (training.lr_warmup_steps, training.lr_warmup_from_zero) == (500, True)
    assert request(FULL, f"--lr_scheduler={scheduler}", "--lr_warmup_steps=0").config.training.lr_warmup_steps == 0


def test_epochs_count_class_images_if_they_are_more(said: Said) -> None:
    prior = ("--with_prior_preservation", "--class_prompt=a dog", "--num_class_images=50", "--num_train_epochs=3")
    config = request(FULL, *prior, "--gradient_accumulation_steps=2").config
    assert config.training.max_train_steps == 3 * 7  # 13 batches of 4, two per step
    assert request(FULL, *prior, "--max_train_steps=5").config.training.max_train_steps == 5
    assert "--num_train_epochs: no effect with --max_train_steps" in said()


def test_a_plan_needs_no_photos(said: Said) -> None:
    command = [FULL, "--pretrained_model_name_or_path=m", "--instance_data_dir=nowhere", "--instance_prompt=p"]
    with pytest.raises(LowmemDbError, match=r"^subject\.instance_dir: nowhere does not exist"):
        read_arguments(command)
    config = read_arguments(command, needs_photos=False).config
    assert config.training.max_train_steps == 800
    assert said()[-1].startswith("epochs are not counted: subject.instance_dir: nowhere does not exist")


@pytest.mark.parametrize("epochs", ["0", "-1", "1.5", "x", ""])
def test_epochs_that_are_no_number_are_refused(epochs: str, said: Said) -> None:
    with pytest.raises(LowmemDbError, match=r"^--num_train_epochs: "):
        request(FULL, f"--num_train_epochs={epochs}")


@pytest.mark.parametrize(
    "start",
    [
        ["train_dreambooth_lora.py"],
        ["examples/dreambooth/train_dreambooth_lora.py"],
        [r"C:\diffusers\examples\train_dreambooth_lora.py"],
        ["accelerate", "launch", "train_dreambooth_lora.py"],
        ["accelerate", "launch", "--mixed_precision=fp16", "--num_processes", "1", "train_dreambooth_lora.py"],
        ["python3", "train_dreambooth_lora.py"],
    ],
)
def test_pasted_command_for_a_lora_trains_a_lora(start: list[str], said: Said) -> None:
    config = read_arguments([*start, *README_LORA]).config
    assert (config.lora.enabled, config.lora.rank, config.training.learning_rate) == (True, 4, 1e-4)
    assert config.training.mixed_precision == ("fp16" if len(start) == 6 else None)
    assert "accelerate launch --num_processes: have no effect here" in said() or len(start) != 6


def test_flag_of_the_lora_scripts_asks_for_adapters(said: Said) -> None:
    """Their README gives no ``--rank``."""
    config = read_arguments(README_LORA).config
    assert (config.lora.enabled, config.lora.rank) == (True, 4)
    assert said()[0].startswith("defaults are those of diffusers' train_dreambooth_lora.py (a LoRA trains; for all ")
    of_all_weights = read_arguments([*README_LORA, "lora.enabled=false"]).config
    assert (of_all_weights.lora.enabled, of_all_weights.final.layout) == (False, "flat")


@pytest.mark.parametrize(
    ("flags", "base"), [(["--rank=4"], "stabilityai/stable-diffusion-xl-base-1.0"), (["--rank=4", "--use_dora"], "m")]
)
def test_lora_of_sdxl_gets_the_defaults_of_its_script(flags: list[str], base: str, said: Said) -> None:
    config = read_arguments(
        [*flags, f"--pretrained_model_name_or_path={base}", "--instance_data_dir=photos", "--instance_prompt=a sks dog"]
    ).config
    assert (config.data.resolution, config.training.learning_rate, config.lora.rank) == (1024, 1e-4, 4)


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--learning_rate=1e-4"], "--learning_rate: 1e-4 is usual for a LoRA"),
        (["--learning_rate=0.0005"], "--learning_rate: 0.0005 is usual for a LoRA"),
        (["--output_dir=runs/dog-LoRA"], "--output_dir: 'dog-LoRA' sounds like a LoRA"),
    ],
)
def test_command_that_may_be_for_a_lora_is_asked_about(flags: list[str], field: str, said: Said) -> None:
    with pytest.raises(LowmemDbError) as asked:
        request(*flags)
    assert str(asked.value).startswith(field)
    assert "--rank=4" in str(asked.value)
    assert "lora.enabled=false" in str(asked.value)
    assert request(*flags, "--rank=4").config.lora.enabled
    assert not request(*flags, "lora.enabled=false").config.lora.enabled
    assert not request(FULL, *flags).config.lora.enabled


def test_full_fine_tuning_says_that_all_weights_train(said: Said) -> None:
    assert not request("--learning_rate=5e-6", "--max_train_steps=400").config.lora.enabled
    assert said()[0].startswith("defaults are those of diffusers' train_dreambooth.py (all weights train; for a LoRA ")


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (["train_dreambooth_flux.py"], "train_dreambooth_flux.py: is not a script whose commands are known; allowed: "),
        (["textual_inversion_flax.py"], "textual_inversion_flax.py: is not a script whose commands are known; "),
        (
            ["accelerate", "launch", "--multi_gpu", "train_dreambooth.py"],
            "--multi_gpu: the launcher has to start lowmem-db itself",
        ),
        (["accelerate", "launch", "--num_processes=2", "train_dreambooth.py"], "--num_processes: the launcher has to "),
        (["accelerate", "launch"], "accelerate: is followed by no script; allowed: train_dreambooth.py, "),
    ],
)
def test_command_for_something_else_is_refused(start: list[str], message: str, said: Said) -> None:
    with pytest.raises(LowmemDbError) as refused:
        read_arguments([*start, "--instance_prompt=p"])
    assert str(refused.value).startswith(message)


def test_flag_whose_shell_variable_is_not_set_is_refused(said: Said) -> None:
    with pytest.raises(LowmemDbError, match=r"^--instance_data_dir: is empty; .*shell variable"):
        request(FULL, "--instance_data_dir=")


def test_a_resumed_run_keeps_its_own_values_where_the_command_gives_none(said: Said, tmp_path: Path) -> None:
    """Runs of older versions had other defaults."""
    fields = {
        "model.base": "some/model", "subject.instance_dir": "photos", "subject.instance_prompt": "a sks dog",
        "output_dir": "run", "prior.enabled": False, "training.max_train_steps": 7, "checkpointing.keep": 2,
        "training.lr_scheduler": "linear", "training.lr_warmup_steps": 2,
    }  # fmt: skip
    old = load_config(None, list(fields.items()))
    (tmp_path / "run").mkdir()
    write_yaml(old, tmp_path / "run" / "config.yaml")
    command = ("--output_dir=run", "--lr_scheduler=linear", "--lr_warmup_steps=2", "--max_train_steps=7")
    assert request(*command, "--resume").config == old
    assert (
        read_arguments([f"--{name}={value}" for name, value in NEEDED.items()] + list(command), resume=True).config
        == old
    )
    assert request(*command, "--resume_from_checkpoint=latest").config == old
    assert request(*command).config.training.train_batch_size == 4
