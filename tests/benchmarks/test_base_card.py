"""The captions of the base card are those that the classifier reads."""

import random

from benchmarks.demo_base.nouns import NOUNS
from benchmarks.demo_base.render import HUES
from benchmarks.demo_base.scenes import PLAIN, SCENES
from benchmarks.quality.base_card import captioned
from lowmem_db.evaluation.captions import Caption, read_caption


def test_every_caption_is_read_as_it_is_drawn() -> None:
    found = captioned(list(NOUNS), random.Random(0))
    read = [read_caption(text) for text, _ in found]
    for caption, (text, shown) in zip(read, found, strict=True):
        assert isinstance(caption, Caption), text
        assert (caption.noun, caption.colour) == (shown.noun, shown.colour)
        assert caption.background in (None, shown.background)
    assert {caption.noun for caption in read if caption} == set(NOUNS)
    assert {caption.colour for caption in read if caption} == {None, *HUES}
    assert {caption.background for caption in read if caption} == {None, *PLAIN, *SCENES}
