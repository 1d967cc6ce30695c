"""The smallest budget is the smallest, and the message says which fields keep it from being smaller."""

import re

import pytest

from lowmem_db import environment
from lowmem_db.config.strategy import changed, key_of
from lowmem_db.errors import BudgetError
from lowmem_db.planning import predictor
from lowmem_db.planning.cards import ASSUMED
from lowmem_db.planning.needs import Needs
from lowmem_db.planning.phases import trace_train
from lowmem_db.planning.plan import Planner, plan
from lowmem_db.planning.smallest import find_smallest, given_fields, in_the_way, without
from lowmem_db.planning.target import Target
from lowmem_db.records import MemoryParts, PhaseMemory
from tests.planning.conftest import make_config, make_run

GIB = 1 << 30


@pytest.fixture(scope="module")
def tiny(tiny_model) -> dict[str, object]:
    """A run whose activations are gigabytes."""
    return {
        "model__base": str(tiny_model), "data__resolution": 256, "optimizer__name": "adamw8bit",
        "training__train_batch_size": 64, "prior__enabled": False,
    }  # fmt: skip


@pytest.fixture(scope="module")
def opened(tiny) -> Planner:
    """A planner for that run with everything left open; its traces serve several tests."""
    return Planner(make_run(make_config(**tiny)))


@pytest.mark.long
def test_nothing_needs_less(tiny):
    fixed = {
        "memory__weights": "bf16_extra_bits", "memory__optimizer_in_backward": True,
        "memory__stream_optimizer_state": True,
    }  # fmt: skip
    planner = Planner(make_run(make_config(**tiny | fixed)))
    kept, _ = planner.candidates()
    assert len(kept) >= 10
    found = planner.smallest()
    exact = {planner.needs.of_phases(planner.needs.phases(strategy)) for strategy in kept}
    assert found.num_bytes == min(exact) < max(exact)
    assert planner.plan(found.num_bytes).peak_bytes == found.num_bytes
    with pytest.raises(BudgetError):
        planner.plan(found.num_bytes - 1)


def test_the_one_with_the_most_measures_is_not_always_the_smallest():

    class Fixed(Needs):
        def __init__(self, needed):
            self.needed = needed
            self.traced = []

        def at_least(self, strategy):
            return self.needed[strategy.memory.checkpointing][0]

        def training(self, strategy):
            return self.needed[strategy.memory.checkpointing][1]

        def phases(self, strategy):
            self.traced.append(strategy.memory.checkpointing)
            return [PhaseMemory(name=strategy.memory.checkpointing, parts=MemoryParts(0, 0, 0, 0, 0))]

        def of_phases(self, phases):
            return max(self.needed[phases[0].name])

    strategies = Planner(make_run(make_config())).candidates()[0]
    by_placement = {str(each.memory.checkpointing): each for each in strategies}
    some = [by_placement[name] for name in ("none", "segments", "nested")]
    needs = Fixed({"none": (5, 9), "segments": (2, 4), "nested": (3, 6)})
    assert find_smallest(needs, some).strategy.memory.checkpointing == "segments"
    assert needs.traced == ["segments"], "the others need more at the least or in training"


@pytest.mark.long
def test_refusal_names_what_the_file_gives_and_leaving_it_out_works(tiny):
    given = {"memory__checkpointing": "none", "training__clipping": "per_tensor"}
    config = make_config(**tiny | given)
    with pytest.raises(BudgetError, match=r"sets memory\.checkpointing=none; without that, ") as raised:
        plan(config, Target(card=ASSUMED, budget_bytes=GIB // 2))
    budgets = [float(size) for size in re.findall(r"([\d.]+)GiB", str(raised.value))]
    assert budgets[0] > budgets[1]
    assert "training.clipping" not in str(raised.value)
    left_out = changed(config, {"memory.checkpointing": None})
    found = plan(left_out, Target(card=ASSUMED, budget_bytes=int(budgets[1] * GIB)))
    assert found.peak_bytes <= budgets[1] * GIB
    with pytest.raises(BudgetError, match="within the budget"):
        plan(config, Target(card=ASSUMED, budget_bytes=int(budgets[1] * GIB)))


def test_nothing_is_named_where_nothing_is_given(opened):
    with pytest.raises(BudgetError, match="that is enough is") as raised:
        opened.plan(GIB // 2)
    assert "The configuration sets" not in str(raised.value)


def test_no_step_is_traced_twice_to_name_what_is_in_the_way(tiny, opened, monkeypatch):
    def trace_once(run):
        assert ("train", key_of(run.config, "train")) not in opened.traces.phases
        return trace_train(run)

    opened.smallest()
    monkeypatch.setattr(predictor, "trace_train", trace_once)
    given = Planner(make_run(make_config(**tiny, memory__checkpointing="layers")), opened.traces)
    with pytest.raises(BudgetError, match=r"The configuration sets memory\.checkpointing=layers"):
        given.plan(GIB // 2)


def test_fields_that_change_nothing_are_not_in_the_way(tiny, opened):
    given = {"memory__checkpointing": "layers", "memory__weights": "bf16_stochastic", "training__clipping": "lagged"}
    config = make_config(**tiny | given)
    assert [field.path for field in given_fields(config)] == [
        "memory.weights", "memory.checkpointing", "training.clipping",
    ]  # fmt: skip
    assert without(config, given_fields(config)) == opened.run.config
    named = in_the_way(config, opened.needs, opened.smallest())
    assert [field.path for field in named] == ["memory.checkpointing"]


def test_class_images_are_planned_with_the_frozen_weights_that_are_chosen(monkeypatch):
    """What is left open is open before training too: nf4 where bf16 does not fit class images."""
    monkeypatch.setattr(environment, "is_installed", lambda name: True)
    fields = {"lora__enabled": True, "lora__rank": 1, "memory__checkpointing": "nested", "data__resolution": 32}
    fields |= {"memory__stream_weights": False}
    planner = Planner(make_run(make_config(**fields, prior__sample_batch_size=256)))
    needed = {each.lora.base_weights: planner.needs.before_training(each) for each in planner.candidates()[0]}
    assert needed["nf4"] < needed["bf16"]
    found = planner.plan(needed["bf16"] - 1)
    assert found.config.lora.base_weights == "nf4"
    assert found.phases[0].parts.total == max(phase.parts.total for phase in found.phases)
    assert any(each.reason.endswith("more than the budget, before training") for each in found.refused)
