"""Running out of memory on purpose: at the n-th operator that makes a tensor on a real device."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ERRORS: tuple[Exception, ...] = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 8.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
        "256 bytes. Error code 12 (Cannot allocate memory)"
    ),
    MemoryError(),
)
_PHASES = {  # functions on the stack; the first that is there names the phase
    "_check_and_plan": "checks and plan",  # which traces a step
    "_decoded": "decoding",
    "_latents": "sampling",
    "prepare_class_images": "class images",
    "encode_images": "encoding pictures",
    "encode_prompts": "encoding prompts",
    "_score": "scoring",
    "resume": "resuming",
    "build_trainer": "loading",
    "backward": "backward pass",
    "_step_unit": "optimizer step",
    "train_step": "forward pass",
}


_MAPPING = {"_read", "read", "load_file", "read_tensors", "<dictcomp>"}  # call safetensors, which swallows errors


class Fault(TorchDispatchMode):
    """Raises an error at one site, and counts all.

    Args:
        at: Number of the site, or None to count only.
        error: What is raised there.
        every: Raise it at each later site too.

    Attributes:
        phases: The phase of each site, if it only counts.
        place: The phase in which the error was raised; in a second run it may be another, because more is in memory.
    """

    def __init__(self, at: int | None = None, error: Exception = ERRORS[1], *, every: bool = False) -> None:
        super().__init__()
        self.at, self.error, self.every = at, error, every
        self.count = 0
        self.phases: list[str] = []
        self.place = "nowhere"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        is_mapping = _caller(sys._getframe()) in _MAPPING  # allocates nothing
        if isinstance(made, Tensor) and not (made.is_meta or func.is_view or is_mapping):
            number, self.count = self.count, self.count + 1
            if self.at is None:
                self.phases.append(_phase(sys._getframe()))
            elif number == self.at or (self.every and number > self.at):
                self.place = _phase(sys._getframe())
                raise type(self.error)(*self.error.args)
        return made


def _caller(frame: FrameType | None) -> str:
    """Return the name of the function that called torch."""
    frame = None if frame is None else frame.f_back
    while frame is not None and "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    return "" if frame is None else frame.f_code.co_name


def _phase(frame: FrameType | None) -> str:
    names = set()
    while frame is not None:
        names.add(frame.f_code.co_name)
        frame = frame.f_back
    inside = next((phase for name, phase in _PHASES.items() if name in names), "other")
    if inside in {"sampling", "decoding"}:
        return f"{inside} {'class images' if 'prepare_class_images' in names else 'samples'}"
    return inside


def note(**row: object) -> None:
    """Tell `make torture` of an attack that happens; nobody else asks."""
    if file := os.environ.get("LOWMEM_DB_TORTURE_LOG"):
        with Path(file).open("a") as log:
            log.write(json.dumps(row) + "\n")


@contextmanager
def fault_in_saving(at: int, error: Exception = ERRORS[2]) -> Iterator[list[int]]:
    """Raise an error at the n-th file of tensors that is written; yield a list whose length is the number so far."""
    written: list[int] = []
    original = safetensors.torch.serialize_file

    def failing(*args: Any, **kwargs: Any) -> Any:
        written.append(len(written))
        if written[-1] == at:
            raise type(error)(*error.args)
        return original(*args, **kwargs)

    safetensors.torch.serialize_file = failing  # type: ignore[attr-defined]
    try:
        yield written
    finally:
        safetensors.torch.serialize_file = original  # type: ignore[attr-defined]
