"""Pictures and grids of them."""

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFont

from lowmem_db.sampling.images import GRID_FILE, _shortened, labelled_grid, save_rows, to_images

WHITE, RED = (255, 255, 255), (255, 0, 0)


def rows(*counts: int, size: tuple[int, int] = (100, 10), label: str = "a dog") -> list:
    return [(label, [Image.new("RGB", size, "red") for _ in range(count)]) for count in counts]


def test_values_become_bytes() -> None:
    pixels = torch.tensor([-5.0, -1.0, 0.0, 1.0, 5.0]).expand(1, 3, 1, 5)
    (picture,) = to_images(pixels)
    assert picture.size == (5, 1)
    assert [picture.getpixel((x, 0))[0] for x in range(5)] == [0, 0, 128, 255, 255]


def test_channels_and_axes_keep_their_places() -> None:
    pixels = -torch.ones(2, 3, 4, 6)
    pixels[1, 0, 1, 5] = 1
    first, second = to_images(pixels)
    assert first.getpixel((5, 1)) == (0, 0, 0)
    assert second.getpixel((5, 1)) == RED
    assert second.size == (6, 4)


def test_grid_is_as_large_as_its_pictures_margins_and_labels() -> None:
    sheet = labelled_grid(rows(3, 2))
    assert sheet.size == (3 * (100 + 4) + 4, 2 * (10 + 18 + 4) + 4)
    red = [(x, y) for x in range(sheet.width) for y in range(sheet.height) if sheet.getpixel((x, y)) == RED]
    assert len(red) == 5 * 100 * 10
    assert min(red) == (4, 22)


def test_small_pictures_are_shown_larger_pixel_by_pixel() -> None:
    small = Image.new("RGB", (40, 16), "white")
    small.putpixel((39, 15), RED)
    sheet = labelled_grid([("a dog", [small, small])])
    assert sheet.size == (2 * (3 * 40 + 4) + 4, 3 * 16 + 18 + 8)
    red = [(x, y) for x in range(128) for y in range(sheet.height) if sheet.getpixel((x, y)) == RED]
    assert red == [(x, y) for x in (121, 122, 123) for y in (67, 68, 69)]


def test_rows_may_differ_in_length() -> None:
    sheet = labelled_grid(rows(1, 4))
    assert sheet.width == 4 * 104 + 4
    assert sheet.getpixel((4 + 104 + 5, 4 + 18 + 5)) == WHITE


@pytest.mark.parametrize("label", ["", "x" * 3000, "süß 犬 🐕", "two\nlines", "\t"])
def test_any_label_can_be_drawn(label: str) -> None:
    assert labelled_grid(rows(1, size=(96, 10), label=label)).size == (104, 36)


def test_long_label_is_cut_where_the_row_ends() -> None:
    font = ImageFont.load_default(size=12)
    assert _shortened("a dog", 1000, font) == "a dog"
    cut = _shortened("abcdefghij" * 300, 100, font)
    kept = cut.removesuffix("…")
    assert ("abcdefghij" * 300).startswith(kept)
    assert font.getlength(cut) <= 100 < font.getlength(kept + "aa…")
    assert _shortened("abc", 0, font) == "…"


def test_label_is_drawn_above_its_row() -> None:
    plain, labelled = labelled_grid(rows(1, size=(96, 96), label="")), labelled_grid(rows(1, size=(96, 96)))
    area = (4, 4, 100, 22)
    assert plain.crop(area).getcolors() == [(96 * 18, WHITE)]
    assert len(labelled.crop(area).getcolors()) > 1


def test_every_picture_is_saved_beside_the_grid(tmp_path: Path) -> None:
    save_rows(tmp_path, rows(2, 1))
    assert {file.name for file in tmp_path.iterdir()} == {"00-00.png", "00-01.png", "01-00.png", GRID_FILE}
