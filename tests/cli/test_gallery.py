"""``lowmem-db gallery``: methods beside each other and beside the photos."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.conftest import Run
from tests.evaluation.conftest import random_picture, write_images

SCRIPT = "<script>alert(1)</script>"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "private" / "photos of <b>dog</b>"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x013B] = "secret artist"
    for index, size in enumerate([(640, 10), (33, 47)]):
        random_picture(index).resize(size).save(folder / f"{index}.jpg", exif=exif)
    return folder


def cells(page: str) -> list[tuple[str, int]]:
    """Each method of each row, with its number of pictures."""
    figures = re.findall(r"<figcaption>(.*?)</figcaption>(.*?)</figure>", page, re.DOTALL)
    return [(name, inside.count("<img")) for name, inside in figures]


def test_methods_stand_beside_each_other_prompt_by_prompt(run: Run, photos: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "ours", ["a dog", f"a {SCRIPT} dog"], 2)
    write_images(tmp_path / "theirs", ["a dog", "a dog in a box"], 3)
    outcome = run("gallery", "ours", "theirs", "--real", photos)
    assert (outcome.code, outcome.out.strip()) == (0, "gallery.html")
    page = (tmp_path / "gallery.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == [
        "a dog",
        "a &lt;script&gt;alert(1)&lt;/script&gt; dog",
        "a dog in a box",
    ]
    assert cells(page) == [
        ("Real photo", 1), ("ours", 2), ("theirs", 3),
        ("Real photo", 1), ("ours", 2), ("theirs", 0),
        ("Real photo", 1), ("ours", 0), ("theirs", 3),
    ]  # fmt: skip
    assert page.count("Not drawn.") == 2
    assert page.count("<img") == page.count('<img src="data:image/jpeg')


def test_page_needs_no_network_and_tells_nothing_private(run: Run, photos: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "ours", [SCRIPT], 1)
    assert run("gallery", "ours", "--real", photos, "--name", SCRIPT).code == 0
    page = (tmp_path / "gallery.html").read_text()
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(?!data:)[a-z/]""", page)
    for secret in (SCRIPT, "<b>dog", "private", "secret artist"):
        assert secret not in page


def test_what_generate_has_drawn_is_matched_by_order_where_methods_name_the_subject_differently(
    run: Run, photos: Path, tmp_path: Path
) -> None:
    for name, word in (("dreambooth", "sks dog"), ("inversion", "<dog>")):
        folder = write_images(tmp_path / name, ["x", "y"], 2)
        (folder / "prompts.txt").unlink()
        prompts = [f"a {word}", f"a {word} in the snow"]
        images = [{"file": f"{n:02d}-{i:02d}.png", "prompt": prompts[n]} for n in range(2) for i in range(2)]
        (folder / "images.json").write_text(json.dumps({"images": images}))
        random_picture(0).save(folder / "grid.png")
    outcome = run("gallery", "dreambooth", "inversion", "--real", photos, "-o", "annex/page.html")
    assert (outcome.code, "they are matched by their order" in outcome.err) == (0, True)
    page = (tmp_path / "annex" / "page.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == ["a sks dog", "a sks dog in the snow"]
    assert "a &lt;dog&gt; in the snow" in page
    assert [count for _, count in cells(page)] == [1, 2, 2, 1, 2, 2]


def test_folder_that_evaluate_writes_is_read_one_folder_deeper(run: Run, photos: Path, tmp_path: Path) -> None:
    drawn = write_images(tmp_path / "evaluation" / "dog", ["a dog"], 2)
    (drawn / "class").mkdir()
    random_picture(5).save(drawn / "class" / "00.png")
    (tmp_path / "evaluation" / "evaluation.json").write_text("{}")
    assert run("gallery", "evaluation", "--real", photos).code == 0
    page = (tmp_path / "gallery.html").read_text()
    assert (re.findall("<h2>(.*?)</h2>", page), cells(page)) == (["a dog"], [("Real photo", 1), ("evaluation", 2)])
    write_images(tmp_path / "evaluation" / "cat", ["a cat"], 1)
    refused = run("gallery", "evaluation", "--real", photos)
    assert (refused.code, "several subjects (cat, dog)" in refused.err) == (2, True)


def test_several_subjects_are_shown_where_all_methods_have_them(run: Run, photos: Path, tmp_path: Path) -> None:
    for subject in ("cat", "dog"):
        for name in ("a", "b"):
            write_images(tmp_path / name / subject, ["here"], 1)
        (tmp_path / "real" / subject).mkdir(parents=True)
        random_picture(1).save(tmp_path / "real" / subject / "0.png")
    outcome = run("gallery", "a", "b", "--real", "real", "--subjects", "dog")
    assert outcome.code == 0
    assert re.findall("<h1>(.*?)</h1>", (tmp_path / "gallery.html").read_text()) == ["dog"]
    write_images(tmp_path / "a" / "fox", ["here"], 1)
    (tmp_path / "real" / "fox").mkdir()
    random_picture(1).save(tmp_path / "real" / "fox" / "0.png")
    partly = run("gallery", "a", "b", "--real", "real")
    assert "left out, because not every method has drawn it: fox" in partly.err
    assert re.findall("<h1>(.*?)</h1>", (tmp_path / "gallery.html").read_text()) == ["cat", "dog"]
    into_a_folder = run("gallery", "a", "b", "--real", "real", "-o", "real")
    assert into_a_folder.out.strip() == str(Path("real") / "gallery.html")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ours", "ours"), "a folder is given twice"),
        (("ours", "nothing"), "nothing does not exist"),
        (("ours", "empty"), "empty is empty"),
        (("ours", "run"), "is a run; draw its images first"),
        (("ours", "--name", "a", "--name", "b"), "--name: 2 for 1 folders"),
        (("ours", "theirs", "--name", "a", "--name", "a"), "a name is given twice"),
        (("ours", "--name", " "), "--name: a name is given twice, or empty"),
        (("listed",), "is not a list of images"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    run: Run, photos: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    for name in ("ours", "theirs", "listed"):
        write_images(tmp_path / name, ["a dog"], 1)
    (tmp_path / "listed" / "prompts.txt").unlink()
    (tmp_path / "listed" / "images.json").write_text('{"images": 3}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    refused = run("gallery", *arguments, "--real", photos)
    assert refused.code == 2
    assert message in refused.err
    assert not (tmp_path / "gallery.html").exists()


def test_photos_are_asked_for(run: Run, tmp_path: Path) -> None:
    write_images(tmp_path / "ours", ["a dog"], 1)
    refused = run("gallery", "ours")
    assert (refused.code, "--real: is required" in refused.err) == (2, True)


def test_folders_of_the_same_name_are_told_apart_without_their_paths(run: Run, photos: Path, tmp_path: Path) -> None:
    for place in ("x/one/dog", "x/two/dog", "y/one/dog"):
        write_images(tmp_path / place, ["a dog"], 1)
    assert run("gallery", tmp_path / "x/one/dog", tmp_path / "x/two/dog", "--real", photos).code == 0
    page = (tmp_path / "gallery.html").read_text()
    assert [name for name, _ in cells(page)] == ["Real photo", "one/dog", "two/dog"]
    assert str(tmp_path) not in page
    refused = run("gallery", "x/one/dog", "y/one/dog", "--real", photos)
    assert (refused.code, "--name: is needed, because several folders are called dog" in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--subjects", "cat"), "--subjects: cat not found; allowed: "),
        (("--output", "precious.yaml"), "--output: precious.yaml is not named like a page; allowed: NAME.html"),
    ],
)
def test_nothing_is_ignored_or_overwritten(
    run: Run, photos: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    write_images(tmp_path / "ours", ["a dog"], 1)
    (tmp_path / "precious.yaml").write_text("seed: 3")
    refused = run("gallery", "ours", "--real", photos, *options)
    assert (refused.code, message in refused.err) == (2, True), refused.err
    assert (tmp_path / "precious.yaml").read_text() == "seed: 3"
