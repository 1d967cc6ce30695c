"""What diffusers' own tests of ``train_dreambooth.py`` ask of it, asked of ``lowmem-db train`` with the same flags.

Written anew; only flags and expectations are theirs. Folders are mapped: ``checkpoint-2`` there is
``checkpoints/step-000002`` here. Their model is on the hub; this one is made here. Their test for DeepFloyd IF
asks for a mask, which Stable Diffusion was not trained with; on IF itself the flags are run in
``tests/integration/test_deepfloyd_if.py``.
"""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.storage.tensors import read_state
from tests.cli.conftest import Outcome, Run
from tests.tiny_models import tiny_unet

SCRIPT = "examples/dreambooth/train_dreambooth.py"


@pytest.fixture
def command(tiny_model: Path, photos_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The beginning of every command; the pictures of the tiny model have 32 instead of 64 pixels."""
    monkeypatch.setenv("LOWMEM_DB_CACHE", str(tmp_path / "cache"))
    return [
        SCRIPT, "--pretrained_model_name_or_path", str(tiny_model), "--instance_data_dir", str(photos_dir),
        "--resolution", "32", "--train_batch_size", "1", "--gradient_accumulation_steps", "1",
    ]  # fmt: skip


RATES = ["--learning_rate", "5.0e-04", "--scale_lr", "--lr_scheduler", "constant", "--lr_warmup_steps", "0"]


def finished(outcome: Outcome) -> None:
    assert outcome.code == 0, outcome.err


def draw(pipeline: DiffusionPipeline) -> None:
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline("photo", num_inference_steps=1).images
    assert image.size == (32, 32)


def test_training(run: Run, command: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    finished(run("train", *command, "--instance_prompt", "photo", "--max_train_steps", 2, *RATES, "--output_dir", out))
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert (out / "scheduler" / "scheduler_config.json").is_file()
    assert (out / "model_index.json").is_file()
    assert (out / "final" / "model_index.json").is_file()


def test_checkpoints_and_resuming(run: Run, command: list[str], tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder = RunFolder(out)
    command += ["--instance_prompt", "photo", *RATES, "--output_dir", str(out), "--checkpointing_steps=2", "--seed=0"]
    finished(run("train", *command, "--max_train_steps", 4))
    draw(DiffusionPipeline.from_pretrained(out, safety_checker=None))
    assert folder.complete_steps() == [2, 4]
    unet = tiny_unet()
    unet.load_state_dict(read_state(folder.checkpoint_dir(2) / "unet.safetensors"))
    draw(DiffusionPipeline.from_pretrained(tiny_model, unet=unet, safety_checker=None))

    shutil.rmtree(folder.checkpoint_dir(2))
    resumed = run("train", *command, "--max_train_steps", 6, "--resume_from_checkpoint=checkpoint-4")
    finished(resumed)
    assert "resume: continuing after step 4" in resumed.err
    assert "training.max_train_steps was 4, is now 6" in resumed.err
    draw(DiffusionPipeline.from_pretrained(out, safety_checker=None))
    assert folder.complete_steps() == [4, 6]
    last = read_state(folder.checkpoint_dir(6) / "unet.safetensors")
    model = UNet2DConditionModel.from_pretrained(out, subfolder="unet").state_dict()
    assert all(torch.equal(model[name], last[name]) for name in model), "the model is that of the last step"


def test_limit_of_checkpoints(run: Run, command: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    finished(
        run(
            "train", *command, f"--output_dir={out}", "--instance_prompt=prompt", "--max_train_steps=6",
            "--checkpoints_total_limit=2", "--checkpointing_steps=2",
        )
    )  # fmt: skip
    assert RunFolder(out).complete_steps() == [4, 6]


def test_limit_of_checkpoints_removes_several(run: Run, command: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command += [f"--output_dir={out}", "--instance_prompt=prompt", "--checkpointing_steps=2"]
    finished(run("train", *command, "--max_train_steps=4"))
    assert RunFolder(out).complete_steps() == [2, 4]
    limit = ("--resume_from_checkpoint=checkpoint-4", "--checkpoints_total_limit=2")
    finished(run("train", *command, "--max_train_steps=8", *limit))
    assert RunFolder(out).complete_steps() == [6, 8]


def test_going_on_from_an_earlier_checkpoint(run: Run, command: list[str], tmp_path: Path) -> None:
    """By its name or its path; what came after it is gone, and the same steps give the same bits."""
    out = tmp_path / "out"
    command += [
        f"--output_dir={out}", "--instance_prompt=prompt", "--checkpointing_steps=2", "--max_train_steps=4",
        "--validation_prompt=prompt", "--num_validation_images=1", "--validation_steps=3",
        "sampling.num_inference_steps=1",
    ]  # fmt: skip
    folder = RunFolder(out)
    finished(run("train", *command))
    assert folder.complete_steps() == [2, 4], "a checkpoint that was made only for samples is not kept"
    assert folder.samples_dir(3).is_dir()
    before = read_state(folder.checkpoint_dir(4) / "unet.safetensors")
    rows = [row.split('"seconds"')[0] for row in folder.metrics_file.read_text().splitlines()]
    theirs = out / "checkpoint-2"
    for checkpoint in ("checkpoint-2", folder.checkpoint_dir(2), theirs):
        again = run("train", *command, f"--resume_from_checkpoint={checkpoint}")
        finished(again)
        assert "resume: continuing after step 2" in again.err
        assert f"samples of step 3: {folder.samples_dir(3)}" in again.err
        after = read_state(folder.checkpoint_dir(4) / "unet.safetensors")
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert [row.split('"seconds"')[0] for row in folder.metrics_file.read_text().splitlines()] == rows
    refused = run("train", *command, "--resume_from_checkpoint=checkpoint-3")
    assert (refused.code, "no complete checkpoint of step 3; allowed: latest, checkpoint-2" in refused.err) == (2, True)
    other = run("train", *command, f"--resume_from_checkpoint={tmp_path / 'other' / 'checkpoint-2'}")
    assert (other.code, "is not in" in other.err) == (2, True)
    assert folder.complete_steps() == [2, 4]


def test_mask_of_the_test_for_a_pixel_cascade_is_refused_by_other_models(run: Run, command: list[str]) -> None:
    flags = ["--pre_compute_text_embeddings", "--tokenizer_max_length=77", "--text_encoder_use_attention_mask"]
    refused = run("train", *command, "--instance_prompt", "photo", *flags)
    assert (refused.code, "model.attention_mask: true, but Stable Diffusion" in refused.err) == (2, True)
