"""Every checkpoint can be used, and a run is whole in itself: it finds its base, wherever that has gone."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file

from lowmem_db.config.loading import read_yaml
from lowmem_db.storage.run_folder import RunFolder
from tests.cli.conftest import Run

QUICK = ("--num-inference-steps", 2, "--num-images", 1)
LEARNS = ("training.learning_rate=3e-2", "checkpointing.every=1", "sampling.guidance_scale=3")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name}.{name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def pixels(file: Path) -> bytes:
    with Image.open(file) as image:
        return image.tobytes()


@pytest.mark.parametrize(
    "fields", [("memory.weights=bf16_extra_bits",), pytest.param(("ema.enabled=true",), marks=pytest.mark.long)]
)
def test_checkpoints_of_a_full_run_are_drawn_and_exported(
    run: Run, config_file: Path, tmp_path: Path, fields: tuple[str, ...]
) -> None:
    folder = RunFolder(tmp_path / "my run")
    outcome = run("train", config_file, f"output_dir={folder.root}", *LEARNS, *fields)
    assert outcome.code == 0, outcome.err
    assert outcome.err.splitlines()[-1] == f"lowmem-db generate '{folder.root}'"

    grid = run("generate", folder.root, "--steps", "1,2,final", *QUICK, "-p", "a zx dog", "-p", "a dog", "-o", "grid")
    assert grid.code == 0, grid.err
    assert sorted(file.name for file in Path("grid").glob("*0.png")) == sorted(
        f"{step}-{prompt}-00.png" for step in ("step-000001", "step-000002", "final") for prompt in ("00", "01")
    )
    drawn = {step: pixels(Path("grid") / f"{step}-00-00.png") for step in ("step-000001", "step-000002", "final")}
    assert drawn["step-000002"] == drawn["final"] != drawn["step-000001"]
    settings = json.loads(Path("grid/images.json").read_text())
    assert (settings["guidance_scale"], settings["num_inference_steps"]) == (3, 2)
    assert [image["step"] for image in settings["images"]] == [1, 2, "final", 1, 2, "final"]
    assert run("generate", folder.root, "--step", 1, *QUICK, "-o", "one").code == 0
    assert pixels(Path("one/step-000001-00-00.png")) == drawn["step-000001"]

    for step in (1, 2):
        made = run("export", folder.root, "--step", step, "--format", "diffusers")
        assert (made.code, made.out.strip()) == (0, f"my run-step-{step:06d}-diffusers"), made.err
    assert same(weights_of(Path("my run-step-000002-diffusers")), weights_of(folder.final_dir))
    assert not same(weights_of(Path("my run-step-000001-diffusers")), weights_of(folder.final_dir))

    for command in ("generate", "export"):
        refused = run(command, folder.root, "--step", 400)
        assert refused.code == 2
        assert "--step: 400, but " in refused.err
        assert "allowed: 1, 2, final" in refused.err
    refused = run("export", folder.root, "--base", "demo")
    assert "--base: demo has no effect" in refused.err


def test_evaluation_of_a_checkpoint(run: Run, config_file: Path, tmp_path: Path) -> None:
    assert run("train", config_file, *LEARNS).code == 0
    few = ("--prompts", 1, "--images", 1, "--num-class-images", 1, "--num-inference-steps", 1, "--shard", "1/1")
    for step in ("1", "2", "final"):
        assert run("evaluate", tmp_path / "run", "--step", step, *few, "-o", step).code == 0
    drawn = [pixels(Path(step) / "run" / "00-00.png") for step in ("1", "2", "final")]
    assert drawn[0] != drawn[1] == drawn[2]


def test_what_the_run_says_is_taken_and_options_win(run: Run, config_file: Path, tmp_path: Path) -> None:
    fields = ("sampling.guidance_scale=2", "sampling.num_inference_steps=1", "sampling.sampler=dpm_solver")
    assert run("train", config_file, *fields).code == 0
    plain = run("generate", tmp_path / "run")
    assert plain.code == 0, plain.err
    assert "drawing 'a zx dog', the prompt of the run" in plain.err
    own = json.loads(Path("images/images.json").read_text())
    assert (own["guidance_scale"], own["num_inference_steps"], own["sampler"]) == (2, 1, "dpm_solver")
    asked = ("--width", 40, "--height", 24, "--negative-prompt", "a cat", "--sampler", "ddim", *QUICK)
    assert run("generate", tmp_path / "run", *asked, "-o", "asked").code == 0
    with Image.open("asked/00-00.png") as image:
        assert image.size == (40, 24)
    assert run("generate", tmp_path / "run", *asked[:4], *asked[6:], "-o", "without").code == 0
    assert pixels(Path("asked/00-00.png")) != pixels(Path("without/00-00.png"))
    refused = run("generate", tmp_path / "run", "--resolution", 32, "--width", 40)
    assert "--resolution and --width: only one of them can be given" in refused.err
    long = run("generate", tmp_path / "run", "-p", "a very long prompt", *QUICK)
    assert "the model reads 16 tokens and ignores the last" in long.err


def test_seed_of_an_image_is_repeated_in_diffusers(run: Run, tiny_model: Path) -> None:
    wanted = ("-p", "a dog", "--negative-prompt", "a cat", "--num-inference-steps", 3, "--num-images", 2)
    assert run("generate", tiny_model, *wanted, "-o", "drawn").code == 0
    settings = json.loads(Path("drawn/images.json").read_text())
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_pretrained(tiny_model / "scheduler")  # the pipeline changes its steps_offset
    pipe.set_progress_bar_config(disable=True)
    for image in settings["images"]:
        drawn = pipe(
            image["prompt"],
            negative_prompt=settings["negative_prompt"],
            num_inference_steps=settings["num_inference_steps"],
            guidance_scale=settings["guidance_scale"],
            width=settings["width"],
            height=settings["height"],
            generator=torch.Generator().manual_seed(image["torch_seed"]),
        ).images[0]
        with Image.open(Path("drawn") / image["file"]) as ours:
            assert max(high for _, high in ImageChops.difference(ours, drawn).getextrema()) <= 1


def test_run_finds_its_base_wherever_it_is(
    run: Run, config_file: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "tiny"))
    assert run("train", config_file, "model.base=./tiny", "lora.enabled=true", *LEARNS).code == 0
    folder = RunFolder(tmp_path / "run")
    written = read_yaml(folder.config_file)
    assert written["model"]["base"] == str(base)
    assert len(written["model"]["content_key"]) == 32
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert run("generate", folder.root, *QUICK).code == 0
    few = ("--prompts", 1, "--images", 1, "--num-class-images", 1, "--num-inference-steps", 1, "--shard", "1/1")
    assert run("evaluate", folder.root, *few).code == 0
    merged = ("--merge", "--format", "diffusers")
    assert run("export", folder.root, *merged, "-o", "merged").code == 0

    moved = base.rename(tmp_path / "moved")
    lost = run("export", folder.root, *merged, "-o", "lost")
    assert lost.code == 2
    assert "if it has moved, say where it is with --base" in lost.err
    assert run("export", folder.root, *merged, "--base", moved, "-o", "found").code == 0
    assert same(weights_of(Path("found")), weights_of(Path("merged")))
    assert run("generate", folder.root, "--base", moved, *QUICK, "-o", "again").code == 0
    assert pixels(Path("again/00-00.png")) == pixels(Path("images/00-00.png"))
    assert run("train", folder.config_file, "--resume", "training.max_train_steps=3").code == 2
    outcome = run(
        "train", folder.config_file, "--resume", "--base", os.path.relpath(moved), "training.max_train_steps=3"
    )
    assert outcome.code == 0, outcome.err
    assert f"model.base was '{base}', is now '{moved}', with the same bytes" in outcome.err

    other = Path(shutil.copytree(moved, tmp_path / "other"))
    weights = load_file(other / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_in.bias"] += 1
    save_file(weights, other / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    refused = run("train", folder.config_file, "--resume", "--base", other, "training.max_train_steps=4")
    assert refused.code == 2
    assert "has other bytes than the model that" in refused.err
    onto_other = run("export", folder.root, *merged, "--base", other, "-o", "onto_other")
    assert onto_other.code == 0
    assert "has other bytes" in onto_other.err
    change = weights_of(Path("onto_other"))["unet.conv_in.bias"] - weights_of(Path("found"))["unet.conv_in.bias"]
    assert torch.allclose(change, torch.ones_like(change))


def test_finished_run_is_a_base(run: Run, config_file: Path, trained: Path) -> None:
    outcome = run("train", config_file, f"model.base={trained}", "output_dir=second")
    assert outcome.code == 0, outcome.err
    assert read_yaml(Path("second/config.yaml"))["model"]["base"] == str(trained)
    other = run("train", "second/config.yaml", "model.base=demo", "output_dir=third")
    assert other.code == 2
    assert "model.content_key: " in other.err
