"""New words: rows beside the table, and spellings."""

import pytest
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch import nn
from transformers import CLIPTokenizer

from lowmem_db.errors import ConfigError
from lowmem_db.models.new_words import ExtendedEmbedding, NewWord, add_to_tokenizer, check_widths, expanded, initial_id
from lowmem_db.storage.places import DEMO_DIR
from tests.tiny_models import tiny_text_encoder


@pytest.fixture
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(DEMO_DIR / "tokenizer", local_files_only=True)


def test_new_rows_stand_beside_the_table() -> None:
    table = nn.Embedding(5, 3)
    extended = ExtendedEmbedding(table, 5, torch.arange(6.0).view(2, 3))
    found = extended(torch.tensor([[0, 6, 4, 5]]))
    assert torch.equal(found[0], torch.stack([table.weight[0], extended.rows[1], table.weight[4], extended.rows[0]]))
    assert extended.weight is table.weight
    assert list(extended.state_dict()) == ["weight"]


def test_only_the_last_rows_learn() -> None:
    table = nn.Embedding(5, 3).requires_grad_(False)
    extended = ExtendedEmbedding(table, 5, torch.arange(9.0).view(3, 3))
    before = extended.new_rows()
    extended.learn(2)
    assert [name for name, row in extended.named_parameters() if row.requires_grad] == ["learned"]
    assert torch.equal(extended.new_rows(), before)
    extended(torch.tensor([[1, 5, 6, 6]])).sum().backward()
    assert extended.learned is not None
    assert torch.equal(extended.learned.grad, torch.tensor([[2.0] * 3, [0.0] * 3]))
    assert table.weight.grad is None
    extended.stop_learning()
    assert torch.equal(extended.new_rows(), before)
    assert list(extended.parameters()) == [table.weight]


def test_rows_take_the_table_s_type() -> None:
    extended = ExtendedEmbedding(nn.Embedding(5, 3).bfloat16(), 5, torch.ones(1, 3))
    assert extended(torch.tensor([[5, 0]])).dtype == torch.bfloat16
    assert extended.rows.dtype == torch.float32


def test_text_encoder_with_words_reads_old_prompts_as_before() -> None:
    plain, torch_seed = tiny_text_encoder().eval(), torch.randint(0, 512, (2, 8))
    expected = plain(torch_seed)[0]
    plain.set_input_embeddings(ExtendedEmbedding(plain.get_input_embeddings(), 514, torch.ones(1, 16)))
    assert torch.equal(plain(torch_seed)[0], expected)


def test_words_are_read_as_their_own_tokens(tokenizer: CLIPTokenizer) -> None:
    size = len(tokenizer)
    add_to_tokenizer(tokenizer, [NewWord(token="<my-dog>"), NewWord(token="<hat>", num_vectors=3)])
    ids = tokenizer.encode(expanded(tokenizer, "a <my-dog> in a <hat>, dog"), add_special_tokens=False)
    known = [tokenizer.encode(word, add_special_tokens=False)[0] for word in ("a", "in", ",", "dog")]
    a, inside, comma, dog = known
    assert ids == [a, size, inside, a, size + 1, size + 2, size + 3, comma, dog]


@pytest.mark.parametrize("prompt", ["a <hat> on a <hat>.", "a dog", "<hat>", "a <my-dog> <hat>"])
def test_prompts_are_expanded_as_in_diffusers(tokenizer: CLIPTokenizer, prompt: str) -> None:
    add_to_tokenizer(tokenizer, [NewWord(token="<my-dog>"), NewWord(token="<hat>", num_vectors=3)])
    theirs = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, tokenizer)
    assert tokenizer.encode(expanded(tokenizer, prompt)) == tokenizer.encode(theirs)


@pytest.mark.parametrize("token", ["dog", "Dog", "<|endoftext|>", "a", "cat"])
def test_known_words_are_refused(tokenizer: CLIPTokenizer, token: str) -> None:
    with pytest.raises(ConfigError, match="is already a word of this model's vocabulary"):
        add_to_tokenizer(tokenizer, [NewWord(token=token)])


def test_the_same_word_twice_is_refused(tokenizer: CLIPTokenizer) -> None:
    with pytest.raises(ConfigError, match=r"b\.pt: '<hat>' is the word of model.embeddings: a\.pt too; leave one"):
        add_to_tokenizer(
            tokenizer, [NewWord(token="<hat>", origin=f"model.embeddings: {file}") for file in ("a.pt", "b.pt")]
        )


def test_words_like_any_other_are_not_read_inside_others(tokenizer: CLIPTokenizer) -> None:
    """Most embeddings of AUTOMATIC1111 are called so."""
    prompts = ["easyhatx", "xeasyhat", "an easyhat_2 easyhats"]
    before = [tokenizer.encode(prompt) for prompt in prompts]
    size = len(tokenizer)
    add_to_tokenizer(tokenizer, [NewWord(token="easyhat", num_vectors=2), NewWord(token="bad-hat.v2")])
    assert [tokenizer.encode(expanded(tokenizer, prompt)) for prompt in prompts] == before
    assert expanded(tokenizer, "easyhats, (easyhat)") == "easyhats, (easyhat easyhat_1)"
    read = tokenizer.encode(expanded(tokenizer, "(easyhat) bad-hat.v2, EASYHAT"), add_special_tokens=False)
    assert [number for number in read if number >= size] == [size, size + 1, size + 2, size]


def test_refused_word_says_where_it_is_from_and_what_to_do(tokenizer: CLIPTokenizer) -> None:
    word = NewWord(token="dog", origin="model.embeddings: dog.pt", way_out="rename the file")
    with pytest.raises(ConfigError, match=r"^model.embeddings: dog\.pt: 'dog' is already .*; rename the file$"):
        add_to_tokenizer(tokenizer, [word])
    with pytest.raises(ConfigError, match=r"^textual_inversion.token: 'dog' is already .* such as <my-dog>$"):
        add_to_tokenizer(tokenizer, [NewWord(token="dog")])


def test_initializer_is_one_token(tokenizer: CLIPTokenizer) -> None:
    assert initial_id(tokenizer, "dog") == tokenizer.encode("dog", add_special_tokens=False)[0]
    with pytest.raises(ConfigError, match=r"textual_inversion\.initializer: 'my dog' is 2 tokens"):
        initial_id(tokenizer, "my dog")


def test_words_of_another_kind_of_model_are_refused() -> None:
    word = NewWord(token="<hat>", vectors={"text_encoder": torch.zeros(1, 768)})
    check_widths(word, {"text_encoder": 768})
    with pytest.raises(ConfigError, match="'<hat>' has vectors of 768 numbers, but this model's have 768 and 1280"):
        check_widths(word, {"text_encoder": 768, "text_encoder_2": 1280})


def test_key_follows_the_rows() -> None:
    keys = {
        NewWord(token="<hat>", vectors={"text_encoder": torch.full((1, 2), value)}).key() for value in (0.0, 0.0, 1.0)
    }
    assert len(keys) == 2
