"""A model whose weights do not fit a card is drawn from with streamed weights."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowmem_db.config.loading import load_config, write_yaml
from lowmem_db.config.schema import Config
from lowmem_db.engine.source import ImageSource, find_source, streamed_if_needed
from lowmem_db.errors import BudgetError, LowmemDbError
from lowmem_db.storage.run_folder import MARKER, RunFolder

CUDA = torch.device("cuda")


@pytest.fixture
def source(tiny_model: Path) -> ImageSource:
    return find_source(str(tiny_model))


class Card:
    """Has room for streamed weights alone."""

    def __init__(self, *, streamed_fit: bool = True, words: str = "CUDA out of memory") -> None:
        self.tried: list[bool] = []
        self.streamed_fit, self.words = streamed_fit, words

    def __call__(self, source: ImageSource) -> str:
        self.tried.append(source.streams_weights)
        if source.streams_weights and self.streamed_fit:
            return "drawn"
        raise BudgetError("nothing here needs less") from RuntimeError(self.words)


def test_out_of_memory_weights_stream(source: ImageSource, capsys: pytest.CaptureFixture[str]) -> None:
    card = Card()
    assert streamed_if_needed(source, card, CUDA) == "drawn"
    assert card.tried == [False, True]
    assert "out of memory (CUDA out of memory); continuing with streamed weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wish", "device", "card"),
    [
        (False, CUDA, Card()),
        (True, CUDA, Card(streamed_fit=False)),
        (None, torch.device("cpu"), Card()),
        (None, CUDA, Card(words="DefaultCPUAllocator: can't allocate memory")),
        (None, CUDA, Card(words="unrelated")),
    ],
)
def test_nothing_is_tried_again_where_that_is_of_no_use(
    source: ImageSource, wish: bool | None, device: torch.device, card: Card
) -> None:
    with pytest.raises(BudgetError):
        streamed_if_needed(replace(source, stream_weights=wish), card, device)
    assert card.tried == [wish is True]


def test_a_run_is_drawn_as_it_was_trained_or_as_asked(source: ImageSource) -> None:
    fields = {
        "model.base": "demo",
        "subject.instance_dir": "photos",
        "subject.instance_prompt": "a sks dog",
        "prior.enabled": False,
        "output_dir": "run",
        "memory.stream_weights": True,
        "memory.checkpointing": "segments",
        "memory.optimizer_in_backward": True,
    }
    of_run = replace(source, run_config=load_config(None, list(fields.items())))
    assert of_run.streams_weights
    assert not replace(of_run, stream_weights=False).streams_weights
    assert not source.streams_weights


def test_damaged_final_model_is_written_again_and_not_downloaded(tiny_config: Config, tiny_model: Path) -> None:
    run = RunFolder(tiny_config.output_dir)
    shutil.copytree(tiny_model, run.final_dir)
    write_yaml(tiny_config, run.config_file)
    (run.final_dir / "model_index.json").write_text("{")
    with pytest.raises(LowmemDbError, match=r"is damaged .*the run has no checkpoint to write it from; train again"):
        find_source(str(run.root))
    run.checkpoint_dir(3).mkdir(parents=True)
    (run.checkpoint_dir(3) / MARKER).write_text("{}")
    with pytest.raises(LowmemDbError) as refused:
        find_source(str(run.root))
    assert f"--step 3; or delete {run.final_dir} and write it again: lowmem-db train" in str(refused.value)
    assert "download" not in str(refused.value)
