"""What all commands have in common: help, exit codes, what goes to which stream."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lowmem_db
from lowmem_db import nvidia
from lowmem_db.cli import main as main_module
from lowmem_db.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DependencyError,
    ModelError,
    NonFiniteError,
    RunInterrupted,
    StorageError,
)
from tests.cli.conftest import Outcome, Run
from tests.evaluation.conftest import PHOTOGRAPHS
from tests.faults import ERRORS

COMMANDS = (
    "new",
    "train",
    "plan",
    "publish",
    "prepare",
    "generate",
    "evaluate",
    "export",
    "gallery",
    "identifiers",
    "doctor",
    "bench",
    "configs",
)
HEAVY = ("torch", "diffusers", "transformers", "numpy", "PIL")


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_every_command_has_help_on_standard_output(run: Run, command: str | None) -> None:
    outcome = run(*[command] if command else [], "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert "Usage" in outcome.out
    for name in COMMANDS if command is None else ():
        assert name in outcome.out


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_h_is_help(run: Run, command: str | None) -> None:
    arguments = [command] if command else []
    assert run(*arguments, "-h") == run(*arguments, "--help")


def test_version_is_the_one_of_the_package(run: Run) -> None:
    assert run("--version") == run("-V") == Outcome(0, f"lowmem-db {lowmem_db.__version__}\n", "")


def test_help_imports_nothing_heavy(environment_of_commands: dict[str, str]) -> None:
    program = (
        "import sys\nfrom lowmem_db.cli.main import main\nsys.argv = ['lowmem-db', '--help']\n"
        f"try:\n    main()\nexcept SystemExit:\n    print('\\n' + ','.join(set({HEAVY}) & set(sys.modules)) + '.')"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment_of_commands, capture_output=True, text=True, check=True
    ).stdout
    assert printed.splitlines()[-1] == "."


def test_wrong_configuration_is_answered_without_torch(environment_of_commands: dict[str, str]) -> None:
    program = (
        "import sys\nfrom lowmem_db.cli.main import main\nsys.argv = ['lowmem-db', 'train', 'seed=x']\n"
        "try:\n    main()\nexcept SystemExit as ended:\n    print(ended.code, 'torch' in sys.modules)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment_of_commands, capture_output=True, text=True, check=True
    ).stdout
    assert printed == "2 False\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError, 2),
        (DataError, 2),
        (ModelError, 2),
        (CheckpointError, 2),
        (DependencyError, 2),
        (StorageError, 2),
        (NonFiniteError, 2),
        (RunInterrupted, 130),
    ],
)
def test_error_gives_its_code_and_its_lines(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], code: int
) -> None:
    def fail() -> None:
        raise error("first: :dog: [bold]\nsecond: way out")

    monkeypatch.setattr(main_module, "app", fail)
    outcome = run()
    prefix = "error: " if code == 2 else ""
    assert outcome.code == code
    assert outcome.err == f"{prefix}first: :dog: [bold]\n{prefix}second: way out\n"
    assert outcome.out == ""


def test_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(main_module, "app", fail)
    with pytest.raises(ZeroDivisionError):
        run()


def test_interruption_is_not_swallowed_with_the_errors_of_a_library() -> None:
    assert not issubclass(RunInterrupted, Exception)


def test_unknown_command_is_refused(run: Run) -> None:
    outcome = run("trian")
    assert outcome.code == 2
    assert "train" in outcome.err
    assert outcome.out == ""


def test_doctor_prints_json_alone_on_standard_output(run: Run) -> None:
    outcome = run("doctor", "--json")
    report = json.loads(outcome.out)
    assert outcome.code == 0
    assert set(report) >= {"versions", "platform", "devices", "back_ends"}
    assert report["versions"]["torch"]
    assert report["devices"][0]["device"] == "cpu"
    for back_end in report["back_ends"]:
        assert set(back_end) == {"name", "serves", "active", "reason"}
        assert back_end["reason"]


def test_doctor_shows_every_back_end(run: Run) -> None:
    outcome = run("doctor")
    assert outcome.code == 0
    for name in ("bitsandbytes", "xformers", "triton", "cpu"):
        assert name in outcome.out


def test_doctor_ends_with_a_verdict(run: Run) -> None:
    assert any(line.startswith(("ready: ", "not ready: ")) for line in run("doctor").out.splitlines())
    assert set(json.loads(run("doctor", "--json").out)["verdict"]) == {"device", "is_ready", "fits", "missing"}


def test_wrong_torch_beside_a_card_ends_before_anything_is_done(
    run: Run, tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch can use the card of this machine")
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 3060, 8.6'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvidia.installed_cards.cache_clear()
    for arguments in (("train", config_file, "device=auto"), ("bench",), ("generate", "demo", "--prompt", "a dog")):
        outcome = run(*arguments)
        assert outcome.code == 2
        assert "device: 'auto': " in outcome.err
        assert "NVIDIA GeForce RTX 3060" in outcome.err
    outcome = run("train", config_file, "device=cpu", f"output_dir={tmp_path / 'run'}", "training.max_train_steps=1")
    assert outcome.code == 0, outcome.err
    nvidia.installed_cards.cache_clear()


def test_identifiers_are_printed_with_their_tokens(run: Run) -> None:
    outcome = run("identifiers", "demo", "--count", 3)
    assert outcome.code == 0
    assert len(outcome.out.splitlines()) == 3
    for line in outcome.out.splitlines():
        text, ids = line.split("\t")
        assert text
        assert all(number.isdigit() for number in ids.split())
    assert run("identifiers", "demo", "--count", 3).out == outcome.out
    assert run("identifiers", "demo", "--count", 3, "--seed", 1).out != outcome.out


def test_class_noun_is_printed_where_the_classifier_is_sure(run: Run, tmp_path: Path) -> None:
    sure = run("identifiers", "--class-noun", PHOTOGRAPHS / "dog3")
    assert (sure.code, sure.out) == (0, "dog\n")
    assert 'subject.class_prompt="a dog"' in sure.err
    unsure = run("identifiers", "--class-noun", PHOTOGRAPHS / "robot_toy")
    assert (unsure.code, unsure.out) == (2, "")
    assert "the classifier is not sure" in unsure.err
    assert "name it yourself" in unsure.err
    assert "PHOTOS: nothing does not exist" in run("identifiers", "--class-noun", "nothing").err
    refused = run("identifiers", "demo", "--count", 3, "--class-noun", PHOTOGRAPHS / "dog3")
    assert (refused.code, "MODEL, --count: no effect with --class-noun" in refused.err) == (2, True)


def test_missing_class_prompt_names_the_command_that_looks_for_it(run: Run, config_file: Path) -> None:
    outcome = run("train", config_file, "prior.enabled=true", "subject.class_prompt=null")
    assert outcome.code == 2
    assert "lowmem-db identifiers --class-noun" in outcome.err


def test_identifiers_of_no_model_are_refused(run: Run, tmp_path: Path) -> None:
    outcome = run("identifiers", tmp_path / "nothing")
    assert outcome.code == 2
    assert outcome.err.startswith("error: MODEL: ")


def test_module_and_program_are_the_same(start: Callable[..., subprocess.Popen]) -> None:
    out, err = start("--help").communicate(timeout=60)
    assert "Usage: python -m lowmem_db" in out
    assert err == ""


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_out_of_memory_is_one_line_whatever_was_being_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, is_wrapped: bool
) -> None:
    def fail() -> None:
        if is_wrapped:
            raise ModelError("unet: cannot be loaded; download it again") from error
        raise error

    monkeypatch.setattr(main_module, "app", fail)
    with pytest.raises(SystemExit) as ended:
        main_module.main()
    assert ended.value.code == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("out of memory on the ")


@pytest.mark.parametrize("command", ["train", "plan", "prepare", "photos"])
def test_flag_with_one_dash_is_no_call_for_help(run: Run, command: str) -> None:
    for arguments in (["-hflip"], ["--instance_data_dir", "-photos"]):
        told = run(command, "demo", *arguments)
        assert (told.code, told.out) == (2, "")
        assert f"{arguments[-1]}: begins with one dash; flags begin with two (-{arguments[-1]})" in told.err
