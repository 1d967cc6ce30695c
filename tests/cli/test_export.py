"""``lowmem-db export``: one file as the base of a run, and the run as one file."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from lowmem_db.storage.run_folder import RunFolder
from tests.cli.conftest import Run
from tests.original_models import write_original_model

QUICK = ("training.max_train_steps=2", "prior.enabled=false", "training.train_text_encoder=true")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("LOWMEM_DB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def train_arguments(fields: dict[str, object], **changed: object) -> list[str]:
    return [*(f"{field}={json.dumps(value)}" for field, value in (fields | changed).items()), *QUICK]


@pytest.mark.parametrize("family", ["sd1", *(pytest.param(name, marks=pytest.mark.long) for name in ("sd2", "sdxl"))])
def test_single_file_is_trained_and_exported(
    family: str, run: Run, tiny_fields: dict[str, object], tmp_path: Path
) -> None:
    write_original_model(tmp_path / "base", family)
    assert run("export", "base").out.strip() == "base.safetensors"
    first = tiny_fields | {"model.base": "base.safetensors", "output_dir": "first"}
    trained = run("train", *train_arguments(first))
    assert trained.code == 0, trained.err
    assert "base.safetensors is Stable Diffusion" in trained.err
    exported = run("export", "first", "--precision", "fp16")
    assert (exported.code, exported.out.strip()) == (0, "first.safetensors")
    with safe_open(tmp_path / "first.safetensors", framework="pt") as weights:
        found = weights.metadata()
    assert found["modelspec.title"] == "first"
    assert found["modelspec.trigger_phrase"] == "a zx dog"
    config = json.loads(found["lowmem_db.config"])
    assert (config["training"]["max_train_steps"], config["model"]["base"]) == (2, "base.safetensors")
    assert str(tmp_path) not in found["lowmem_db.config"]
    assert run("plan", *train_arguments(tiny_fields | {"model.base": "first.safetensors"})).code == 0


def test_run_from_a_single_file_is_the_run_from_its_folder(
    run: Run, tiny_fields: dict[str, object], tmp_path: Path
) -> None:
    write_original_model(tmp_path / "base", "sd1")
    run("export", "base")
    finals = []
    for base in ("base", "base.safetensors"):
        fields = tiny_fields | {"model.base": base, "output_dir": f"run-{base}", "cache_dir": f"cache-{base}"}
        assert run("train", *train_arguments(fields)).code == 0
        final = tmp_path / f"run-{base}" / "final"
        finals.append({str(file.relative_to(final)): file.read_bytes() for file in final.rglob("*.safetensors")})
    assert finals[0] == finals[1]


def test_plan_of_a_single_file_reads_its_header_alone(
    run: Run, tiny_fields: dict[str, object], cache: Path, tmp_path: Path
) -> None:
    write_original_model(tmp_path / "base", "sd1")
    run("export", "base")
    plans = {}
    for base in ("base", "base.safetensors"):
        planned = run("plan", "--json", *train_arguments(tiny_fields | {"model.base": base}))
        assert planned.code == 0, planned.err
        plans[base] = json.loads(planned.out)["peak_bytes"]
    assert plans["base"] == plans["base.safetensors"]
    assert not cache.exists()


def test_folder_of_diffusers_in_half_precision(run: Run, trained: Path) -> None:
    exported = run("export", "run", "--format", "diffusers", "--precision", "fp16")
    assert (exported.code, exported.out.strip()) == (0, "run-diffusers")
    assert run("generate", "run-diffusers", "-p", "a dog", "--num-inference-steps", 1, "--num-images", 1).code == 0


def test_single_file_becomes_a_folder(run: Run, tmp_path: Path) -> None:
    write_original_model(tmp_path / "base", "sd1")
    run("export", "base")
    assert run("export", "base.safetensors", "--format", "diffusers", "--out", "back").code == 0
    for file in (tmp_path / "base").rglob("*.safetensors"):
        assert (tmp_path / "back" / file.relative_to(tmp_path / "base")).read_bytes() == file.read_bytes()


def test_run_that_is_not_done_is_refused(run: Run, trained: Path) -> None:
    shutil.rmtree(RunFolder(trained).final_dir)
    refused = run("export", "run")
    assert refused.code == 2
    assert "error: run: the run has no final model yet; finish it with: lowmem-db train run/config.yaml" in refused.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "RUN_OR_MODEL: 'nowhere' is not a folder, a file or a hub id"),
        (("demo",), "a single file cannot hold AutoencoderTAEF2; export --format diffusers"),
        (("notes.safetensors",), "notes.safetensors: is truncated or not a safetensors file"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(
    arguments: tuple[str, ...], said: str, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "notes.safetensors").write_text("no tensors")
    refused = run("export", *arguments)
    assert refused.code == 2
    assert said in refused.err
    assert len(refused.err.strip().splitlines()) == 1


def test_help_names_the_formats(run: Run) -> None:
    shown = run("export", "--help").out
    for word in ("single-file", "diffusers", "fp16", "ComfyUI", "--out"):
        assert word in shown
