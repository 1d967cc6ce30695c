import json
from collections import Counter
from pathlib import Path

import pytest
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from lowmem_db.data.identifiers import (
    Identifier,
    default_rank_range,
    identifier_warnings,
    invert,
    rare_identifiers,
    rare_tokens,
)
from lowmem_db.errors import ConfigError

ASSETS = Path(__file__).parents[1] / "assets"


@pytest.fixture(scope="module")
def clip():
    return CLIPTokenizer.from_pretrained(ASSETS / "sd15_tokenizer")


@pytest.fixture(scope="module")
def t5():
    return PreTrainedTokenizerFast(tokenizer_file=str(ASSETS / "t5_tokenizer" / "tokenizer.json"))


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    """A vocabulary of 8192 entries, made of the first merges of CLIP's."""
    folder = tmp_path_factory.mktemp("small_clip")
    full = json.loads((ASSETS / "sd15_tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    tokens = [*sorted(full, key=full.__getitem__)[: 8192 - 2], "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: rank for rank, token in enumerate(tokens)}))
    merges = (ASSETS / "sd15_tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()
    (folder / "merges.txt").write_text("\n".join(merges[: 1 + 8192 - 514]), encoding="utf-8")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


@pytest.fixture(scope="module", params=["clip", "t5", "small_clip"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


class TestRankRange:
    def test_t5_as_in_the_paper(self, t5):
        assert default_rank_range(t5) == (5000, 10001)

    def test_clip_the_last_fifth(self, clip, small_clip):
        assert default_rank_range(clip) == (39526, 49408)
        assert len(small_clip) == 8192
        assert default_rank_range(small_clip) == (6553, 8192)

    def test_ids_of_clip_are_ranks_of_its_merges(self, clip):
        merges = (ASSETS / "sd15_tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
        for rank in (0, 1, 9999, len(merges) - 1):
            assert clip.convert_ids_to_tokens(512 + rank) == merges[rank].replace(" ", "")


class TestRareIdentifiers:
    @pytest.mark.parametrize("num_tokens", [1, 2, 3])
    def test_every_one_tokenises_back_to_rare_tokens(self, tokenizer, num_tokens):
        first, end = default_rank_range(tokenizer)
        identifiers = rare_identifiers(tokenizer, count=20, num_tokens=num_tokens)
        assert len({identifier.text for identifier in identifiers}) == 20
        for identifier in identifiers:
            token_ids = tokenizer.encode(f"{identifier.text}", add_special_tokens=False)
            assert tuple(token_ids) == identifier.token_ids
            assert len(token_ids) == num_tokens
            assert all(first <= token_id < end for token_id in token_ids)
            assert all(1 <= len(tokenizer.decode([token_id]).strip()) <= 3 for token_id in token_ids)
            assert identifier.text.isalnum()
            assert identifier.text.isascii()

    def test_stay_whole_inside_a_prompt(self, clip):
        for identifier in rare_identifiers(clip, count=20):
            around = clip.encode(f"a {identifier.text} dog", add_special_tokens=False)
            assert tuple(around[1:-1]) == identifier.token_ids

    def test_sks_is_one_of_clip_s(self, clip):
        assert invert(clip, (48136,)) == Identifier("sks", (48136,))
        assert 48136 in rare_tokens(clip, default_rank_range(clip))
        identifiers = rare_identifiers(clip, count=600, num_tokens=1)
        assert "sks" in {identifier.text for identifier in identifiers}

    def test_a_seed_decides_and_a_longer_list_begins_with_the_shorter(self, clip):
        ten = rare_identifiers(clip, count=10, seed=1)
        assert rare_identifiers(clip, count=5, seed=1) == ten[:5]
        assert rare_identifiers(clip, count=10, seed=2) != ten

    def test_lengths_come_equally_often(self, clip):
        lengths = Counter(len(identifier.token_ids) for identifier in rare_identifiers(clip, count=300))
        assert sorted(lengths) == [1, 2, 3]
        assert all(70 < number < 130 for number in lengths.values())

    def test_are_uniform_over_the_range(self, clip):
        ranks = [identifier.token_ids[0] for identifier in rare_identifiers(clip, count=400, num_tokens=1)]
        middle = sorted(rare_tokens(clip, default_rank_range(clip)))
        middle = middle[len(middle) // 2]
        assert 160 < sum(rank < middle for rank in ranks) < 240

    def test_a_range_of_one_s_own(self, clip):
        assert {identifier.token_ids for identifier in rare_identifiers(clip, count=1, rank_range=(48136, 48137))} == {
            (48136,)
        }

    def test_a_range_with_too_few(self, clip):
        with pytest.raises(
            ConfigError, match=r"count: 2 identifiers.*48136 to 48136 have only 1; allowed: ranks 0 to 49407"
        ):
            rare_identifiers(clip, count=2, num_tokens=1, rank_range=(48136, 48137))
        with pytest.raises(ConfigError, match="have only 0"):
            rare_identifiers(clip, count=1, rank_range=(49406, 60000))

    def test_a_length_that_the_paper_has_not(self, clip):
        with pytest.raises(ConfigError, match="num_tokens: 4 is not possible; allowed: 1 to 3"):
            rare_identifiers(clip, count=1, num_tokens=4)

    @pytest.mark.parametrize("token_ids", [(320, 320), (89, 3561, 1929), (49407,), (256,)])
    def test_ids_that_no_single_word_has_are_not_inverted(self, clip, token_ids):
        assert invert(clip, token_ids) is None


class TestWarnings:
    @pytest.mark.parametrize(("prompt", "class_prompt"), [
        ("a sks dog", "a dog"), ("a photo of sks dog", "a dog"), ("A SKS dog", "a dog"), ("a zwx dog", "a dog"),
        ("a sks dog in the garden", "a dog"), ("photo of ohwx man", None), ("(sks) dog", "dog"),
    ])  # fmt: skip
    def test_none_for_a_rare_identifier(self, clip, prompt, class_prompt):
        assert identifier_warnings(prompt, class_prompt, clip) == []

    @pytest.mark.parametrize(("prompt", "class_prompt", "reasons"), [
        ("a photo of my dog", "a photo of a dog", ["knows 'my' well"]),
        ("a emma dog", "a dog", ["knows 'emma' well"]),
        ("a labrador dog", "a dog", ["knows 'labrador' well"]),
        ("a dog", "a dog", ["'a dog' has no identifier", "the class prompt 'a dog' has all its words"]),
        ("A dog!", "a dog", ["has no identifier"]),
        ("a photo of a dog", None, ["has no identifier", "the model knows all its words"]),
        ("a xxy5syt00 dog", "a dog", ["'xxy5syt00' is 7 tokens", "1 to 3 work well"]),
        ("a xxy5syt00 dog", None, ["'xxy5syt00' is 7 tokens"]),
    ])  # fmt: skip
    def test_name_the_field_the_word_and_the_way_out(self, clip, prompt, class_prompt, reasons):
        (warning,) = identifier_warnings(prompt, class_prompt, clip)
        assert warning.startswith("subject.instance_prompt: ")
        assert "`lowmem-db identifiers`" in warning
        assert all(reason in warning for reason in reasons)

    def test_way_out_is_for_the_model_s_own_tokens(self, clip):
        for prompt in ("a dog", "a emma dog", "a xxy5syt00 dog"):
            (warning,) = identifier_warnings(prompt, "a dog", clip, "lowmem-db identifiers demo_if")
            assert "`lowmem-db identifiers demo_if`" in warning

    def test_every_rare_identifier_is_without_warning(self, tokenizer):
        for identifier in rare_identifiers(tokenizer, count=30):
            assert identifier_warnings(f"a {identifier.text} dog", "a dog", tokenizer) == []
