"""Strategies below one that ran out of memory: each needs less, and none changes what a step computes."""

import pytest

from lowmem_db.config import choices
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import FIELDS, changed, open_paths
from lowmem_db.planning.cards import ASSUMED, CPU, Card
from lowmem_db.planning.ladder import Ladder
from lowmem_db.planning.plan import Planner
from tests.planning.conftest import make_config, make_run

GIB = 1 << 30
EXACT = {field.path for field in FIELDS if field.is_exact}


@pytest.fixture(scope="module")
def tiny(tiny_model) -> dict[str, object]:
    return {
        "model__base": str(tiny_model), "data__resolution": 32, "optimizer__name": "adamw8bit",
        "training__train_batch_size": 4, "prior__enabled": False, "sampling__prompts": ["a sks dog"],
        "memory__fused_layers": False, "memory__offload_checkpoints": False, "memory__weights": "fp32",
        "training__mixed_precision": "no",
    }  # fmt: skip


def planned(config: Config, card: Card) -> tuple[Config, Ladder]:
    chosen = Planner(make_run(config, card)).plan(8 * GIB).config
    return chosen, Ladder(make_run(chosen, card), open_paths(config), 8 * GIB)


@pytest.fixture(scope="module")
def on_card(tiny) -> tuple[Config, Ladder]:
    return planned(make_config(**tiny), ASSUMED)


def values(config: Config) -> dict[str, object]:
    return {field.path: field.of(config) for field in FIELDS}


def test_rungs_for_training_need_less_and_less_and_compute_the_same(on_card: tuple[Config, Ladder]) -> None:
    strategy, ladder = on_card
    assert strategy.training.clipping == "global"
    found = [strategy]
    for _ in range(2):
        below = ladder.below(found[-1], "train", "device")
        assert below is not None
        found.append(below)
    sizes = [ladder._bytes(each, "train", "device") for each in found]
    assert sizes == sorted(set(sizes), reverse=True)
    for each in found:
        differing = {path for path, value in values(each).items() if value != values(strategy)[path]}
        assert differing <= EXACT
        assert not each.memory.optimizer_in_backward, "which cannot clip by the joint norm"
    assert "GiB" in ladder.smallest()


def test_samples_need_less_without_a_change_of_training(on_card: tuple[Config, Ladder]) -> None:
    strategy, ladder = on_card
    below = ladder.below(strategy, "sample", "device")
    assert below is not None
    sizes = [ladder._bytes(each, "sample", "device") for each in (strategy, below)]
    assert sizes[1] < sizes[0]


def test_out_of_host_memory_less_is_kept_on_the_host(on_card: tuple[Config, Ladder]) -> None:
    strategy, ladder = on_card
    streamed = changed(strategy, {"memory.stream_optimizer_state": True})
    below = ladder.below(streamed, "train", "host")
    assert below is not None
    assert not below.memory.stream_optimizer_state
    assert ladder._bytes(below, "train", "host") < ladder._bytes(streamed, "train", "host")


def test_batches_are_split_and_what_the_user_gave_stays(tiny) -> None:
    given = {
        "memory__optimizer_in_backward": False,
        "memory__checkpointing": "nested",
        "memory__tiled_samples": False,
    }
    strategy, ladder = planned(make_config(**tiny, **given), CPU)
    half = ladder.below(strategy, "train", "device")
    assert half is not None
    quarter = ladder.below(half, "train", "host")
    assert quarter is not None
    assert [each.memory.micro_batches for each in (strategy, half, quarter)] == [0, 2, 4]
    assert ladder.below(quarter, "train", "device") is None
    assert ladder.below(strategy, "sample", "device") is None
    with_dropout = strategy.model_copy(update={"lora": strategy.lora.model_copy(update={"dropout": 0.1})})
    assert not [*choices.micro_batches(with_dropout)]
