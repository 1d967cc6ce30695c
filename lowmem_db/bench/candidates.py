"""The stage ``candidates``: what might become faster, each beside the same thing without it."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from lowmem_db import environment, nvidia
from lowmem_db.bench.plain_loop import PlainLoop, adamw
from lowmem_db.bench.setting import Setting
from lowmem_db.bench.stage import Measurement, Row, Stage
from lowmem_db.bench.steps import Steps, seconds_in_turn
from lowmem_db.bench.strategies import FP32, TECHNIQUES, Fields, strategy
from lowmem_db.memory import fused_layers

_UNMEASURED: Row = {"seconds_per_step": None, "base_seconds_per_step": None, "ratio": None}


def _measurements(setting: Setting) -> Iterator[Measurement]:
    yield "channels_last", partial(_on_a_card, setting, partial(_fused_layers, setting, {"memory.channels_last": True}))
    yield "channels_last, plain loop", partial(_in_plain_loop, setting, _to_channels_last)
    yield "fused_layers", partial(_fused_layers, setting, {})
    yield "compile", partial(_on_a_card, setting, partial(_compiled, setting))
    yield "xformers", partial(_on_a_card, setting, partial(_xformers, setting))
    yield "expandable_segments", partial(_on_a_card, setting, partial(_expandable_segments, setting))


def _on_a_card(setting: Setting, measure: Callable[[], Row]) -> Row:
    return measure() if setting.is_cuda else _skipped("is measured on CUDA devices alone")


def _skipped(reason: str) -> Row:
    return _UNMEASURED | {"skipped": reason}


def _in_turn(setting: Setting, candidate: Callable[[], object], base: Callable[[], object]) -> Row:
    seconds = seconds_in_turn({"candidate": candidate, "base": base}, setting)
    return {
        "seconds_per_step": seconds["candidate"],
        "base_seconds_per_step": seconds["base"],
        "ratio": seconds["candidate"] / seconds["base"],
    }


def _in_plain_loop(setting: Setting, prepare: Callable[[nn.Module], object]) -> Row:
    """Compare two plain loops, whose UNet can be changed without regard to how ours keeps its weights."""
    made = [
        PlainLoop(
            strategy(setting, "plain", FP32), setting, adamw(setting), checkpointing=not setting.tiny, prepare=each
        )
        for each in (prepare, lambda module: None)
    ]
    return _in_turn(setting, made[0], made[1])


def _to_channels_last(unet: nn.Module) -> None:
    cast("Any", unet).to(memory_format=torch.channels_last)


def _ours(setting: Setting, fields: Fields) -> Steps:
    return Steps(strategy(setting, "ours", TECHNIQUES["segments"] | fields), setting.device)


def _fused_layers(setting: Setting, more: Fields) -> Row:
    if setting.is_cuda and (reason := fused_layers.why_not(setting.device)) is not None:
        return _skipped(reason)
    return _in_turn(setting, _ours(setting, {"memory.fused_layers": True} | more), _ours(setting, {}))


def _compiled(setting: Setting) -> Row:
    return _in_turn(setting, _ours(setting, {"training.compile": True}), _ours(setting, {}))


def _xformers(setting: Setting) -> Row:
    if not environment.is_installed("xformers"):
        return _skipped("xformers is not installed")
    return _in_turn(setting, _ours(setting, {"memory.attention": "xformers"}), _ours(setting, {}))


def _expandable_segments(setting: Setting) -> Row:
    """Step with both settings of the allocator, one after the other, each from an empty one; then put them back."""
    try:
        base, base_bytes = _with_allocator(setting, "expandable_segments:False")
        candidate, candidate_bytes = _with_allocator(setting, "expandable_segments:True")
    finally:
        environment.release_memory(setting.device)
        _set_allocator(nvidia.allocator_settings())
    return {
        "seconds_per_step": candidate,
        "base_seconds_per_step": base,
        "ratio": candidate / base,
        "reserved_bytes": candidate_bytes,
        "base_reserved_bytes": base_bytes,
    }


def _with_allocator(setting: Setting, settings: str) -> tuple[float, int]:
    environment.release_memory(setting.device)
    _set_allocator(settings)
    step = _ours(setting, {})
    environment.release_memory(setting.device)
    torch.cuda.reset_peak_memory_stats(setting.device)
    seconds = seconds_in_turn({"step": step}, setting)["step"]
    return seconds, torch.cuda.max_memory_reserved(setting.device)


def _set_allocator(settings: str) -> None:
    backend: Any = torch._C  # torch before 2.9 has the name of CUDA alone
    change = getattr(backend, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings
    change(settings)


STAGE = Stage(name="candidates", rows="candidates", limit_seconds=60.0, measurements=_measurements)
