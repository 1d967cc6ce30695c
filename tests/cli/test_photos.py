"""``lowmem-db photos``: what training will see of a folder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lowmem_db.data.crops import load_pixels
from lowmem_db.data.photos import scan_photos
from tests.cli.conftest import Run

EXAMPLES = Path(__file__).parents[2] / "examples" / "dog3"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "dog"
    folder.mkdir()
    for name in ("00.jpg", "01.jpg"):
        shutil.copyfile(EXAMPLES / name, folder / name)
    with Image.open(EXAMPLES / "01.jpg") as photo:
        photo.resize((256, 256)).save(folder / "smaller[red].png")
    with Image.open(EXAMPLES / "02.jpg") as photo:
        photo.resize((800, 512)).save(folder / "wide.jpg")
    (folder / "01.TXT").write_text("a sks dog on a hill")
    (folder / "cat.txt").write_text("a cat")
    (folder / "Thumbs.db").touch()
    (folder / "clip.mp4").touch()
    return folder


def test_folder_is_told_and_drawn(run: Run, folder: Path) -> None:
    outcome = run("photos", folder, "data.resolution=256")
    assert outcome.code == 0, outcome.err
    for said in (
        "wide.jpg", "800 x 512", "a sks dog on a hill", "smaller[red].png",
        "captions: 1 of 4 photos have their own",
        "01.jpg, smaller[red].png are nearly the same, so this view counts 2 times",
        "cat.txt is a caption without a photo",
        "not read: clip.mp4; pictures are JPEG",
        "not read: Thumbs.db (not a picture)",
    ):  # fmt: skip
        assert said in outcome.out
    assert outcome.out.splitlines()[-1] == "photos.png"
    with Image.open("photos.png") as sheet:
        assert sheet.width >= 5 * 176
        assert sheet.height >= 4 * 176


def test_crops_are_those_of_training(run: Run, folder: Path) -> None:
    outcome = run("photos", folder, "data.resolution=256", "--json", "-o", "sheet.png")
    found = json.loads(outcome.out)["photos"]
    wide = next(photo for photo in found["photos"] if photo["file"] == "wide.jpg")
    record = scan_photos(folder, prompt="", resolution=256, field="x")[-1]
    assert len(wide["crops"]) == 4
    for index, (left, top, width, height) in enumerate(wide["crops"]):
        with Image.open(folder / "wide.jpg") as photo:
            cut = photo.resize((256, 256), Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
        trained = (load_pixels(record, size=(256, 256), crop="random", index=index).permute(1, 2, 0) + 1) * 127.5
        assert np.abs(np.asarray(cut, dtype=float) - trained.numpy()).mean() < 1.5
    assert {photo["file"]: photo["has_caption"] for photo in found["photos"]}["01.jpg"]
    assert Path("sheet.png").is_file()


def test_what_cannot_be_used_is_listed_with_the_rest(run: Run, folder: Path) -> None:
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    (folder / "link.jpg").symlink_to(folder / "gone.jpg")
    outcome = run("photos", folder)
    assert outcome.code == 2
    assert "captions: 1 of 4 photos" in outcome.out
    assert "broken.jpg: cannot be decoded" in outcome.err
    assert "link.jpg: is a link to" in outcome.err


def test_configuration_shows_its_own_class_images(run: Run, config_file: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    shutil.copyfile(EXAMPLES / "04.jpg", tmp_path / "class" / "a.jpg")
    fields = (f"subject.instance_dir={folder}", "prior.enabled=true", f"prior.class_dir={tmp_path / 'class'}")
    found = json.loads(run("photos", config_file, *fields, "--json").out)
    assert [photo["file"] for photo in found["class_images"]["photos"]] == ["a.jpg"]
    assert found["photos"]["photos"][0]["prompt"] == "a zx dog"
    bucketed = json.loads(run("photos", config_file, *fields, "data.aspect_ratio_buckets=true", "--json").out)
    sizes = [photo["trained_at"] for photo in bucketed["photos"]["photos"]]
    assert sizes[-1]["width"] > sizes[-1]["height"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["photso"], "FOLDER_OR_CONFIG: photso does not exist; allowed: a folder of pictures; did you mean photos?"),
        (["notes.txt"], "FOLDER_OR_CONFIG: notes.txt is a file"),
        (["photos", "data.resolutoin=3"], "data.resolutoin: unknown field; did you mean data.resolution?"),
    ],
)
def test_typo_is_told_without_torch(
    environment_of_commands: dict[str, str], tmp_path: Path, arguments: list[str], said: str
) -> None:
    shutil.copytree(EXAMPLES, tmp_path / "photos")
    (tmp_path / "notes.txt").touch()
    program = (
        "import sys\nfrom lowmem_db.cli.main import main\nsys.argv = ['lowmem-db', 'photos', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit as ended:\n    print(ended.code, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, *arguments]
    ended = subprocess.run(command, env=environment_of_commands, cwd=tmp_path, capture_output=True, text=True)
    assert ended.stdout == "2 False\n"
    assert ended.stderr.startswith(f"error: {said}")


def test_configuration_of_this_package_is_found_by_its_name(run: Run) -> None:
    told = run("photos", "demo")
    assert (told.code, "00.png" in told.out) == (0, True), told.err
