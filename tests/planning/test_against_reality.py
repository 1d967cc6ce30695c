"""Predictions from shapes alone, against real steps: tensors that are followed, and the profiler's allocations."""

from dataclasses import replace

import pytest

from lowmem_db.config.strategy import Strategy, plain_strategy
from lowmem_db.models.source import find_model
from lowmem_db.planning.cards import CPU
from lowmem_db.planning.phases import trace_train
from lowmem_db.planning.verify import measure_train
from tests.planning.conftest import make_config, make_subject
from tests.planning.reality import CPU as CPU_DEVICE
from tests.planning.reality import profiled_train_peak

STRATEGIES = {
    "plain": {},
    "layers": {"checkpointing": "layers"},
    "in backward": {"optimizer_in_backward": True},
    "segments": {"checkpointing": "segments", "optimizer_in_backward": True},
    "nested": {"checkpointing": "nested", "optimizer_in_backward": True},
    "mixture": {"checkpointing": {"unet.up_blocks.2": "segments"}, "optimizer_in_backward": True},
    "streamed": {"optimizer_in_backward": True, "stream_optimizer_state": True},
    "all": {
        "checkpointing": "nested", "offload_checkpoints": True, "optimizer_in_backward": True,
        "stream_optimizer_state": True,
    },
}  # fmt: skip


def strategy_of(config, changes) -> Strategy:
    clipping = "update_rms" if changes.get("optimizer_in_backward") else "global"
    return replace(plain_strategy(config), clipping=clipping, **changes)


@pytest.mark.parametrize("name", STRATEGIES)
def test_peak_is_that_of_real_tensors(name):
    optimizer = "adamw8bit" if name in {"nested", "streamed"} else "adamw"
    config = make_config(
        prior__enabled=False, training__train_text_encoder=True, training__train_batch_size=3,
        optimizer__name=optimizer,
        ema__enabled=name in {"plain", "segments"},
    )  # fmt: skip
    strategy = strategy_of(config, STRATEGIES[name])
    predicted = trace_train(make_subject(config, CPU), strategy)
    model = find_model("demo")
    followed = measure_train(config, strategy, model, CPU_DEVICE, num_steps=1)
    assert predicted.peak.total == pytest.approx(followed, rel=0.005)
    profiled = profiled_train_peak(config, strategy, model)
    assert predicted.peak.total + predicted.host_bytes == pytest.approx(profiled, rel=0.02)
    assert (predicted.host_bytes > 0) == strategy.stream_optimizer_state
