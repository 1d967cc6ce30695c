"""Files of learned embeddings: ours, and those of other programs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowmem_db.errors import LowmemDbError, ModelError
from lowmem_db.models.embedding_file import read_base, read_embedding, write_embedding
from lowmem_db.models.new_words import NewWord
from lowmem_db.models.suggested_base import SuggestedBase

ROWS = torch.arange(6.0).view(2, 3)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "learned_embeds.safetensors"
    word = NewWord(token="<hat>", num_vectors=2, vectors={"text_encoder": ROWS})
    write_embedding(file, word, SuggestedBase(fields={"base": "demo"}))
    assert {name: rows.tolist() for name, rows in load_file(file).items()} == {"<hat>": ROWS.tolist()}
    word = read_embedding(file)
    assert (word.token, word.num_vectors, read_base(file)) == ("<hat>", 2, SuggestedBase(fields={"base": "demo"}))
    assert torch.equal(word.vectors["text_encoder"], ROWS)


def test_sdxl_has_the_names_of_other_programs(tmp_path: Path) -> None:
    vectors = {"text_encoder": ROWS, "text_encoder_2": torch.ones(2, 5)}
    write_embedding(tmp_path / "x.safetensors", NewWord(token="<hat>", num_vectors=2, vectors=vectors), SuggestedBase())
    found = load_file(tmp_path / "x.safetensors")
    assert {name: tuple(rows.shape) for name, rows in found.items()} == {"clip_l": (2, 3), "clip_g": (2, 5)}
    assert read_embedding(tmp_path / "x.safetensors").vectors.keys() == vectors.keys()


@pytest.mark.parametrize(
    ("content", "token"),
    [
        ({"<hat>": ROWS}, "<hat>"),
        ({"<hat>": ROWS[0].clone()}, "<hat>"),
        ({"emb_params": ROWS}, "my-hat"),
        ({"clip_l": ROWS, "clip_g": ROWS.clone()}, "my-hat"),
    ],
)
def test_files_of_other_programs_are_read(tmp_path: Path, content: dict[str, torch.Tensor], token: str) -> None:
    save_file(content, tmp_path / "my-hat.safetensors")
    torch.save(content, tmp_path / "my-hat.pt")
    for suffix in ("safetensors", "pt"):
        word = read_embedding(tmp_path / f"my-hat.{suffix}")
        assert (word.token, word.vectors["text_encoder"].shape[-1]) == (token, 3)
    assert read_base(tmp_path / "my-hat.pt") == SuggestedBase()


def test_pickled_files_of_automatic1111_are_read(tmp_path: Path) -> None:
    content = {
        "string_to_token": {"*": 265}, "string_to_param": {"*": torch.nn.Parameter(ROWS)}, "name": "my-hat", "step": 9,
    }  # fmt: skip
    torch.save(content, tmp_path / "file.pt")
    word = read_embedding(tmp_path / "file.pt")
    assert (word.token, word.num_vectors) == ("my-hat", 2)
    assert not word.vectors["text_encoder"].requires_grad


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code was run",)


@pytest.mark.parametrize(
    "content",
    [
        Evil(),
        {"a": ROWS, "b": ROWS},
        {},
        [ROWS],
        {"a": "b"},
        {"a": torch.ones(1, 2, 3)},
        {"a": ROWS / 0},
        {"a": ROWS.long()},
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: object, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ModelError, match=r"model.embeddings: .*file\.pt"):
        read_embedding(tmp_path / "file.pt")
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["file.pt", "file.safetensors", "missing.bin"])
def test_damaged_and_missing_files_are_refused(tmp_path: Path, name: str) -> None:
    if name.startswith("file"):
        (tmp_path / name).write_bytes(b"\x80\x04 no file of tensors")
    with pytest.raises(LowmemDbError, match=rf"^model.embeddings: .*{name}.*(allowed: a file of|get the file again)"):
        read_embedding(tmp_path / name)
