"""Out of memory, whoever says so: recognised, cleaned up after, and tried again with less.

Torch's allocators, CUDA's libraries, Python and the system each have an error of their own for it.
"""

import errno
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from lowmem_db import environment
from lowmem_db.console import say
from lowmem_db.errors import BudgetError, LowmemDbError

Place = Literal["device", "host"]
_Result = TypeVar("_Result")

_OF_HOST = (
    "can't allocate memory",  # torch's allocator on Linux
    "not enough memory",  # and on Windows
    "std::bad_alloc",
    "bad allocation",
    "cannot allocate memory",  # the system
    "unable to mmap",  # torch, for files
    "hostalloc",
)
_PLACE_IN_SOURCE = re.compile(r"^\[enforce fail at [^]]*\] \S+ ")  # before what torch's allocator on the CPU says
_OF_DEVICE = (
    "out of memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "cusparse_status_alloc_failed",
)


def place_of(error: BaseException) -> Place | None:
    """Return whose memory was too small: the device's or the host's; None for any other error.

    Errors of other libraries often wrap it, so the errors behind an error count too.
    """
    for each in _with_causes(error):
        if isinstance(each, MemoryError) or (isinstance(each, OSError) and each.errno == errno.ENOMEM):
            return "host"
        torch: Any = sys.modules.get("torch")
        if torch is not None and isinstance(each, torch.OutOfMemoryError):
            return "device"
        if isinstance(each, RuntimeError | OSError) or type(each).__name__ == "SafetensorError":
            words = str(each).lower()
            if any(said in words for said in _OF_HOST):
                return "host"
            if any(said in words for said in _OF_DEVICE):
                return "device"
    return None


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        is_own = isinstance(error, LowmemDbError)  # which names its cause, if it has one
        error = error.__cause__ or (None if is_own or error.__suppress_context__ else error.__context__)


def reason_of(error: BaseException) -> str:
    """Return what the allocator said: what it is, and how much it was asked for."""
    said = [error, *(each for each in _with_causes(error) if place_of(each) is not None and str(each))][-1]
    words = _PLACE_IN_SOURCE.sub("", " ".join(str(said).split())) or type(said).__name__
    return ". ".join(words.split(". ")[:2])[:160]


@contextmanager
def told() -> Iterator[None]:
    """Raise what ran out of memory as such: a library, or a check, may have made another error of it.

    Raises:
        BudgetError: Memory ran out where nothing could be done about it.
    """
    try:
        yield
    except Exception as error:
        place = place_of(error)
        if place is None or isinstance(error, BudgetError):
            raise
        raise BudgetError(
            f"out of memory on the {place} ({reason_of(error)}); free memory, or ask for less at once, and try again"
        ) from error


def forget(error: BaseException) -> None:
    """Let go of everything that the functions which failed had in their variables, and give free memory back.

    Args:
        error: An error that was caught; its traceback stays readable.
    """
    for each in _with_causes(error):
        traceback.clear_frames(each.__traceback__)
    release()


def release() -> None:
    """Free what nobody refers to, and give it back to the device and to the system."""
    environment.release_host_memory()
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    environment.release_memory(torch.device("cuda", torch.cuda.current_device()))
    for name in ("_accelerator_emptyHostCache", "_host_emptyCache"):  # pinned memory; newer and older torch
        getattr(torch._C, name, lambda: None)()


def first_that_fits(what: str, attempts: Iterable[tuple[str, Callable[[], _Result]]], way_out: str) -> _Result:
    """Return the result of the first attempt that does not run out of memory.

    Args:
        what: What is done, in words, for messages.
        attempts: Ways to do it, each in words, the one that needs the most memory first.
        way_out: What the user can do if none of them fits.

    Raises:
        BudgetError: All ran out of memory.
    """
    reason, last = "", None
    for number, (how, attempt) in enumerate(attempts):
        if number:
            say(f"{what}: out of memory ({reason}); continuing {how}")
        try:
            return attempt()
        except Exception as error:
            if place_of(error) is None:
                raise
            reason, last = reason_of(error), error
            forget(error)
    raise BudgetError(f"{what}: out of memory ({reason}), and nothing here needs less; {way_out}") from last
