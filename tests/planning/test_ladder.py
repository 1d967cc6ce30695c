"""Strategies below one that ran out of memory: each needs less, and none changes what a step computes."""

import pytest

from lowmem_db.config import choices
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import FIELDS, open_paths
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
        "training__train_batch_size": 4, "prior__enabled": False, "training__max_grad_norm": None,
        "sampling__prompts": ["a sks dog"],
    }  # fmt: skip


def planned(config: Config, card: Card) -> tuple[Config, Ladder]:
    chosen = Planner(make_run(config, card)).plan(8 * GIB).config
    return chosen, Ladder(make_run(chosen, card), open_paths(config), 8 * GIB)


def values(config: Config) -> dict[str, object]:
    return {field.path: field.of(config) for field in FIELDS}


def rungs(strategy: Config, ladder: Ladder, phase, place) -> list[Config]:
    found = [strategy]
    while (below := ladder.below(found[-1], phase, place)) is not None:
        found.append(below)
        assert len(found) < 40
    return found


def test_rungs_for_training_need_less_and_less_and_compute_the_same(tiny) -> None:
    strategy, ladder = planned(make_config(**tiny), ASSUMED)
    found = rungs(strategy, ladder, "train", "device")
    assert len(found) >= 4
    sizes = [ladder._bytes(each, "train", "device") for each in found]
    assert sizes == sorted(set(sizes), reverse=True)
    for each in found:
        changed = {path for path, value in values(each).items() if value != values(strategy)[path]}
        assert changed <= EXACT
    last = found[-1].memory
    assert last.stream_optimizer_state
    assert last.optimizer_in_backward
    assert "GiB" in ladder.smallest()


def test_batches_are_split_where_the_optimizer_steps_afterwards(tiny) -> None:
    given = {"memory__optimizer_in_backward": False, "memory__checkpointing": "nested", "memory__fused_layers": False}
    strategy, ladder = planned(make_config(**tiny, **given), CPU)
    found = rungs(strategy, ladder, "train", "device")
    assert [each.memory.micro_batches for each in found] == [0, 2, 4]
    with_dropout = strategy.model_copy(update={"lora": strategy.lora.model_copy(update={"dropout": 0.1})})
    assert not [*choices.micro_batches(with_dropout)]


def test_samples_are_tiled_first(tiny) -> None:
    strategy, ladder = planned(make_config(**tiny), ASSUMED)
    below = ladder.below(strategy, "sample", "device")
    assert below is not None
    sizes = [ladder._bytes(each, "sample", "device") for each in (strategy, below)]
    assert sizes[1] < sizes[0]


def test_what_the_user_gave_stays(tiny) -> None:
    given = {"memory__checkpointing": "none", "memory__optimizer_in_backward": False, "memory__tiled_samples": False}
    strategy, ladder = planned(make_config(**tiny, **given), CPU)
    assert ladder.below(strategy, "train", "device") is None
    assert ladder.below(strategy, "sample", "device") is None


def test_clipping_by_the_joint_norm_keeps_the_step_after_the_backward_pass(tiny) -> None:
    strategy, ladder = planned(make_config(**tiny | {"training__max_grad_norm": 1.0}), CPU)
    assert strategy.training.clipping == "global"
    found = rungs(strategy, ladder, "train", "host")
    assert len(found) > 1
    assert not any(each.memory.optimizer_in_backward for each in found)


def test_out_of_host_memory_nothing_more_goes_to_the_host(tiny) -> None:
    given = {"memory__optimizer_in_backward": True, "memory__weights": "bf16_extra_bits"}
    config = make_config(**tiny, **given)
    strategy, ladder = planned(config, ASSUMED)
    smallest = rungs(strategy, ladder, "train", "device")[-1]
    assert smallest.memory.stream_optimizer_state
    below = ladder.below(smallest, "train", "host")
    assert below is not None
    assert ladder._bytes(below, "train", "host") < ladder._bytes(smallest, "train", "host")
