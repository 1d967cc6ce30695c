"""A run before it starts: photos and captions are files with harmless names, and nothing of the user's is lost."""

import io
import shutil
from pathlib import Path

import pytest

from lowmem_db.config.loading import load_config
from lowmem_db.errors import ConfigError, DataError, ModelError
from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.ui import drafts as module
from lowmem_db.ui.drafts import Drafts
from lowmem_db.ui.workplace import Workplace
from tests.ui.conftest import PHOTOS

SETTINGS = {"noun": "dog", "identifier": "sks", "recipe": "demo", "base": "", "steps": ""}


@pytest.fixture
def drafts(place: Workplace) -> Drafts:
    return Drafts(place)


def add(drafts: Drafts, draft: module.Draft, *names: str) -> None:
    for name in names:
        drafts.add(draft, [(name, io.BytesIO(PHOTOS[0].read_bytes()))])


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("../../etc/cron.d/dog.png", "dog.png"),
        ("C:\\Users\\me\\dog.jpg", "dog.jpg"),
        ('<img src=x onerror="alert(1)">.jpg', "_img src=x onerror=_alert(1)_.jpg"),
        ("a\nb\x00c.jpg", "a_b_c.jpg"),
        ("...jpg", None),
        ("犬 🐕.webp", "犬 🐕.webp"),
        ("x" * 300 + ".jpg", "x" * 96 + ".jpg"),
        ("dog.html", None),
        ("dog", None),
    ],
)
def test_uploaded_files_have_harmless_names(drafts: Drafts, given: str, kept: str | None) -> None:
    draft = drafts.new("dog", "")
    if kept is None:
        with pytest.raises(DataError, match="is no photo"):
            add(drafts, draft, given)
        return
    add(drafts, draft, given)
    assert [photo.name for photo in drafts.photos_of(draft)] == [kept]
    assert Path(draft.photos).parent == drafts.place.home / "photos"


def test_caption_of_a_photo_that_got_another_name_goes_with_it(drafts: Drafts) -> None:
    draft = drafts.new("dog", "")
    add(drafts, draft, "dog.jpg")
    drafts.add(draft, [("dog.txt", io.BytesIO(b"another")), ("dog.jpg", io.BytesIO(PHOTOS[1].read_bytes()))])
    drafts.add(draft, [("dog.txt", io.BytesIO(b"the first"))])
    assert {photo.name: photo.caption for photo in drafts.photos_of(draft)} == {
        "dog.jpg": "the first",
        "dog-2.jpg": "another",
    }


def test_nothing_is_overwritten_and_large_files_are_refused(drafts: Drafts, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = drafts.new("dog", "")
    add(drafts, draft, "dog.jpg", "dog.jpg")
    assert [photo.name for photo in drafts.photos_of(draft)] == ["dog-2.jpg", "dog.jpg"]
    monkeypatch.setattr(module, "MAX_UPLOAD_BYTES", 10)
    with pytest.raises(DataError, match="larger than"):
        add(drafts, draft, "large.jpg")
    assert len(list(Path(draft.photos).iterdir())) == 2


def test_captions_are_files_beside_their_photos(drafts: Drafts) -> None:
    draft = drafts.new("dog", "")
    add(drafts, draft, "one.jpg", "two.jpg")
    drafts.caption(draft, "one.jpg", "  a sks dog\n on <b>grass</b> ")
    assert (Path(draft.photos) / "one.txt").read_text() == "a sks dog on <b>grass</b>\n"
    assert [photo.caption for photo in drafts.photos_of(draft)] == ["a sks dog on <b>grass</b>", ""]
    drafts.caption(draft, "one.jpg", " ")
    assert not (Path(draft.photos) / "one.txt").exists()
    with pytest.raises(DataError, match="is no photo of dog"):
        drafts.caption(draft, "../one.jpg", "text")


def test_photos_in_a_folder_of_the_user_are_not_deleted(drafts: Drafts, tmp_path: Path) -> None:
    folder = shutil.copytree(PHOTOS[0].parent, tmp_path / "mine")
    draft = drafts.new("dog", str(folder))
    with pytest.raises(DataError, match="was not uploaded here"):
        drafts.remove(draft, "00.jpg")
    assert (folder / "00.jpg").is_file()
    uploaded = drafts.new("dog", "")
    assert uploaded.name == "dog2"
    add(drafts, uploaded, "one.jpg")
    drafts.remove(uploaded, "one.jpg")
    assert drafts.photos_of(uploaded) == []


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"noun": " "}, ConfigError, "--what"),
        ({"identifier": "two words"}, ConfigError, "--identifier"),
        ({"recipe": "sd16"}, ConfigError, "allowed: demo"),
        ({"steps": "-3"}, ConfigError, "steps: '-3' is not allowed"),
        ({"base": "./nowhere"}, ModelError, "nowhere"),
    ],
)
def test_settings_are_checked(drafts: Drafts, changes: dict[str, str], error: type[Exception], said: str) -> None:
    draft = drafts.new("dog", "")
    with pytest.raises(error, match=said):
        drafts.change(draft, **(SETTINGS | changes))
    assert drafts.all()["dog"] == draft


def test_training_writes_the_configuration_of_new_and_forgets_the_draft(drafts: Drafts, monkeypatch) -> None:
    started: list[tuple[RunFolder, Path]] = []
    monkeypatch.setattr(module.workplace, "train", lambda run, file: started.append((run, file)))
    draft = drafts.change(drafts.new("dog", ""), **(SETTINGS | {"steps": "30", "noun": "brown dog"}))
    with pytest.raises(DataError, match="photos: "):
        drafts.train(draft)
    add(drafts, draft, "one.jpg")
    run = drafts.train(draft)
    ((_, file),) = started
    config = load_config(file)
    assert (file.name, config.output_dir, run.root.name) == ("dog.yaml", drafts.place.runs / "dog", "dog")
    assert (config.subject.instance_prompt, config.training.max_train_steps) == ("a sks brown dog", 30)
    assert drafts.all() == {}
    assert Path(draft.photos).is_dir()
