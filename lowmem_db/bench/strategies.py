"""The strategies that are measured: names, and the fields of a configuration behind them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lowmem_db import environment
from lowmem_db.bench.setting import Setting
from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config
from lowmem_db.config.strategy import resolve
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.random_weights import RandomModel

Fields = dict[str, Any]
_TRAINED_24_BITS: Fields = {
    "optimizer.name": "adamw8bit",
    "memory.weights": "bf16_extra_bits",
    "memory.optimizer_in_backward": True,
    "memory.checkpointing": "none",
}
_AFTER_BACKWARD: Fields = _TRAINED_24_BITS | {"memory.optimizer_in_backward": False}
_STREAMED: Fields = _TRAINED_24_BITS | {"memory.checkpointing": "segments", "memory.stream_optimizer_state": True}
FP32: Fields = {"optimizer.name": "adamw", "memory.weights": "fp32", "memory.checkpointing": "none"}
TECHNIQUES: dict[str, Fields] = {
    "in_backward": _TRAINED_24_BITS,
    "streamed": _STREAMED,
    "after_backward": _AFTER_BACKWARD,
    "segments": _TRAINED_24_BITS | {"memory.checkpointing": "segments"},
    "stochastic": _TRAINED_24_BITS | {"memory.weights": "bf16_stochastic"},
    "layers": _TRAINED_24_BITS | {"memory.checkpointing": "layers"},
    "nested": _TRAINED_24_BITS | {"memory.checkpointing": "nested"},
    "streamed_weights": _STREAMED | {"memory.stream_weights": True},
    "offloaded": _STREAMED | {"memory.offload_checkpoints": True},
    "fp32": FP32,
    "lora": {"lora.enabled": True, "memory.checkpointing": "none"},
}
"""By name; the first ones matter most."""
_SDXL: dict[str, Fields] = {
    "sdxl_4gb": _STREAMED | {"memory.stream_weights": True},
    "sdxl_8gb": _STREAMED | {"memory.offload_checkpoints": True, "training.train_text_encoder": False},
    "sdxl_12gb": _STREAMED | {"training.train_text_encoder": False},
    "sdxl_24gb": _TRAINED_24_BITS | {"memory.checkpointing": "segments"},
}
_NUM_TINY = 3


@dataclass(frozen=True)
class Strategy:
    """A way to train a model.

    Attributes:
        name: What it is called.
        config: The configuration, resolved.
        model: The model.
    """

    name: str
    config: Config
    model: ModelFolder


def strategies(setting: Setting) -> Iterator[Strategy]:
    """Yield the strategies whose memory is measured."""
    for name in techniques(setting):
        yield strategy(setting, name, TECHNIQUES[name])
    if setting.tiny:
        return
    for name in list(_SDXL)[:1] if setting.quick else _SDXL:
        yield strategy(setting, name, _SDXL[name], setting.bundled("sdxl_base"), resolution=1024)


def techniques(setting: Setting) -> list[str]:
    """Return the names of the techniques that are measured here."""
    names = [name for name in TECHNIQUES if name != "lora" or environment.is_installed("peft")]
    return names[:_NUM_TINY] if setting.tiny else names[: 2 * _NUM_TINY] if setting.quick else names


def strategy(
    setting: Setting, name: str, fields: Fields, model: RandomModel | None = None, resolution: int | None = None
) -> Strategy:
    """Return one strategy, with everything that its fields leave open as in a run that nobody planned."""
    model = model or setting.model
    return Strategy(name, resolve(configuration(setting, fields, resolution)), model)


def configuration(setting: Setting, fields: Fields, resolution: int | None = None) -> Config:
    """Return the configuration of a small run: one photo and one class image a step, all of them made up."""
    common: Fields = {
        "model.base": setting.model.name,
        "subject.instance_dir": "photos",
        "subject.instance_prompt": "a sks dog",
        "subject.class_prompt": "a dog",
        "output_dir": "run",
        "data.resolution": resolution or (64 if setting.tiny else 512),
        "training.train_batch_size": 1,
        "training.train_text_encoder": True,
    }
    return load_config(None, list((common | fields).items()))
