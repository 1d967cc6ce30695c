"""Several processes draw prompts in turn."""

from pathlib import Path

from lowmem_db import generate
from tests.distributed.ranks import folder_bytes, run_ranks

_PROMPTS = ["a dog", "a cat", "a zx dog"]


def test_two_processes_draw_the_images_of_one(tiny_model: Path, tmp_path: Path) -> None:
    assert run_ranks(2, _draw, tiny_model, _PROMPTS, tmp_path / "two") == [0, 0]
    _draw(tiny_model, _PROMPTS, tmp_path / "one")
    assert folder_bytes(tmp_path / "two") == folder_bytes(tmp_path / "one")
    assert len(list((tmp_path / "one").glob("0?-0?.png"))) == 6


def test_process_without_a_prompt_draws_nothing(tiny_model: Path, tmp_path: Path) -> None:
    assert run_ranks(2, _draw, tiny_model, _PROMPTS[:1], tmp_path / "two") == [0, 0]
    assert len(list((tmp_path / "two").glob("00-0?.png"))) == 2


def _draw(model: Path, prompts: list[str], output: Path) -> None:
    drawn = generate(model, prompts, num_images=2, num_inference_steps=2, device="cpu", output=output)
    assert [prompt for prompt, _ in drawn] == prompts
    assert [len(images) for _, images in drawn] == [2] * len(prompts)
