"""``lowmem-db train`` and ``prepare``: what a user does wrong, and Ctrl-C."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors import SafetensorError

from lowmem_db import environment
from lowmem_db.engine import samples
from lowmem_db.interruption import stop_signals
from lowmem_db.storage import tensors
from lowmem_db.storage.run_folder import RunFolder
from tests.cli.conftest import Run


def assert_refused(outcome: object, *parts: str) -> None:
    """Compare: exit code 2, one line on standard error that holds the parts, nothing on standard output."""
    assert outcome.code == 2, outcome
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, outcome.err
    for part in parts:
        assert part in errors[0]
    assert "Traceback" not in outcome.err
    assert outcome.out == ""


def test_run_leaves_its_files_and_says_where(run: Run, config_file: Path, tmp_path: Path) -> None:
    outcome = run("train", config_file)
    folder = RunFolder(tmp_path / "run")
    assert (outcome.code, outcome.out) == (0, "")
    assert f"lowmem-db generate {folder.root}" in outcome.err
    assert folder.complete_steps() == [2]
    assert (folder.final_dir / "model_index.json").is_file()
    rows = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert set(rows[0]) == {
        "step", "loss", "loss_instance", "loss_prior", "lr", "lr_text_encoder", "grad_norm", "seconds", "peak_bytes",
    }  # fmt: skip
    assert json.loads(folder.environment_file.read_text())["versions"]["torch"]

    assert_refused(run("train", config_file), "output_dir: ", "holds a run with checkpoints; continue it with --resume")
    assert_refused(
        run("train", config_file, "--resume", "training.train_text_encoder=true"),
        "cannot change training.train_text_encoder from False to True",
    )
    again = run("train", "--resume", folder.config_file)
    assert again.code == 0
    assert "continuing after step 2" in again.err


@pytest.mark.parametrize("flag", ["--resume", "--resume_from_checkpoint=latest", "--resume-from-checkpoint=latest"])
def test_resume_starts_where_there_is_no_checkpoint(run: Run, config_file: Path, flag: str) -> None:
    outcome = run("train", config_file, flag, "training.max_train_steps=1")
    assert outcome.code == 0
    assert "has no complete checkpoint; starting at step 1" in outcome.err


def test_all_problems_of_a_configuration_are_shown_at_once(run: Run, config_file: Path) -> None:
    outcome = run("train", config_file, "trainin.x=1", "seed=x", "data.crop=left")
    assert outcome.code == 2
    assert len([line for line in outcome.err.splitlines() if line.startswith("error: ")]) == 3


def test_two_configuration_files_are_refused(run: Run, config_file: Path) -> None:
    assert_refused(run("train", config_file, "other.yaml"), "other.yaml: only one configuration file can be given")


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("model.base=nowhere/at/all", ("model.base: ", "not a folder, a file or a hub id")),
        ("subject.instance_dir=nowhere", ("subject.instance_dir: ", "nowhere")),
        ("device=cuda:9", ("device: 'cuda:9' does not exist",)),
        ("memory.attention=xformers", ("xformers",)),
    ],
)
def test_what_is_missing_is_refused_by_its_field(
    run: Run, config_file: Path, argument: str, parts: tuple[str, ...]
) -> None:
    assert_refused(run("train", config_file, argument), *parts)


def test_output_dir_that_is_a_file_is_refused(run: Run, config_file: Path) -> None:
    assert_refused(run("train", config_file, f"output_dir={config_file}"), "tiny.yaml", "cannot be written")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_dir_that_cannot_be_written_is_refused(run: Run, config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert_refused(run("train", config_file, f"output_dir={tmp_path / 'locked' / 'run'}"), "cannot be written")


def test_disk_that_is_too_small_is_refused_before_the_run(
    run: Run, config_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(environment, "free_disk_bytes", lambda path: 1000)
    assert_refused(run("train", config_file), "output_dir: ", "GiB are free; lower checkpointing.keep")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_disk_that_held_a_run_is_large_enough_to_go_on(
    run: Run, config_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []
    monkeypatch.setattr("lowmem_db.run.checks.disk_bytes", lambda *_: asked.append(1) or 3_000_000)
    monkeypatch.setattr(environment, "free_disk_bytes", lambda path: 3_000_000)
    assert run("train", config_file).code == 0
    written = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*.safetensors"))
    monkeypatch.setattr(environment, "free_disk_bytes", lambda path: 3_000_000 - written)
    assert run("train", config_file, "--resume").code == 0
    assert len(asked) == 2


def test_disk_that_fills_up_in_a_checkpoint_leaves_the_one_before(
    run: Run, config_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def save_file(own: object, path: Path, metadata: object) -> None:
        if "step-000002" in str(path):
            path.write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save(own, path, metadata)

    save = tensors.save_file
    monkeypatch.setattr(tensors, "save_file", save_file)
    folder = RunFolder(tmp_path / "run")
    assert_refused(
        run("train", config_file, "checkpointing.every=1"),
        f"{folder.checkpoint_dir(2)}",
        "the disk is full; free some space, then run the same command again, with --resume; the last good",
        f"{folder.checkpoint_dir(1)}",
    )
    assert [entry.name for entry in folder.checkpoints_dir.iterdir()] == ["step-000001"]
    monkeypatch.undo()
    monkeypatch.setenv("COLUMNS", "300")
    outcome = run("train", config_file, "checkpointing.every=1", "--resume")
    assert outcome.code == 0
    assert "continuing after step 1" in outcome.err


def test_odd_demands_are_met(run: Run, config_file: Path, photos_dir: Path, tmp_path: Path) -> None:
    """One photo, a batch larger than the photos, one class image, 8 times an odd number of pixels, an odd prompt."""
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(next(photos_dir.glob("*.png")), one)
    prompt = "a \"zx\" 'dog' — süß 犬 🐕 {0} [bold] :dog: #1 " + "x" * 3000
    outcome = run(
        "train", config_file, f"subject.instance_dir={one}", "training.train_batch_size=3", "prior.enabled=true",
        "prior.num_class_images=1", "data.resolution=40", f"subject.instance_prompt={prompt}",
        f"sampling.prompts={json.dumps([prompt], ensure_ascii=False)}", "sampling.num_images=1",
        "sampling.num_inference_steps=1", "training.train_text_encoder=true", "training.max_train_steps=1",
        "final.precision=fp16",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "the model reads 16 tokens and ignores the last" in outcome.err
    assert ":dog: #1" in outcome.err


@pytest.mark.parametrize("seed", [-1, 0, 2**63, 10**30])
def test_any_seed_trains(run: Run, config_file: Path, seed: int) -> None:
    assert run("train", config_file, f"seed={seed}", "training.max_train_steps=1").code == 0


def test_prepare_fills_the_caches_and_says_what_it_reused(run: Run, config_file: Path, tmp_path: Path) -> None:
    arguments = ("prepare", config_file, "prior.enabled=true", "prior.num_class_images=2")
    first, second = run(*arguments), run(*arguments)
    assert (first.code, second.code) == (0, 0)
    assert "drawing 2 of 2" in first.err
    assert "found all 2" in second.err
    assert "3 of 3 pictures" in second.err
    assert "ready: 3 photos, 2 class images" in second.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("which", [-1, pytest.param(-2, marks=pytest.mark.long)])
def test_signal_saves_a_checkpoint_and_ends_with_130(
    start: Callable[..., subprocess.Popen], config_file: Path, tmp_path: Path, which: int
) -> None:
    number, folder = stop_signals()[which], RunFolder(tmp_path / "run")
    process = start("train", config_file, "training.max_train_steps=100000", "checkpointing.every=100000")
    try:
        wait_for_first_step(process, folder)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        (step,) = folder.complete_steps()
        assert process.returncode == 130
        assert len(folder.metrics_file.read_text().splitlines()) == step
        assert err.splitlines()[-1] == f"{number.name}: stopped after step {step}; continue with --resume"
        assert "Traceback" not in err
        assert out == ""
        assert not list(folder.checkpoints_dir.glob("*tmp*"))
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("times", [1, 2])
def test_signal_among_samples_stops_without_another_step(
    run: Run, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    def draw(*_: object) -> list[tuple[str, list[Image.Image]]]:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
        return [("a zx dog", [Image.new("RGB", (8, 8))])]

    monkeypatch.setattr(samples, "draw_images", draw)
    arguments = (
        "train",
        config_file,
        "training.max_train_steps=9",
        "checkpointing.every=2",
        "sampling.prompts=[a dog]",
    )
    outcome = run(*arguments)
    assert outcome.code == 130
    folder = RunFolder(tmp_path / "run")
    assert folder.complete_steps() == [2]
    assert len(folder.metrics_file.read_text().splitlines()) == 2
    assert folder.samples_dir(2).is_dir() == (times == 1)
    said = {
        1: "SIGINT: stopped after step 2; continue with --resume",
        2: "SIGINT: skipped the samples and scores of step 2",
    }
    assert outcome.err.splitlines()[-1].startswith(said[times])


def wait_for_first_step(process: subprocess.Popen, folder: RunFolder) -> None:
    deadline = time.monotonic() + 300
    while not (folder.metrics_file.is_file() and folder.metrics_file.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no step in five minutes"
        time.sleep(0.05)
