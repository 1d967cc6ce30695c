"""Sizes of buckets: about the pixels of the square, sides on the step, the nearest shape."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_db.config.schema import DataConfig
from lowmem_db.data.buckets import bucket_sizes, bucket_step, nearest_bucket, share_out, sizes_of
from lowmem_db.errors import ConfigError
from lowmem_db.records import ImageRecord

SIDES = st.integers(64, 6000)


def photo(width: int, height: int) -> ImageRecord:
    return ImageRecord(path=Path("a.png"), content_key="0", width=width, height=height, prompt="a sks dog")


def buckets(resolution: int = 1024, step: int = 64) -> list[tuple[int, int]]:
    return bucket_sizes(resolution=resolution, step=step, min_side=resolution // 2, max_side=resolution * 2)


def test_sizes_of_1024_pixels_are_those_sdxl_was_trained_with() -> None:
    """Rows of the table in arXiv:2307.01952, appendix I, between 2:1 and 1:2."""
    published = {(768, 1344), (832, 1216), (896, 1152), (1024, 1024), (1152, 896), (1216, 832), (1344, 768)}
    assert published <= set(buckets())


@given(resolution=st.integers(8, 160).map(lambda n: 8 * n), step=st.sampled_from([8, 16, 32, 64, 128]))
def test_every_bucket_is_on_the_step_and_holds_about_as_many_pixels_as_the_square(resolution: int, step: int) -> None:
    sizes = buckets(resolution, step)
    assert len(sizes) == len(set(sizes))
    for height, width in sizes:
        assert height % step == width % step == 0
        assert resolution // 2 <= min(height, width)
        assert max(height, width) <= resolution * 2
        assert height * width <= resolution**2
        assert (height + step) * (width + step) > min(resolution**2, (height + step) * resolution * 2)
    if resolution % step == 0:
        assert (resolution, resolution) in sizes


@given(width=SIDES, height=SIDES)
def test_no_bucket_is_nearer_to_a_photo_than_its_own(width: int, height: int) -> None:
    sizes = buckets()
    own = nearest_bucket(sizes, width=width, height=height)
    distance = {size: abs(math.log(size[1] / size[0]) - math.log(width / height)) for size in sizes}
    assert distance[own] == pytest.approx(min(distance.values()), abs=1e-9)


def test_turned_photo_has_the_turned_bucket() -> None:
    for width, height in [(4000, 3000), (1920, 1080), (3000, 2000)]:
        across, upright = (nearest_bucket(buckets(), width=w, height=h) for w, h in [(width, height), (height, width)])
        assert across == upright[::-1]


def test_without_buckets_every_photo_is_a_square() -> None:
    assert sizes_of(DataConfig(resolution=64), [photo(300, 200), photo(90, 90)], least_step=8) == [(64, 64)] * 2


def test_with_buckets_each_has_its_shape() -> None:
    config = DataConfig(resolution=1024, aspect_ratio_buckets=True)
    found = sizes_of(config, [photo(4000, 3000), photo(3000, 4000), photo(900, 900)], least_step=32)
    assert found == [(896, 1152), (1152, 896), (1024, 1024)]


@pytest.mark.parametrize(
    ("fields", "least_step", "expected"),
    [
        ({"resolution": 512}, 64, 64),
        ({"resolution": 1024}, 32, 64),
        ({"resolution": 1024}, 128, 128),
        ({"resolution": 128}, 32, 32),
        ({"resolution": 1024, "bucket_step": 32}, 32, 32),
    ],
)
def test_step_is_the_usual_one_or_fits_the_model(fields: dict, least_step: int, expected: int) -> None:
    assert bucket_step(DataConfig(aspect_ratio_buckets=True, **fields), least_step=least_step) == expected


def test_step_that_the_model_cannot_halve_is_refused() -> None:
    config = DataConfig(resolution=512, aspect_ratio_buckets=True, bucket_step=48)
    with pytest.raises(ConfigError, match=r"data\.bucket_step: 48 is not a multiple of 64"):
        sizes_of(config, [photo(100, 100)], least_step=64)


def test_limits_that_leave_no_size_are_refused() -> None:
    config = DataConfig(resolution=512, aspect_ratio_buckets=True, min_bucket_side=600)
    with pytest.raises(ConfigError, match=r"data\.min_bucket_side, data\.max_bucket_side: no size"):
        sizes_of(config, [photo(100, 100)], least_step=64)


@given(count=st.integers(1, 1000), sizes=st.lists(st.sampled_from(buckets()), min_size=1, max_size=20))
def test_class_images_are_shared_out_in_proportion(count: int, sizes: list[tuple[int, int]]) -> None:
    shares = share_out(count, sizes)
    assert set(shares) == set(sizes)
    assert min(shares.values()) >= 1
    assert sum(shares.values()) >= count
    if count >= len(sizes):
        assert sum(shares.values()) == count
        for size, share in shares.items():
            assert abs(share - count * sizes.count(size) / len(sizes)) < 1
