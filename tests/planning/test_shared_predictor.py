"""What each process needs of a model that is shared out between them."""

from typing import Any

import pytest

from lowmem_db.config.strategy import resolve
from lowmem_db.planning.plan import Planner
from lowmem_db.planning.shared_predictor import SharedPredictor
from tests.planning.conftest import make_config, make_run

_STRATEGY = {
    "memory__weights": "bf16_extra_bits",
    "memory__optimizer_in_backward": True,
    "memory__checkpointing": "segments",
    "memory__fused_layers": False,
    "optimizer__name": "adamw8bit",
    "training__train_text_encoder": True,
    "sampling__prompts": ["a dog"],
    "sampling__num_images": 1,
}
_FULL = {"distributed__sharding": "full"}


def _planner(**fields: Any) -> Planner:
    return Planner(make_run(make_config(**_STRATEGY | fields)))


@pytest.mark.parametrize("count", [2, 4])
def test_process_holds_its_share_and_computes_as_much(count: int) -> None:
    of_one, shared = _planner().plan(1 << 36), _planner(**_FULL, distributed__num_processes=count).plan(1 << 36)
    one, part = (next(each.parts for each in plan.phases if each.name == "train") for plan in (of_one, shared))
    assert part.weights <= 1.1 / count * one.weights
    assert part.optimizer_state <= 1.1 / count * one.optimizer_state
    assert part.activations == one.activations
    assert 0 < part.other - one.other < one.weights  # of one layer
    sampled, drawn = (next(each.parts for each in plan.phases if each.name == "sample") for plan in (of_one, shared))
    assert drawn.weights < sampled.weights
    assert drawn.activations == sampled.activations
    assert shared.host_peak_bytes >= of_one.host_peak_bytes  # which loads the whole model, and saves it
    assert shared.sent_bytes > 0


def test_gradients_of_a_share_are_kept_until_the_step() -> None:
    after = {"memory__optimizer_in_backward": False, "distributed__num_processes": 2}
    planner = _planner(**_FULL, **after)
    strategy = resolve(planner.run.config)
    predictor = planner.predictor
    assert isinstance(predictor, SharedPredictor)
    trained = predictor.resident(strategy).trained_bytes
    assert trained < 0.6 * _planner(**after).predictor.resident(strategy).trained_bytes
    assert trained <= predictor.train(strategy).peak.gradients < 1.2 * trained


def test_prediction_from_blocks_is_that_of_the_trace() -> None:
    planner = _planner(**_FULL, distributed__num_processes=2)
    strategy = resolve(planner.run.config)
    traced = planner.predictor.train(strategy).peak.total
    assert planner.predictor.train_bytes(strategy) == pytest.approx(traced, rel=0.02)


def test_nothing_is_tried_that_is_refused() -> None:
    fields = {name: value for name, value in _STRATEGY.items() if not name.startswith("memory")}
    kept, refused = Planner(make_run(make_config(**fields, **_FULL, distributed__num_processes=2))).candidates()
    assert refused == []
    assert not any(strategy.memory.stream_weights or strategy.memory.stream_optimizer_state for strategy in kept)
    assert {strategy.memory.weights for strategy in kept} == {"bf16_extra_bits"}
