"""The paper's protocol on runs of a tiny model: seeds, shards, going on after a stop."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowmem_db.adaptation import low_rank as lora
from lowmem_db.adaptation.lora_file import lora_file, write_lora
from lowmem_db.config.loading import load_config, write_yaml
from lowmem_db.errors import DataError
from lowmem_db.evaluation import protocol
from lowmem_db.evaluation.encoders import find_encoders
from lowmem_db.evaluation.folders import Limits, find_subjects
from lowmem_db.evaluation.protocol import (
    Drawing,
    PromptChoice,
    Run,
    Shard,
    draw_runs,
    find_runs,
    holds_runs,
    parse_shard,
    suite_for,
    without_identifier,
)
from lowmem_db.evaluation.report import evaluate
from lowmem_db.models.finding import find_model
from lowmem_db.models.suggested_base import SuggestedBase
from lowmem_db.storage.places import LORA_FILE
from tests.evaluation.conftest import CPU

ALL = Shard()
QUICK = Drawing(num_inference_steps=1, num_prompts=3, num_images=2, num_class_images=5, device=CPU, dtype=torch.float32)


@pytest.fixture
def run_folder(tiny_fields: dict[str, object], tiny_model: Path, tmp_path: Path) -> Path:
    return write_run(tmp_path / "runs" / "rex", tiny_fields, tiny_model)


@pytest.fixture
def run(run_folder: Path) -> Run:
    (run,) = find_runs(run_folder, PromptChoice(), Limits())
    return run


def write_run(folder: Path, fields: dict[str, object], model: Path) -> Path:
    """Write what training would leave, with the weights of the base."""
    folder.mkdir(parents=True)
    write_yaml(load_config(None, list(fields.items())), folder / "config.yaml")
    shutil.copytree(model, folder / "final")
    return folder


def pictures(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.png"))}


def test_run_says_photos_prompts_and_class(run: Run, photos_dir: Path) -> None:
    assert run.name == "rex"
    assert (run.prompts[0], run.captions[0]) == ("a zx dog in the jungle", "a dog in the jungle")
    assert (len(run.prompts), len(run.captions), run.class_prompt, run.class_caption) == (25, 25, "a dog", "a dog")
    assert [file.parent for file in run.photos] == [photos_dir] * 3


@pytest.mark.parametrize(
    ("noun", "suite"),
    [
        ("dog", "live_subjects"), ("corgi dog", "live_subjects"), ("Animal", "live_subjects"),
        ("wolf", "live_subjects"), ("toy", "objects"), ("dog bowl", "objects"), ("stuffed animal", "objects"),
        ("plush dog", "objects"), ("teddy bear", "objects"), ("rubber duck", "objects"), ("stuffed-animal", "objects"),
        ("toy horse", "objects"),
    ],
)  # fmt: skip
def test_suite_follows_the_class(noun: str, suite: str) -> None:
    assert suite_for(noun) == suite


def test_nine_of_the_papers_thirty_subjects_are_alive() -> None:
    """The classes are those of google/dreambooth, dataset/prompts_and_classes.txt."""
    objects = ["backpack"] * 2 + ["stuffed animal"] * 3 + ["sneaker"] * 2 + ["toy"] * 5
    objects += ["bowl", "can", "candle", "clock", "boot", "glasses", "cartoon", "teapot", "vase"]
    suites = Counter(suite_for(noun) for noun in [*objects, *["cat"] * 2, *["dog"] * 7])
    assert suites == {"objects": 21, "live_subjects": 9}


@pytest.mark.parametrize(
    ("prompt", "identifier", "caption"),
    [
        ("a sks dog in the snow", "sks", "a dog in the snow"),
        ("a zx qv toy", "zx qv", "a toy"),
        ("a dogsks dog", "sks", "a dogsks dog"),
        ("sks", "sks", ""),
        ("a (sks) dog", "(sks)", "a dog"),
    ],
)
def test_identifier_is_left_out_of_captions(prompt: str, identifier: str, caption: str) -> None:
    assert without_identifier(prompt, identifier) == caption


def test_images_depend_on_subject_prompt_and_number_alone(run: Run, tmp_path: Path) -> None:
    assert draw_runs([run], tmp_path / "a", QUICK, ALL) == 0
    drawn = pictures(tmp_path / "a" / "rex")
    assert set(drawn) == {f"{p:02d}-{i:02d}.png" for p in range(3) for i in range(2)} | {
        f"class/{i:02d}.png" for i in range(5)
    }
    assert len(set(drawn.values())) == len(drawn)
    draw_runs([run], tmp_path / "b", replace(QUICK, num_prompts=2), ALL)
    assert pictures(tmp_path / "b" / "rex").items() <= drawn.items()
    draw_runs([run], tmp_path / "c", replace(QUICK, seed=1), ALL)
    assert pictures(tmp_path / "c" / "rex")["00-00.png"] != drawn["00-00.png"]


def test_stopped_evaluation_goes_on_and_gives_the_same(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    write_file = protocol.write_file

    def stop_after_seven(path: Path, write: object) -> None:
        if len(written) == 7:
            raise KeyboardInterrupt
        written.append(path)
        write_file(path, write)

    draw_runs([run], tmp_path / "whole", QUICK, ALL)
    with monkeypatch.context() as patch:
        patch.setattr(protocol, "write_file", stop_after_seven)
        with pytest.raises(KeyboardInterrupt):
            draw_runs([run], tmp_path / "stopped", QUICK, ALL)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "stopped").rglob("*.png")}
    assert len(kept) == 7
    draw_runs([run], tmp_path / "stopped", QUICK, ALL)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert pictures(tmp_path / "stopped") == pictures(tmp_path / "whole")
    encoders = find_encoders(["en0"])
    reports = [evaluate([run.drawn(tmp_path / name, QUICK)], encoders, CPU) for name in ("whole", "stopped")]
    assert reports[0] == reports[1]
    assert reports[0]["metrics"]["EN0-I"]["num_pairs"] == 3 * 2 * 3
    assert reports[0]["metrics"]["EN0-PRES"]["num_pairs"] == 5 * 3
    assert reports[0]["metrics"]["EN0-DIV"]["num_pairs"] == 3


def test_shards_make_the_whole(run: Run, tmp_path: Path) -> None:
    draw_runs([run], tmp_path / "whole", QUICK, ALL)
    left = [draw_runs([run], tmp_path / "parts", QUICK, Shard(number=number, count=3)) for number in (1, 2, 3)]
    assert left[0] > left[1] > left[2] == 0
    assert pictures(tmp_path / "parts") == pictures(tmp_path / "whole")


def test_every_run_of_a_folder_is_a_subject(
    run_folder: Path, tiny_fields: dict[str, object], tiny_model: Path, tmp_path: Path
) -> None:
    write_run(
        tmp_path / "runs" / "tim",
        tiny_fields | {"subject.instance_prompt": "a zx toy", "subject.class_prompt": "a toy"},
        tiny_model,
    )
    (tmp_path / "runs" / "cache").mkdir()
    runs = find_runs(tmp_path / "runs", PromptChoice(), Limits())
    assert [run.name for run in runs] == ["rex", "tim"]
    assert runs[1].prompts[-1] == "a cube shaped zx toy"
    assert [run.name for run in find_runs(tmp_path / "runs", PromptChoice(), Limits(subjects=("tim",)))] == ["tim"]
    draw_runs(runs, tmp_path / "out", replace(QUICK, num_prompts=1), ALL)
    assert (tmp_path / "out" / "rex" / "00-01.png").is_file()
    assert (tmp_path / "out" / "tim" / "00-01.png").is_file()


def test_what_was_drawn_can_be_read_as_a_folder(run: Run, tmp_path: Path, photos_dir: Path) -> None:
    draw_runs([run], tmp_path, QUICK, ALL)
    (subject,) = find_subjects(tmp_path / "rex", photos_dir, tmp_path / "rex" / "class", Limits())
    drawn = run.drawn(tmp_path, QUICK)
    assert (subject.prompts, subject.class_images) == (drawn.prompts, drawn.class_images)


def test_prompts_can_be_chosen(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a zx cat\n")
    (run,) = find_runs(run_folder, PromptChoice(prompt_file=tmp_path / "prompts.txt"), Limits())
    assert (run.prompts, run.captions) == (("a zx cat",), ("a cat",))
    (run,) = find_runs(run_folder, PromptChoice(suite="expressions", class_noun="cat", identifier="qv"), Limits())
    assert run.prompts[0] == "a depressed qv cat"


def test_folder_of_images_drawn_otherwise_is_refused(run: Run, tmp_path: Path) -> None:
    draw_runs([run], tmp_path, QUICK, ALL)
    with pytest.raises(DataError, match=r"rex has images drawn with other settings \(num_inference_steps, seed\)"):
        draw_runs([run], tmp_path, replace(QUICK, seed=1, num_inference_steps=2), ALL)
    (tmp_path / "rex" / "manifest.json").unlink()
    with pytest.raises(DataError, match="has images that this command did not draw"):
        draw_runs([run], tmp_path, QUICK, ALL)


def test_changed_weights_are_noticed(run: Run, run_folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    draw_runs([run], tmp_path / "out", QUICK, ALL)
    weights = next((run_folder / "final" / "unet").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DataError, match=r"drawn with other settings \(model\)"):
        draw_runs([run], tmp_path / "out", QUICK, ALL)


def test_changed_adapters_of_a_lora_run_are_noticed(
    tiny_fields: dict[str, object], tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "rex"
    (folder / "final").mkdir(parents=True)
    config = load_config(None, list((tiny_fields | {"lora.enabled": True}).items()))
    write_yaml(config, folder / "config.yaml")
    for seed in (0, 1):
        unet = find_model(str(tiny_model)).load("unet")
        lora.attach({"unet": unet}, config.lora, seed=seed)
        made = lora_file({"unet": unet}, lora.peft_settings(config.lora), dtype=torch.float32, base=SuggestedBase())
        write_lora(folder / "final" / LORA_FILE, made)
        (run,) = find_runs(folder, PromptChoice(), Limits())
        if seed == 0:
            draw_runs([run], tmp_path / "out", QUICK, ALL)
    with pytest.raises(DataError, match=r"drawn with other settings \(checkpoint\)"):
        draw_runs([run], tmp_path / "out", QUICK, ALL)


def test_resolution_between_latent_pixels_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--resolution: 33 is not a multiple of 2"):
        draw_runs([run], tmp_path, replace(QUICK, resolution=33), ALL)


def test_run_without_class_prompt_needs_names(tiny_fields: dict[str, object], tiny_model: Path, tmp_path: Path) -> None:
    fields = {name: value for name, value in tiny_fields.items() if name != "subject.class_prompt"}
    folder = write_run(tmp_path / "alone", fields | {"prior.enabled": False}, tiny_model)
    with pytest.raises(DataError, match=r"has no subject\.class_prompt"):
        find_runs(folder, PromptChoice(), Limits())
    (run,) = find_runs(folder, PromptChoice(identifier="zx", class_noun="dog"), Limits())
    assert run.class_prompt == "a dog"


def test_photos_that_moved_can_be_named(run_folder: Path, tmp_path: Path, photos_dir: Path) -> None:
    moved = shutil.copytree(photos_dir, tmp_path / "moved")
    (run,) = find_runs(run_folder, PromptChoice(), Limits(), moved)
    assert run.photos[0].parent == moved


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    assert not holds_runs(tmp_path)
    with pytest.raises(DataError, match="nothing does not exist"):
        holds_runs(tmp_path / "nothing")


@pytest.mark.parametrize(("text", "shard"), [(None, (1, 1)), ("1/4", (1, 4)), ("4/4", (4, 4))])
def test_shards_are_read(text: str | None, shard: tuple[int, int]) -> None:
    assert parse_shard(text) == Shard(number=shard[0], count=shard[1])


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", ""])
def test_shards_that_are_no_part_are_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"--shard: .*such as 1/4"):
        parse_shard(text)
