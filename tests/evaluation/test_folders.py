"""From folders to what is compared."""

import shutil
from pathlib import Path

import pytest

from lowmem_db.errors import DataError
from lowmem_db.evaluation.folders import Limits, SubjectFiles, find_subjects, parse_subjects
from tests.evaluation.conftest import random_picture, write_images

EVERYTHING = Limits()


def layout(subject: SubjectFiles) -> list[tuple[str | None, list[str]]]:
    return [(prompt, [file.name for file in files]) for prompt, files in subject.prompts]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "photos", "a.png", "b.png")


def write_pictures(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        random_picture(index).save(folder / name)
    return folder


def read_one(images: Path, photos: Path, limits: Limits = EVERYTHING) -> SubjectFiles:
    (subject,) = find_subjects(images, photos, None, limits)
    return subject


def test_numbered_images_belong_to_the_lines_of_the_prompt_file(images_dir: Path, photos: Path) -> None:
    random_picture(9).save(images_dir / "grid.png")
    random_picture(9).save(images_dir / "contact_sheet.png")
    subject = read_one(images_dir, photos)
    assert layout(subject) == [("a dog", ["00-00.png", "00-01.png"]), ("a cat", ["01-00.png", "01-01.png"])]
    assert (subject.name, [file.name for file in subject.photos]) == ("photos", ["a.png", "b.png"])
    assert subject.num_images == 4


def test_images_are_in_the_order_of_their_numbers(tmp_path: Path, photos: Path) -> None:
    images = write_images(tmp_path / "images", ["a dog"], 11)
    assert layout(read_one(images, photos))[0][1][-2:] == ["00-09.png", "00-10.png"]


def test_captions_beside_images_are_their_prompts(tmp_path: Path, photos: Path) -> None:
    images = write_pictures(tmp_path / "images", "x.png", "y.png", "z.png", "w.png")
    for name, text in [("x", "a dog"), ("y", "a cat"), ("z", "a  dog\n")]:
        (images / f"{name}.txt").write_text(text)
    assert layout(read_one(images, photos)) == [
        ("a dog", ["x.png", "z.png"]), ("a cat", ["y.png"]), (None, ["w.png"])
    ]  # fmt: skip


def test_folders_are_named_by_their_prompt(tmp_path: Path, photos: Path) -> None:
    write_pictures(tmp_path / "images" / "a_dog_in the_snow", "0.png", "1.png")
    write_pictures(tmp_path / "images" / "a cat", "0.png")
    assert layout(read_one(tmp_path / "images", photos)) == [
        ("a cat", ["0.png"]), ("a dog in the snow", ["0.png", "1.png"])
    ]  # fmt: skip


def test_limits_take_the_first(images_dir: Path, photos: Path) -> None:
    assert layout(read_one(images_dir, photos, Limits(num_prompts=1))) == [("a dog", ["00-00.png", "00-01.png"])]
    assert layout(read_one(images_dir, photos, Limits(num_images=1))) == [
        ("a dog", ["00-00.png"]), ("a cat", ["01-00.png"])
    ]  # fmt: skip


@pytest.fixture
def many(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("cat", "dog", "robot"):
        write_pictures(tmp_path / "real" / name, "a.png")
        write_images(tmp_path / "drawn" / name, ["a thing"], 1)
    (tmp_path / "real" / "LICENSE.md").touch()
    return tmp_path / "drawn", tmp_path / "real"


@pytest.mark.parametrize(
    ("wanted", "names"), [(None, ["cat", "dog", "robot"]), ("2", ["cat", "dog"]), ("robot, cat", ["robot", "cat"])]
)
def test_every_folder_of_photos_is_a_subject(many: tuple[Path, Path], wanted: str | None, names: list[str]) -> None:
    found = find_subjects(*many, None, Limits(subjects=parse_subjects(wanted)))
    assert [subject.name for subject in found] == names
    assert [subject.photos[0].parent.name for subject in found] == names


def test_subjects_without_images_are_left_out_and_named(
    many: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(many[0] / "cat")
    assert [subject.name for subject in find_subjects(*many, None, EVERYTHING)] == ["dog", "robot"]
    assert "skipped, because there are no images: cat" in capsys.readouterr().err
    with pytest.raises(DataError, match="--subjects: cat not found; allowed: dog, robot"):
        find_subjects(*many, None, Limits(subjects=("cat",)))


def test_class_images_are_found_by_subject(many: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("cat", "dog", "robot"):
        write_pictures(tmp_path / "class" / name, "c.png", "d.png")
    found = find_subjects(*many, tmp_path / "class", EVERYTHING)
    assert [len(subject.class_images) for subject in found] == [2, 2, 2]
    shutil.rmtree(tmp_path / "class" / "dog")
    with pytest.raises(DataError, match=r"--class-images: .*dog does not exist"):
        find_subjects(*many, tmp_path / "class", EVERYTHING)


@pytest.mark.parametrize("text", ["", "0", ",", " "])
def test_subjects_that_are_neither_number_nor_names_are_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"--subjects: .*allowed: a number from 1, or names"):
        parse_subjects(text)


def test_photos_are_needed(images_dir: Path) -> None:
    with pytest.raises(DataError, match="--real: is required"):
        find_subjects(images_dir, None, None, EVERYTHING)


def test_missing_and_empty_folders_are_named(images_dir: Path, photos: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"--real: .*nothing does not exist"):
        find_subjects(images_dir, tmp_path / "nothing", None, EVERYTHING)
    with pytest.raises(DataError, match=r"IMAGES: .*nothing does not exist"):
        find_subjects(tmp_path / "nothing", photos, None, EVERYTHING)
    with pytest.raises(DataError, match=r"IMAGES: .*empty is empty"):
        find_subjects(empty, photos, None, EVERYTHING)
    with pytest.raises(DataError, match=r"--real: .*empty has no pictures"):
        find_subjects(images_dir, empty, None, EVERYTHING)
    with pytest.raises(DataError, match="has no folder named like a subject in"):
        find_subjects(images_dir, write_pictures(tmp_path / "real" / "dog", "a.png").parent, None, EVERYTHING)
    with pytest.raises(DataError, match=r"IMAGES: .*a\.png is a file; allowed: a folder"):
        find_subjects(photos / "a.png", photos, None, EVERYTHING)


def test_overview_alone_is_no_picture(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has only an overview and no single pictures"):
        find_subjects(write_pictures(tmp_path / "images", "grid.png"), photos, None, EVERYTHING)


def test_unreadable_images_are_all_named(many: tuple[Path, Path]) -> None:
    for name in ("cat", "dog"):
        (many[0] / name / "00-00.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"(?s)cat/00-00\.png: cannot be decoded.*dog/00-00\.png: cannot be decoded"):
        find_subjects(*many, None, EVERYTHING)


@pytest.mark.parametrize("name", ["02-00.png", "portrait.png"])
def test_image_that_belongs_to_no_prompt_is_refused(images_dir: Path, photos: Path, name: str) -> None:
    random_picture(0).save(images_dir / name)
    with pytest.raises(DataError, match=r"belongs to none of the 2 prompts in prompts\.txt"):
        find_subjects(images_dir, photos, None, EVERYTHING)
