"""Captions of every spelling are read; what cannot be one is refused by its file."""

from pathlib import Path

import pytest

from lowmem_db.data.captions import MAX_CAPTION_BYTES, Captions, read_caption, read_table
from lowmem_db.data.folder import look_into
from lowmem_db.errors import DataError

BAD = {
    "UTF-16 with mark": ("a dog".encode("utf-16"), "is UTF-16; allowed: UTF-8 text. Save it again as UTF-8"),
    "UTF-16 big": (b"\xfe\xff" + "a dog".encode("utf-16-be"), "is UTF-16"),
    "UTF-16 without mark": ("a dog".encode("utf-16-le"), "holds NUL characters"),
    "Latin-1": ("café".encode("latin-1"), "cannot be read"),
    "Shift-JIS": ("犬の写真".encode("cp932"), "cannot be read"),
    "NUL": (b"a\0dog", "holds NUL characters"),
    "binary": (bytes(range(256)), "cannot be read"),
    "empty": (b"", "is empty"),
    "blank": (b"\xef\xbb\xbf \r\n\t\n", "is empty"),
    "20 MB": (
        b"dog " * 5_000_000,
        "has 20,000,000 bytes; allowed: the prompt of the picture beside it, 16,384 bytes at",
    ),
    "a little long": (b"x" * (MAX_CAPTION_BYTES + 1), "has 16,385 bytes"),
}


@pytest.mark.parametrize(
    "content",
    [
        "a dog on a café table", "a dog\non a café table\n", "a dog\r\non a café table\r\n", "a dog\ron a café table",
        "\ufeffa dog on a café table", "  a  dog\ton a café table  ",
    ],
)  # fmt: skip
def test_text_is_read_whatever_its_line_ends(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert read_caption(tmp_path / "a.txt") == "a dog on a café table"


@pytest.mark.parametrize("kind", BAD)
def test_bad_caption_is_refused_by_its_file(tmp_path: Path, kind: str) -> None:
    content, reason = BAD[kind]
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError) as refused:
        read_caption(tmp_path / "a.txt")
    assert str(refused.value).startswith(f"{tmp_path / 'a.txt'}: {reason}")
    assert "\n" not in str(refused.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jpg", "B.JPG", "c.png"):
        (tmp_path / name).touch()
    return tmp_path


def test_a_table_gives_captions(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "a.jpg", "text": "one"}\n\n{"file_name": "b.jpg", "caption": "two", "size": 3}\n'
        '{"file_name": "c.png", "label": 7}\n'
    )
    captions = Captions(look_into(folder, "x"))
    assert [captions.of(folder / name) for name in ("a.jpg", "B.JPG", "c.png")] == ["one", "two", None]


@pytest.mark.parametrize(
    "row",
    [
        "{", "[]", "3", "null", "dog", '{"text": "a"}', '{"file_name": 3}', '{"file_name": "x.jpg", "text": "a"}',
        "[" * 50_000, '{"file_name": "../a.jpg", "text": "a"}',
        '{"file_name": "a.jpg", "text": "a"}\n{"file_name": "A.JPG", "text": "b"}',
    ],
)  # fmt: skip
def test_a_bad_row_is_refused_by_its_line(folder: Path, row: str) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "a"}\n' + row)
    with pytest.raises(DataError, match=r"metadata\.jsonl: line [23]: .*allowed: .*remove"):
        read_table(folder / "metadata.jsonl", look_into(folder, "x").photos)


def test_captions_that_differ_are_refused(folder: Path) -> None:
    (folder / "a.txt").write_text("one")
    (folder / "a.caption").write_text("one\n")
    assert Captions(look_into(folder, "x")).of(folder / "a.jpg") == "one"
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "two"}')
    with pytest.raises(
        DataError, match=r"a\.jpg: has different captions in a\.caption, a\.txt, metadata\.jsonl; allow"
    ):
        Captions(look_into(folder, "x")).of(folder / "a.jpg")
