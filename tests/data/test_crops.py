import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lowmem_db.data.crops import _place, crop_box, load_pixels, num_distinct_crops
from lowmem_db.data.photos import scan_photos
from lowmem_db.errors import DataError
from lowmem_db.records import ImageRecord


def record_of(path):
    (record,) = scan_photos(path.parent, prompt="a sks dog", resolution=64, field="subject.instance_dir")
    return record


@pytest.fixture
def ramp(tmp_path):
    """A wide picture whose grey level is the number of the column."""
    row = np.linspace(0, 255, 256).astype(np.uint8)
    Image.fromarray(np.stack([np.tile(row, (64, 1))] * 3, axis=-1)).save(tmp_path / "ramp.png")
    return record_of(tmp_path / "ramp.png")


def sized(width, height):
    return ImageRecord(path=Path("a.png"), content_key="0" * 32, width=width, height=height, prompt="a sks dog")


class TestNumDistinctCrops:
    @pytest.mark.parametrize(("width", "height", "crop", "expected"), [
        (512, 512, "random", 1), (800, 512, "random", 4), (512, 800, "random", 4), (800, 512, "center", 1),
        (1024, 1025, "random", 1), (512, 514, "random", 3), (2048, 2052, "random", 2),
    ])  # fmt: skip
    def test_counts_positions_that_differ(self, width, height, crop, expected):
        assert num_distinct_crops(sized(width, height), size=(512, 512), crop=crop, num_crops=4) == expected


class TestLoadPixels:
    @pytest.mark.parametrize("resolution", [32, 64, 96])
    def test_gives_a_square_in_minus_one_to_one(self, ramp, resolution):
        pixels = load_pixels(ramp, size=(resolution, resolution), crop="random", index=0)
        assert pixels.shape == (3, resolution, resolution)
        assert pixels.dtype == torch.float32
        assert pixels.is_contiguous()
        assert pixels.min() >= -1
        assert pixels.max() <= 1

    def test_black_and_white_are_exact_and_channels_keep_their_order(self, tmp_path):
        Image.new("RGB", (64, 64), (255, 0, 102)).save(tmp_path / "a.png")
        pixels = load_pixels(record_of(tmp_path / "a.png"), size=(64, 64), crop="center", index=0)
        torch.testing.assert_close(pixels[:, 5, 9], torch.tensor([1.0, -1.0, -0.2]), rtol=0, atol=1e-6)

    def test_without_resizing_the_pixels_are_the_file_s(self, ramp):
        pixels = load_pixels(ramp, size=(64, 64), crop="center", index=0)
        expected = torch.arange(96, 160).float() / 127.5 - 1
        torch.testing.assert_close(pixels[0, 0], expected, rtol=0, atol=0)

    @pytest.mark.parametrize("size", [(256, 64), (64, 256)])
    def test_the_centre_crop_is_centred_in_both_directions(self, tmp_path, size):
        image = Image.new("RGB", size, "black")
        image.paste((255, 255, 255), (size[0] // 2 - 8, size[1] // 2 - 8, size[0] // 2 + 8, size[1] // 2 + 8))
        image.save(tmp_path / "a.png")
        pixels = load_pixels(record_of(tmp_path / "a.png"), size=(32, 32), crop="center", index=0)
        torch.testing.assert_close(pixels, pixels.flip(1, 2), rtol=0, atol=0.01)
        assert pixels[0, 16, 16] == 1

    def test_a_fine_pattern_becomes_grey_and_no_moire(self, tmp_path):
        stripes = np.tile(np.array([0, 255], np.uint8), 331)[None, :, None].repeat(662, 0).repeat(3, 2)
        Image.fromarray(stripes).save(tmp_path / "a.png")
        pixels = load_pixels(record_of(tmp_path / "a.png"), size=(64, 64), crop="center", index=0)
        assert pixels[:, 4:-4, 4:-4].abs().max() < 0.02

    def test_random_crops_lie_in_the_picture_and_cover_it(self, ramp):
        lefts = [_left(ramp, index) for index in range(200)]
        assert 0 <= min(lefts) < 12
        assert 180 < max(lefts) <= 192
        assert 80 < np.mean(lefts) < 112

    def test_a_random_crop_depends_on_the_bytes_and_its_number_alone(self, ramp, tmp_path):
        moved = dataclasses.replace(ramp, path=ramp.path.rename(tmp_path / "other.png"), prompt="a dog")
        assert _left(moved, 3) == _left(moved, 3)
        assert len({_left(moved, index) for index in range(8)}) > 4
        assert _left(dataclasses.replace(moved, content_key="other"), 3) != _left(moved, 3)

    def test_where_the_crops_lie_stays_as_it_is(self):
        """Cached latents are found again by their number: another draw would need another cache version."""
        places = [_place("0123456789abcdef", index) for index in range(3)]
        assert places == pytest.approx([0.21594568601113018, 0.05878736578501709, 0.8285391335123992], abs=1e-12)

    @given(width=st.integers(64, 5000), height=st.integers(64, 5000), index=st.integers(0, 10))
    def test_the_square_never_leaves_the_picture(self, width, height, index):
        box = crop_box(sized(width, height), (64, 64), "random", index)
        assert 0 <= box.left <= box.left + box.width <= width
        assert 0 <= box.top <= box.top + box.height <= height
        assert box.width == box.height == min(width, height)

    def test_a_file_of_another_size_than_its_record(self, ramp):
        Image.new("RGB", (80, 80)).save(ramp.path)
        with pytest.raises(DataError, match=r"ramp.png: is 80 x 80 pixels, but was 256 x 64"):
            load_pixels(ramp, size=(64, 64), crop="center", index=0)


def _left(record, index):
    """Return the left edge of a crop in pixels of the ramp."""
    pixels = load_pixels(record, size=(64, 64), crop="random", index=index)
    return round((pixels[0, 0, 0].item() + 1) * 127.5)
