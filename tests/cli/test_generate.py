"""``lowmem-db generate``: from a run, a checkpoint, a model folder."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from lowmem_db.memory import drawing, weight_stream
from lowmem_db.storage.run_folder import RunFolder
from tests.cli.conftest import Run

QUICK = ("--prompt", "a zx dog", "--num-inference-steps", 1, "--num-images", 2)


def pictures(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def size_of(file: Path) -> tuple[int, int]:
    with Image.open(file) as picture:
        return picture.size


@pytest.mark.parametrize("ema", [False, True])
def test_run_and_its_checkpoint_draw_the_same(run: Run, config_file: Path, tmp_path: Path, ema: bool) -> None:
    fields = ("training.train_text_encoder=true", "training.learning_rate=1e-2", f"ema.enabled={ema}")
    assert run("train", config_file, *fields).code == 0
    folder = RunFolder(tmp_path / "run")
    whole = run("generate", folder.root, *QUICK, "-o", tmp_path / "a")
    assert (whole.code, whole.out.strip()) == (0, str(tmp_path / "a" / "grid.png"))
    shutil.rmtree(folder.final_dir)
    half = run("generate", folder.root, *QUICK, "-o", tmp_path / "b")
    assert half.code == 0
    assert "the run is not finished: drawing from its checkpoint of step 2" in half.err
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b")
    shutil.rmtree(folder.checkpoints_dir)
    nothing = run("generate", folder.root, *QUICK)
    assert nothing.code == 2
    assert "has no final model and no complete checkpoint yet" in nothing.err


def test_models_in_the_package_are_guided_as_suits_them(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    quick = ("--prompt", "a dog", "--num-images", "1", "--num-inference-steps", "1")
    chosen = {"embedded": ("demo_if",), "asked": ("demo_if", "--guidance-scale", "5"), "usual": (tiny_model,)}
    for name, arguments in chosen.items():
        assert run("generate", *arguments, *quick, "-o", tmp_path / name).code == 0
    told = {name: json.loads((tmp_path / name / "images.json").read_text())["guidance_scale"] for name in chosen}
    assert told == {"embedded": 2.0, "asked": 5.0, "usual": 7.5}


@pytest.mark.parametrize("fields", [pytest.param((), marks=pytest.mark.long), ("lora.dora=true", "ema.enabled=true")])
def test_lora_run_draws_the_same_from_its_run_its_folder_and_its_checkpoint(
    run: Run, config_file: Path, tiny_model: Path, tmp_path: Path, fields: tuple[str, ...]
) -> None:
    lora = ("lora.enabled=true", "training.train_text_encoder=true", "training.learning_rate=3e-2", *fields)
    assert run("train", config_file, *lora).code == 0
    folder = RunFolder(tmp_path / "run")
    for name, source in (("a", folder.root), ("b", folder.final_dir), ("base", tiny_model)):
        assert run("generate", source, *QUICK, "-o", tmp_path / name).code == 0
    shutil.rmtree(folder.final_dir)
    assert run("generate", folder.root, *QUICK, "-o", tmp_path / "c").code == 0
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b") == pictures(tmp_path / "c")
    assert pictures(tmp_path / "a") != pictures(tmp_path / "base")


def test_lora_run_is_exported_whole_and_as_a_lora(run: Run, config_file: Path, tmp_path: Path) -> None:
    assert run("train", config_file, "lora.enabled=true", "training.learning_rate=3e-2").code == 0
    folder = tmp_path / "run"
    made = run("export", folder, "--format", "lora-kohya", "--out", tmp_path / "dog.safetensors")
    assert (made.code, made.out.strip()) == (0, str(tmp_path / "dog.safetensors"))
    assert run("export", folder, "--merge", "--format", "diffusers", "--out", tmp_path / "merged").code == 0
    assert run("generate", tmp_path / "merged", *QUICK, "-o", tmp_path / "drawn").code == 0
    refused = run("export", folder, "--format", "diffusers", "--out", tmp_path / "other")
    assert refused.code == 2
    assert "add --merge" in refused.err


def test_model_folder_draws_what_its_seed_says(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    drawn = {}
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        assert run("generate", tiny_model, *QUICK, "--seed", seed, "-o", tmp_path / name).code == 0
        drawn[name] = pictures(tmp_path / name)
    assert set(drawn["a"]) == {"00-00.png", "00-01.png", "grid.png", "images.json"}
    assert drawn["a"] == drawn["b"]
    assert drawn["a"]["00-00.png"] != drawn["c"]["00-00.png"]
    assert drawn["a"]["00-00.png"] != drawn["a"]["00-01.png"]


def test_model_draws_the_same_with_streamed_weights(
    run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed: list[object] = []
    monkeypatch.setattr(weight_stream, "MIN_NUMEL", 64)
    whole = drawing.stream
    monkeypatch.setattr(drawing, "stream", lambda *arguments: (streamed.append(arguments), whole(*arguments)))
    for name, option in [("a", ()), ("b", ("--stream-weights",)), ("c", ("--no-stream-weights",))]:
        assert run("generate", tiny_model, *QUICK, *option, "-o", tmp_path / name).code == 0
        assert len(streamed) == (0 if name == "a" else 2), "the text encoder and the denoiser"
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b") == pictures(tmp_path / "c")


def test_size_is_that_of_the_model_or_the_one_asked_for(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    assert run("generate", tiny_model, *QUICK, "-o", tmp_path / "own").code == 0
    assert size_of(tmp_path / "own" / "00-00.png") == (32, 32)
    assert run("generate", tiny_model, *QUICK, "--resolution", 40, "-o", tmp_path / "asked").code == 0
    assert size_of(tmp_path / "asked" / "00-00.png") == (40, 40)


def test_suites_are_listed(run: Run) -> None:
    outcome = run("generate", "--list-suites")
    assert outcome.code == 0
    assert "live_subjects" in outcome.out.split()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "there is nothing to draw"),
        (("--suite", "objects"), "add --identifier sks --class-noun dog"),
        (("--suite", "nothing"), "--suite: "),
        (("--prompt-file", "nothing.txt"), "nothing.txt: cannot be read"),
        (("--prompt", "x", "--resolution", 33), "--resolution: 33 is not a multiple of 2, the size of a latent pixel"),
        (("--prompt", "x", "--device", "cuda:9"), "device: 'cuda:9' does not exist"),
        (("--prompt", "x", "--identifier", "sks"), "--identifier: is for the prompts of --suite and --comic"),
        (("--comic", "x.yaml", "--suite", "objects"), "--suite: no effect with --comic"),
        (("--prompt", "x", "--upscale", "nothing"), "--upscale: 'nothing' is not a folder"),
        (("--prompt", "x", "--upscale", ""), "--upscale: is empty"),
        (("--prompt", "x", "--base", "nothing"), "--base: 'nothing' is not a folder"),
    ],
)
def test_what_cannot_be_drawn_is_refused(run: Run, tiny_model: Path, arguments: tuple, part: str) -> None:
    outcome = run("generate", tiny_model, *arguments)
    assert outcome.code == 2
    assert part in outcome.err
    assert outcome.out == ""


def test_folder_that_cannot_be_made_is_refused_before_drawing(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outcome = run("generate", tiny_model, *QUICK, "-o", tmp_path / "file")
    assert outcome.code == 2
    assert "file: cannot be written" in outcome.err


def test_nothing_by_that_name_is_refused(run: Run, tmp_path: Path) -> None:
    outcome = run("generate", tmp_path / "nothing", *QUICK)
    assert outcome.code == 2
    assert "not a folder, a file or a hub id" in outcome.err


STORY = """
title: <b>Breakfast</b>
panels:
  - {prompt: 'a {identifier} {class_noun} with a fork', words: '<script>alert(1)</script>', image: 1}
  - {prompt: a dog, caption: The end.}
"""


def test_comic_is_drawn_from_its_script_as_a_picture_and_a_page(run: Run, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "story.yaml").write_text(STORY)
    comic = ("generate", trained, "--comic", tmp_path / "story.yaml", "--num-inference-steps", 1)
    outcome = run(*comic, "-o", tmp_path / "comic")
    assert (outcome.code, outcome.out.strip()) == (0, str(tmp_path / "comic" / "comic.png"))
    names = {"00-00.png", "00-01.png", "01-00.png", "01-01.png", "grid.png", "images.json", "comic.png", "comic.html"}
    assert {file.name for file in (tmp_path / "comic").iterdir()} == names
    assert '"a zx dog with a fork"' in (tmp_path / "comic" / "images.json").read_text()
    assert size_of(tmp_path / "comic" / "comic.png")[0] == 2 * 384 + 3 * 12
    page = (tmp_path / "comic" / "comic.html").read_text()
    assert page.count("data:image/jpeg") == 2
    for markup in ("<script>alert", "<b>Breakfast"):
        assert markup not in page
    for options, message in (
        (("--prompt", "a cat"), "--prompt: no effect with --comic"),
        (("--steps", "2,final"), "--comic and --steps: only one"),
        (("--num-images", 1), "shows image 1, counted from 0; allowed: at least 2"),
    ):
        refused = run(*comic, *options)
        assert (refused.code, message in refused.err) == (2, True), refused.err
    (tmp_path / "story.yaml").write_text(STORY.replace("panels", "pictures"))
    assert "pictures: is no field; allowed: title, columns, font, panels" in run(*comic).err


def test_comic_of_a_model_needs_the_names_of_its_subject(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "story.yaml").write_text(STORY)
    refused = run("generate", tiny_model, "--comic", tmp_path / "story.yaml")
    assert (refused.code, "add --identifier sks --class-noun dog" in refused.err) == (2, True)
