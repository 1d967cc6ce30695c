"""Several processes draw prompts in turn: for ``generate``, and as samples and scores of a run."""

from pathlib import Path

import pytest

from lowmem_db import generate
from lowmem_db.config.loading import load_config
from lowmem_db.run.run import train
from tests.distributed.ranks import Fields, folder_bytes, run_ranks

_PROMPTS = ["a dog", "a cat", "a zx dog"]


def test_two_processes_draw_the_images_of_one(tiny_model: Path, tmp_path: Path) -> None:
    assert run_ranks(2, _draw, tiny_model, _PROMPTS, tmp_path / "two") == [0, 0]
    _draw(tiny_model, _PROMPTS, tmp_path / "one")
    assert folder_bytes(tmp_path / "two") == folder_bytes(tmp_path / "one")
    assert len(list((tmp_path / "one").glob("0?-0?.png"))) == 6


@pytest.mark.long
def test_process_without_a_prompt_draws_nothing(tiny_model: Path, tmp_path: Path) -> None:
    assert run_ranks(2, _draw, tiny_model, _PROMPTS[:1], tmp_path / "two") == [0, 0]
    assert len(list((tmp_path / "two").glob("00-0?.png"))) == 2


@pytest.mark.long
def test_samples_and_scores_are_those_of_one_process(tiny_fields: Fields, tmp_path: Path) -> None:
    fields = {
        **tiny_fields,
        "training.max_train_steps": 3,
        "checkpointing.every": 2,
        "checkpointing.keep": None,
        "sampling.prompts": _PROMPTS,
        "sampling.at_start": True,
        "sampling.num_images": 1,
        "sampling.num_inference_steps": 2,
        "evaluation.every": 1,
        "ema.enabled": True,
    }
    assert run_ranks(2, _train, fields | {"output_dir": str(tmp_path / "two")}) == [0, 0]
    _train(fields | {"output_dir": str(tmp_path / "one"), "training.gradient_accumulation_steps": 2})
    for of_run in ("samples", "scores.jsonl", "final/unet"):
        found, expected = tmp_path / "two" / of_run, tmp_path / "one" / of_run
        if expected.is_dir():
            assert folder_bytes(found) == folder_bytes(expected) != {}
        else:
            assert found.read_bytes() == expected.read_bytes()


def _train(fields: Fields) -> None:
    train(load_config(None, list(fields.items())))


def _draw(model: Path, prompts: list[str], output: Path) -> None:
    drawn = generate(model, prompts, num_images=2, num_inference_steps=2, device="cpu", output=output)
    assert [prompt for prompt, _ in drawn] == prompts
    assert [len(images) for _, images in drawn] == [2] * len(prompts)
