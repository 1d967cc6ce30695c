"""Predictions from shapes alone, against real steps: tensors that are followed, and the profiler's allocations."""

import pytest
from torch import nn

from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import changed, resolve
from lowmem_db.models.finding import find_model
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.loading import META
from lowmem_db.planning.cards import CPU
from lowmem_db.planning.measured import measure_train
from lowmem_db.planning.phases import TracedRun, trace_train
from tests.planning.conftest import make_config, make_run
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
    "streamed weights": {
        "checkpointing": "segments", "optimizer_in_backward": True, "stream_weights": True,
    },
    "all streamed": {
        "checkpointing": "nested", "offload_checkpoints": True, "optimizer_in_backward": True,
        "stream_optimizer_state": True, "stream_weights": True,
    },
    "step on the host": {
        "checkpointing": "segments", "optimizer_in_backward": True, "stream_optimizer_state": True,
        "stream_weights": True, "optimizer_step": "host",
    },
    "nested, step on the host": {
        "checkpointing": "nested", "optimizer_in_backward": True, "stream_optimizer_state": True,
        "stream_weights": True, "optimizer_step": "host",
    },
}  # fmt: skip


QUICK = {"plain", "in backward", "segments", "mixture", "all", "all streamed", "step on the host"}  # each technique
ON_HOST = ("step on the host", "nested, step on the host")
STREAMED = {"memory__checkpointing": "segments", "memory__stream_weights": True}


def resolved(config, changes) -> Config:
    return resolve(changed(config, {f"memory.{name}": value for name, value in changes.items()}))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in STRATEGIES]
)
def test_peak_is_that_of_real_tensors(name):
    optimizer = "adamw8bit" if name in {"nested", "streamed", "all streamed", *ON_HOST} else "adamw"
    config = make_config(
        prior__enabled=False, training__train_text_encoder=True,
        training__train_batch_size=8 if name in ON_HOST else 4,  # with 4, oneDNN's second copy of a gradient is 2.5 %
        optimizer__name=optimizer,
        ema__enabled=name in {"plain", "segments", "streamed weights", "step on the host"},
    )  # fmt: skip
    config = resolved(config, STRATEGIES[name])
    predicted = trace_train(make_run(config, CPU))
    model = find_model("demo")
    if name in {"plain", "all", "streamed weights"}:
        followed = measure_train(config, model, CPU_DEVICE, num_steps=1).tensor_bytes
        assert predicted.peak.total == pytest.approx(followed, rel=0.005)
    profiled = profiled_train_peak(config, model)
    assert predicted.peak.total + predicted.host_bytes == pytest.approx(profiled, rel=0.02)
    assert (predicted.host_bytes > 0) == bool(config.memory.stream_optimizer_state or config.memory.stream_weights)


@pytest.mark.parametrize(
    "fields",
    [
        {"lora__dora": True},
        STREAMED,
        pytest.param({}, marks=pytest.mark.long),
        pytest.param({"memory__checkpointing": "segments"}, marks=pytest.mark.long),
    ],
)
def test_peak_of_adapters_is_that_of_real_tensors(fields):
    config = make_config(
        prior__enabled=False, training__train_text_encoder=True, training__train_batch_size=4, lora__enabled=True,
        lora__targets=["attention", "feed_forward", "convolutions"], ema__enabled=True, **fields,
    )  # fmt: skip
    config = resolve(config)
    predicted = trace_train(make_run(config, CPU))
    assert predicted.peak.total + predicted.host_bytes == pytest.approx(
        profiled_train_peak(config, find_model("demo")), rel=0.02
    )


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["none", "segments"])
def test_peak_of_a_model_of_the_size_of_sd15(placement, monkeypatch):
    config = make_config(
        model__base="stable-diffusion-v1-5/stable-diffusion-v1-5", data__resolution=256, prior__enabled=False,
        optimizer__name="adamw8bit", memory__optimizer_in_backward=True,
    )  # fmt: skip
    run = make_run(resolved(config, {"checkpointing": placement}), CPU)
    predicted = trace_train(run).peak.total
    load = ModelFolder.load
    monkeypatch.setattr(ModelFolder, "load", lambda model, name, device, dtype: _zeros(load(model, name, META, dtype)))
    assert predicted == pytest.approx(profiled_train_peak(run.config, run.model), rel=0.03)


def _zeros(module: nn.Module) -> nn.Module:
    """Return a module on the CPU; the bytes of a step do not depend on its values."""
    module.to_empty(device="cpu")
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.zero_()
    return module


@pytest.mark.parametrize("trains_text_encoders", [False, True])
def test_peak_of_sdxl_is_that_of_real_tensors(tiny_sdxl, trains_text_encoders):
    config = make_config(
        model__base=str(tiny_sdxl), data__resolution=32, training__train_text_encoder=trains_text_encoders,
        training__train_batch_size=4,
    )  # fmt: skip
    config, model = resolve(config), find_model(str(tiny_sdxl))
    predicted = trace_train(TracedRun(config=config, model=model, card=CPU))
    assert predicted.peak.total == pytest.approx(profiled_train_peak(config, model), rel=0.02)
