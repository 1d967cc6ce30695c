"""Out of memory is recognised whoever says it, and what the failed functions held is let go."""

import errno
import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from lowmem_db import out_of_memory
from lowmem_db.errors import BudgetError, DiskFullError, ModelError
from lowmem_db.out_of_memory import first_that_fits, place_of, reason_of, told
from tests.faults import ERRORS


class SafetensorError(Exception):
    """Named like the library's."""


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (ERRORS[0], "device"),
        (ERRORS[1], "host"),
        (ERRORS[2], "host"),
        (RuntimeError("[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried"), "host"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "device"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "device"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), "device"),
        (RuntimeError("std::bad_alloc"), "host"),
        (RuntimeError("unable to mmap 343 bytes from file <model.safetensors>: Cannot allocate memory (12)"), "host"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "host"),
        (SafetensorError("Error: Cannot allocate memory (os error 12)"), "host"),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ValueError("out of memory of a value"), None),
        (ModelError("model.base: is missing"), None),
    ],
)  # fmt: skip
def test_every_library_s_error_is_recognised(error: Exception, place: str | None) -> None:
    assert place_of(error) == place
    wrapped = ModelError("unet: cannot be loaded")
    wrapped.__cause__ = error
    assert place_of(wrapped) == place


def test_reason_is_what_the_allocator_was_asked_for() -> None:
    assert reason_of(ERRORS[0]) == "CUDA out of memory. Tried to allocate 20.00 MiB"
    assert reason_of(MemoryError()) == "MemoryError"
    wrapped = ModelError("unet: cannot be loaded")
    wrapped.__cause__ = ERRORS[1]
    assert reason_of(wrapped).startswith("DefaultCPUAllocator: can't allocate memory: you tried to allocate 256 bytes")


def failing(error: Exception, made: list[weakref.ref[torch.Tensor]]) -> Callable[[], str]:
    def attempt() -> str:
        large = torch.zeros(1000)
        made.append(weakref.ref(large))
        raise error

    return attempt


def test_next_attempt_starts_without_what_the_last_one_held(capsys: pytest.CaptureFixture[str]) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    gc.disable()

    def last() -> str:
        assert [reference() for reference in made] == [None, None]
        return "done"

    attempts = [
        ("whole", failing(ERRORS[0], made)),
        ("in halves", failing(MemoryError(), made)),
        ("piece by piece", last),
    ]
    try:
        assert first_that_fits("drawing", attempts, "draw less") == "done"
    finally:
        gc.enable()
    assert capsys.readouterr().err.splitlines() == [
        "drawing: out of memory (CUDA out of memory. Tried to allocate 20.00 MiB); continuing in halves",
        "drawing: out of memory (MemoryError); continuing piece by piece",
    ]


def test_where_nothing_fits_the_way_out_is_named() -> None:
    with pytest.raises(BudgetError, match=r"drawing: out of memory \(MemoryError\), .* draw less") as raised:
        first_that_fits("drawing", [("whole", failing(MemoryError(), []))], "draw less")
    assert place_of(raised.value) == "host"


def test_full_disk_while_a_model_is_saved_because_of_it_is_a_full_disk() -> None:
    error = DiskFullError("full")
    error.__context__ = MemoryError()
    assert place_of(error) is None


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(ValueError, match="unrelated"):
        first_that_fits("drawing", [("whole", failing(ValueError("unrelated"), [])), ("again", str)], "draw less")
    assert out_of_memory.place_of(ValueError("unrelated")) is None


def test_pinned_memory_goes_back_to_the_system_too(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: called.append("device"))
    monkeypatch.setattr(torch._C, "_accelerator_emptyHostCache", lambda: called.append("host"), raising=False)
    monkeypatch.delattr(torch._C, "_host_emptyCache", raising=False)
    out_of_memory.release()
    assert called == ["device", "host"]


def misread() -> None:
    """As a check of a configuration does that runs out of memory."""
    try:
        raise ERRORS[0]
    except RuntimeError as error:
        raise ModelError("scheduler_config.json describes no noise schedule; download it again") from error


def test_what_a_check_made_of_it_is_told_as_what_it_is() -> None:
    with pytest.raises(BudgetError, match=r"out of memory on the device .*Tried to allocate") as raised, told():
        misread()
    assert raised.value.exit_code == 3


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ModelError), told():
        raise ModelError("another error")
