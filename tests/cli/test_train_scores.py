"""``evaluation.every``: scores during training, the best checkpoint, and stopping early."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lowmem_db.evaluation import during_training
from lowmem_db.storage.run_folder import RunFolder, read_rows
from lowmem_db.storage.tensors import read_state, read_tensors
from tests.cli.conftest import Run

FAST = (
    "training.max_train_steps=6", "evaluation.every=1", "checkpointing.every=100", "checkpointing.keep=1",
    "sampling.num_images=1", "sampling.num_inference_steps=1", "final.precision=fp32",
)  # fmt: skip


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Let the scores be what a test wants."""

    def script(values: list[float]) -> None:
        left = list(values)
        monkeypatch.setattr(
            during_training.Scorer, "__call__", lambda _self, drawn: {"score": left.pop(0), "images": len(drawn)}
        )

    return script


def unet_of(folder: Path) -> dict[str, object]:
    return read_tensors(next(folder.glob("*.safetensors")))[0]


def test_scores_are_off_by_default(trained: Path) -> None:
    assert not RunFolder(trained).scores_file.exists()


def test_best_checkpoint_stays_and_becomes_the_final_model(
    run: Run, config_file: Path, tmp_path: Path, scripted: Callable[[list[float]], None]
) -> None:
    scripted([0.1, 0.5, 0.2, 0.4, 0.3, 0.3])
    outcome = run("train", config_file, *FAST)
    assert outcome.code == 0
    assert "the final model is taken from step 2" in outcome.err
    folder = RunFolder(tmp_path / "run")
    assert folder.complete_steps() == [2, 6]
    assert [row["score"] for row in read_rows(folder.scores_file)] == [0.1, 0.5, 0.2, 0.4, 0.3, 0.3]
    final = unet_of(folder.final_dir / "unet")
    of_best = read_state(folder.checkpoint_dir(2) / "unet.safetensors")
    of_last = read_state(folder.checkpoint_dir(6) / "unet.safetensors")
    assert all(final[name].equal(of_best[name]) for name in final)
    assert any(not final[name].equal(of_last[name]) for name in final)


def test_last_model_is_final_where_the_best_is_not_kept(
    run: Run, config_file: Path, tmp_path: Path, scripted: Callable[[list[float]], None]
) -> None:
    scripted([0.1, 0.5, 0.2, 0.4, 0.3, 0.3])
    assert run("train", config_file, *FAST, "evaluation.keep_best=false").code == 0
    folder = RunFolder(tmp_path / "run")
    assert folder.complete_steps() == [6]


def test_run_out_of_patience_stops_and_stays_stopped(
    run: Run, config_file: Path, tmp_path: Path, scripted: Callable[[list[float]], None]
) -> None:
    scripted([0.1, 0.5, 0.2, 0.4])
    patient = (*FAST, "evaluation.patience=2")
    outcome = run("train", config_file, *patient)
    assert outcome.code == 0
    assert "no better score since step 2: stopped after step 4" in outcome.err
    folder = RunFolder(tmp_path / "run")
    before = (folder.final_dir / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    again = run("train", config_file, *patient, "--resume")
    assert again.code == 0
    assert [row["step"] for row in read_rows(folder.metrics_file)] == [1, 2, 3, 4]
    assert (folder.final_dir / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_score_is_fidelity_less_preservation(run: Run, config_file: Path, tmp_path: Path) -> None:
    assert run("train", config_file, *FAST, "evaluation.every=6").code == 0
    (row,) = read_rows(tmp_path / "run" / "scores.jsonl")
    assert row["score"] == pytest.approx(row["EN0-I"] - row["EN0-PRES"])
    assert -1 <= row["EN0-I"] <= 1
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert "sample" in [phase["name"] for phase in plan["phases"]]


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        (["evaluation.patience=3"], ["evaluation.patience: 3", "evaluation.every"]),
        (['evaluation.prompts=["a zx dog"]'], ["evaluation.prompts", "evaluation.every"]),
        (
            ["evaluation.every=2", "evaluation.encoder=lpips=x"],
            ["evaluation.encoder: 'lpips=x'", "allowed: en0, identity, dino, clip"],
        ),
        (["evaluation.every=2", "evaluation.encoder=paper"], ["evaluation.encoder", "en0, identity, dino, clip"]),
        (["evaluation.every=2", "evaluation.encoder=dyno"], ["evaluation.encoder: 'dyno'", "en0, identity, dino"]),
    ],
)
def test_what_cannot_be_scored_is_refused(run: Run, config_file: Path, fields: list[str], parts: list[str]) -> None:
    outcome = run("train", config_file, *fields)
    assert outcome.code == 2
    assert all(part in outcome.err for part in parts), outcome.err
