"""``torch.compile`` of what a model repeats: residual blocks, transformer blocks and layers of text encoders.

Each is compiled by itself, inside the segment that recomputes it, once for each shape. Activation checkpointing, the
optimizer in the backward pass and streamed states stay around it as they are. Compiled code rounds differently: results
differ in the last bits from those of a run without it. Within a run, and when it is resumed, they are the same.

The plan of such a run is that of the code that is not compiled, which keeps at least as many activations.
"""

import importlib
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from lowmem_db import environment
from lowmem_db.errors import DependencyError

REPEATED = ("BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer")
BACKEND = "inductor"
_COMPILERS = ("c++", "g++", "clang++")
_NUM_SHAPES = 256
"""Of one kind of block: all widths and resolutions of a UNet, in training and in sampling."""


def check(device: torch.device) -> None:
    """Refuse a device that nothing can be compiled for.

    Raises:
        DependencyError: Triton is missing on a CUDA device, or a C++ compiler on the CPU.
    """
    if device.type == "cuda":
        environment.require("triton")
    elif not any(map(shutil.which, _COMPILERS)):
        raise DependencyError(
            f"training.compile: true needs a C++ compiler on the CPU, but none of {', '.join(_COMPILERS)} is there; "
            "install one, or leave it out"
        )


def apply(*modules: nn.Module) -> Callable[[], None]:
    """Compile the repeated blocks of models at their first call; return the function that undoes it.

    Raises:
        ValueError: No model has such a block.
    """
    blocks = [each for module in modules for each in module.modules() if type(each).__name__ in REPEATED]
    if not blocks:
        raise ValueError(f"no model has a block that is compiled; allowed: {', '.join(REPEATED)}")
    _allow_many_shapes()
    before = [(block, block.__dict__.get("forward")) for block in blocks]
    for block in blocks:
        # With dynamic shapes, the code for a shape would depend on which shapes came before.
        block.forward = torch.compile(block.forward, backend=BACKEND, dynamic=False)
    return partial(_undo, before)


def _allow_many_shapes() -> None:
    """Compile every shape; beyond its limit torch would go on without compiling, and say nothing."""
    config: Any = importlib.import_module("torch._dynamo.config")
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, max(getattr(config, limit), _NUM_SHAPES))
    if hasattr(config, "fail_on_recompile_limit_hit"):
        config.fail_on_recompile_limit_hit = True


def _undo(before: list[tuple[nn.Module, Callable[..., Any] | None]]) -> None:
    for block, forward in before:
        del block.forward
        if forward is not None:
            block.forward = forward
