"""Tags: shuffled, kept, left out; always the same for a seed."""

import pytest

from lowmem_db.config.schema import DataConfig
from lowmem_db.data.tags import caption_variants

CAPTION = "zx dog, outdoors, sitting, grass, sky"
TAGS = CAPTION.split(", ")


def variants(seed: int = 0, caption: str = CAPTION, **fields: object) -> tuple[str, ...]:
    return caption_variants(caption, DataConfig.model_validate(fields), seed)


def test_orders_differ_and_hold_the_same_tags() -> None:
    found = variants(shuffle_tags=True, num_caption_variants=8)
    assert len(found) == 8
    assert len(set(found)) > 4
    assert all(sorted(variant.split(", ")) == sorted(TAGS) for variant in found)
    assert len({variant.split(", ")[0] for variant in found}) > 1


def test_first_tags_stay_in_their_places() -> None:
    for variant in variants(shuffle_tags=True, tag_dropout=0.9, keep_tags=2):
        assert variant.split(", ")[:2] == TAGS[:2]


def test_left_out_is_about_the_share_that_was_asked_for() -> None:
    found = variants(tag_dropout=0.5, num_caption_variants=400)
    counts = [len(variant.split(", ")) for variant in found]
    assert 2.3 < sum(counts) / len(counts) < 2.8
    assert min(counts) == 1, "a caption never becomes empty"
    assert all([tag for tag in TAGS if tag in variant] == variant.split(", ") for variant in found), "in their order"


def test_variants_are_a_function_of_seed_and_caption() -> None:
    asked = {"shuffle_tags": True, "tag_dropout": 0.2}
    assert variants(**asked) == variants(**asked)
    assert variants(**asked) != variants(seed=1, **asked)
    assert variants(**asked, num_caption_variants=4) == variants(**asked)[:4]


@pytest.mark.parametrize(
    ("caption", "fields"),
    [(CAPTION, {}), ("a photo of zx dog", {"shuffle_tags": True}), (CAPTION, {"shuffle_tags": True, "keep_tags": 5})],
)
def test_captions_with_nothing_to_vary_stay_as_they_are(caption: str, fields: dict[str, object]) -> None:
    assert variants(caption=caption, **fields) == (caption,)
