"""What a folder is: nothing that a user put there is dropped without a line."""

import os
from pathlib import Path

import pytest

from lowmem_db.data.folder import look_into
from lowmem_db.errors import DataError

FIELD = "subject.instance_dir"


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


@pytest.mark.parametrize(
    ("photo", "caption"),
    [
        ("dog.jpg", "dog.txt"), ("IMG_1.JPG", "IMG_1.TXT"), ("IMG_1.JPG", "img_1.txt"), ("dog.jpg", "dog.caption"),
        ("dog.jpg", "dog.jpg.txt"), ("Dog.JPG", "dog.jpg.Caption"), ("a.b.jpg", "a.b.txt"), ("dog 1.png", "dog 1.txt"),
        ("h\u00fcnd.jpg", "hu\u0308nd.txt"), ("犬.webp", "犬.txt"), ("stra\u00dfe.jpg", "STRASSE.TXT"),
        ("x.avif", "x.txt"),
    ],
)  # fmt: skip
def test_a_caption_belongs_to_its_photo_however_it_is_spelled(tmp_path: Path, photo: str, caption: str) -> None:
    found = look_into(fill(tmp_path, photo, caption, "other.jpg"), FIELD)
    assert found.captions[tmp_path / photo] == (tmp_path / caption,)
    assert found.captions[tmp_path / "other.jpg"] == ()
    assert found.orphans() == found.unread() == found.remarks() == []


def test_captions_of_no_photo_are_named_with_the_photo_that_is_meant(tmp_path: Path) -> None:
    found = look_into(fill(tmp_path, "my_dog.jpg", "my_dgo.txt", "readme.txt"), FIELD)
    assert found.orphans() == [
        "my_dgo.txt is a caption without a photo; is it for my_dog.jpg?", "readme.txt is a caption without a photo",
    ]  # fmt: skip


def test_everything_is_somewhere(tmp_path: Path) -> None:
    names = [
        "a.jpg", "a.txt", "b.png", "c.caption", "metadata.jsonl", "metadata.csv", "notes.md", "film.mp4", "Thumbs.db",
        ".DS_Store", ".hidden.png", "raw.cr2", "noext", "a.npz", "weights.safetensors",
    ]  # fmt: skip
    fill(tmp_path, *names)
    (tmp_path / "more.png").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to("a.jpg")
    (tmp_path / "gone.jpg").symlink_to("elsewhere.jpg")
    found = look_into(tmp_path, FIELD)
    captions = [file.name for files in found.captions.values() for file in files]
    told = [
        *(photo.name for photo in found.photos), *captions, found.table.name,
        *(file.name for file in found.without_photo), *(one.name for one in found.left_over),
    ]  # fmt: skip
    assert sorted(told) == sorted([*names, "more.png", "pipe.jpg", "link.jpg"])
    assert [line.partition(":")[0] for line in found.broken] == [str(tmp_path / "gone.jpg")]
    said = "\n".join(found.orphans() + found.unread() + found.remarks())
    quiet = {"a.jpg", "a.txt", "b.png", "link.jpg", "metadata.jsonl"}
    assert [name for name in told if name not in said and name not in quiet] == []


def test_a_photo_may_have_several_files_and_a_file_several_photos(tmp_path: Path) -> None:
    found = look_into(fill(tmp_path, "a.jpg", "a.png", "a.txt", "a.jpg.txt"), FIELD)
    assert [file.name for file in found.captions[tmp_path / "a.jpg"]] == ["a.jpg.txt", "a.txt"]
    assert [file.name for file in found.captions[tmp_path / "a.png"]] == ["a.txt"]
    assert found.without_photo == ()


@pytest.mark.parametrize(
    "path", ["nothing", "x" * 300, "a/" * 3000, "a\0b", "file", "file/below", "\x1b[31m", "[bold]", "na\udce9"]
)
def test_what_is_no_folder_is_refused_in_one_line(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"allowed: a folder of pictures") as refused:
        look_into(tmp_path / path, FIELD)
    assert str(refused.value).startswith(f"{FIELD}: ")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1500


def test_a_folder_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\); .* Check its permissions"):
        look_into(tmp_path, FIELD)
    with pytest.raises(DataError, match="does not exist"):
        look_into(tmp_path / "nothing", FIELD)


def test_only_the_photos_of_the_subject_are_asked_for_by_number(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is empty.*Put 3 to 5 photos of the subject there"):
        look_into(tmp_path, FIELD)
    fill(tmp_path, "Thumbs.db")
    with pytest.raises(DataError, match=r"holds no picture \(only Thumbs.db\).*Put pictures there"):
        look_into(tmp_path, "prior.class_dir")
