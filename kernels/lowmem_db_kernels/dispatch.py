"""Choosing the implementation of an operator: one decision, logged once, with its reason.

`LOWMEM_DB_KERNELS` is one of

* `auto` (default): Triton on a CUDA device of compute capability 7.5 or more, compiled C++ on a CPU for operators that
  have it, if their self-tests pass; otherwise eager,
* `triton`: Triton, or `KernelUnavailableError`,
* `native`: compiled C++, or `KernelUnavailableError`, for operators that have it; eager for the others,
* `eager`: the plain PyTorch twin,
* `interpret`: the Triton kernels in Triton's interpreter, on the CPU; set it before Python starts.
"""

import logging
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import HAS_TRITON, IMPORT_ERROR, INTERPRETED, triton
from .native import NativeUnavailableError

ENVIRONMENT_VARIABLE = "LOWMEM_DB_KERNELS"
MODES = ("auto", "triton", "native", "eager", "interpret")
MINIMUM_CAPABILITY = (7, 5)
FLOATING_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LARGEST_KERNEL = "_step_kernel"  # of `adamw8bit_step`, as Triton names its files
NATIVE_DTYPES = (torch.float32, torch.bfloat16)

_logger = logging.getLogger("lowmem_db_kernels")
# What an unsuitable kernel raises: from the compiler, its subprocesses, the driver, or because of a wrong result.
_FAILURES: tuple[type[Exception], ...] = (
    RuntimeError, ImportError, OSError, ValueError, TypeError, AttributeError, AssertionError,
    subprocess.SubprocessError,
)  # fmt: skip
if HAS_TRITON:
    _FAILURES = (*_FAILURES, triton.errors.TritonError)


class KernelUnavailableError(RuntimeError):
    """An implementation was requested explicitly but cannot be used."""


class Choice(NamedTuple):
    """The implementation of an operator, and why.

    Attributes:
        backend: `triton`, `native`, `interpret` or `eager`.
        reason: One clause.
    """

    backend: str
    reason: str


@dataclass(frozen=True)
class Operator:
    """A registered operator.

    Attributes:
        name: Its name in the namespace.
        self_test: Compares kernel and twin on a device; raises `AssertionError` on a mismatch.
        native_self_test: The same for the compiled form, if there is one; compiles it.
    """

    name: str
    self_test: Callable[[torch.device], None]
    native_self_test: Callable[[torch.device], None] | None = None


class OperatorStatus(NamedTuple):
    """One row of `status`.

    Attributes:
        op: Name of the operator.
        backend: Its implementation.
        reason: Why.
    """

    op: str
    backend: str
    reason: str


registry: dict[str, Operator] = {}
_choices: dict[tuple[str, str, torch.device, torch.dtype], Choice] = {}
_verdicts: dict[tuple[str, torch.device, bool], str | None] = {}


def register(
    name: str,
    self_test: Callable[[torch.device], None],
    *,
    native_self_test: Callable[[torch.device], None] | None = None,
) -> None:
    """Register an operator.

    Args:
        name: Its name.
        self_test: See `Operator.self_test`.
        native_self_test: See `Operator.native_self_test`.
    """
    registry[name] = Operator(name, self_test, native_self_test)


def requested_mode() -> str:
    """Return the value of `LOWMEM_DB_KERNELS`.

    Returns:
        One of `MODES`.

    Raises:
        KernelUnavailableError: The value is not allowed.
    """
    mode = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if mode not in MODES:
        raise KernelUnavailableError(f"{ENVIRONMENT_VARIABLE}={mode}; allowed: {', '.join(MODES)}")
    return mode


def uses_kernel(op: str, tensor: Tensor) -> bool:
    """Return whether a call uses the Triton kernel.

    Args:
        op: Name of the operator.
        tensor: The argument whose device and dtype decide.

    Returns:
        False if it uses the eager twin.

    Raises:
        KernelUnavailableError: The environment variable requests an implementation that cannot be used.
    """
    return choose(op, tensor.device, tensor.dtype).backend != "eager"


def choose(op: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Choice:
    """Choose the implementation of an operator, and log the choice.

    Args:
        op: Name of the operator.
        device: Device of its tensors.
        dtype: Type of its main tensor.

    Returns:
        The choice, cached per mode, operator, device and dtype.

    Raises:
        KernelUnavailableError: The environment variable requests an implementation that cannot be used.
    """
    key = (requested_mode(), op, device, dtype)
    if key not in _choices:
        choice = _choose(*key)
        _logger.info("%s on %s, %s: %s (%s)", op, device, dtype, *choice)
        _choices[key] = choice
    return _choices[key]


def status(device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> list[OperatorStatus]:
    """List every operator with its implementation on a device, and why.

    Args:
        device: The device. Default: the first CUDA device, or the CPU if there is none.
        dtype: Type of the operators' main tensors.

    Returns:
        One row per operator. A request that cannot be met is a row with backend `unavailable`.
    """
    where = torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    return [_status(op, where, dtype) for op in registry]


def will_compile(device: torch.device | str) -> bool:
    """Return whether Triton has to compile the kernels for a device first, which takes up to a minute.

    Args:
        device: The device.

    Returns:
        False if it is not asked for them, or if its cache holds the largest one.
    """
    mode = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if torch.device(device).type != "cuda" or mode not in ("auto", "triton") or not HAS_TRITON or INTERPRETED:
        return False
    home = os.environ.get("TRITON_HOME") or Path.home()
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path(home) / ".triton" / "cache")
    return not any(cache.glob(f"*/{_LARGEST_KERNEL}.json"))


def self_test(device: torch.device | str) -> dict[str, str | None]:
    """Compare every kernel with its twin on a device, and disable those that disagree or do not run.

    Args:
        device: A CUDA device, or the CPU under the interpreter.

    Returns:
        For each operator, None or what was wrong.
    """
    where = torch.device(device)
    return {op: _verify(op, where) for op in registry}


def _status(op: str, device: torch.device, dtype: torch.dtype) -> OperatorStatus:
    try:
        return OperatorStatus(op, *choose(op, device, dtype))
    except KernelUnavailableError as error:
        return OperatorStatus(op, "unavailable", str(error))


def _choose(mode: str, op: str, device: torch.device, dtype: torch.dtype) -> Choice:
    if mode == "eager":
        return Choice("eager", f"{ENVIRONMENT_VARIABLE}=eager")
    has_native = registry[op].native_self_test is not None
    if mode == "native" and not has_native:
        return Choice("eager", "it has no native form")
    backend = mode
    if mode == "auto":
        backend = "native" if has_native and device.type == "cpu" else "triton"
    reason = _REASONS[backend](op, device, dtype)
    if reason is None:
        return Choice(backend, f"{ENVIRONMENT_VARIABLE}={mode}")
    if mode == "auto":
        return Choice("eager", reason)
    raise KernelUnavailableError(
        f"{ENVIRONMENT_VARIABLE}={mode}, but this is not possible for {op}: {reason}; set it to auto or eager"
    )


def _why_not_interpret(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if not HAS_TRITON:
        return f"Triton cannot be imported ({IMPORT_ERROR})"
    if not INTERPRETED:
        return "Triton was imported before the interpreter was requested; set the variable before Python starts"
    if device.type != "cpu":
        return f"the interpreter needs a CPU tensor, but this one is on {device}"
    return None if dtype in FLOATING_DTYPES else f"no kernel for {dtype}"


def _why_not_triton(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"the tensor is on {device}, not on a CUDA device"
    if not HAS_TRITON:
        return f"Triton cannot be imported ({IMPORT_ERROR})"
    if INTERPRETED:
        return "Triton runs as an interpreter in this process (TRITON_INTERPRET)"
    if dtype not in FLOATING_DTYPES:
        return f"no kernel for {dtype}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 7.5"
    return _verify(op, device)


def _why_not_native(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"the native form needs a CPU tensor, but this one is on {device}"
    if dtype not in NATIVE_DTYPES:
        return f"no native form for {dtype}"
    return _verify(op, device, native=True)


_REASONS = {"interpret": _why_not_interpret, "triton": _why_not_triton, "native": _why_not_native}


def _verify(op: str, device: torch.device, *, native: bool = False) -> str | None:
    """Run an operator's self-test once per device; return None or what was wrong."""
    key = (op, device, native)
    if key not in _verdicts:
        test = registry[op].native_self_test if native else registry[op].self_test
        _verdicts[key] = None if test is None else _run_self_test(op, test, device)
    return _verdicts[key]


def _run_self_test(op: str, test: Callable[[torch.device], None], device: torch.device) -> str | None:
    try:
        test(device)
    except NativeUnavailableError as error:
        return str(error)
    except _FAILURES as error:
        verdict = f"its self-test failed on {device}: {type(error).__name__}: {error}"
        _logger.warning("%s is disabled: %s", op, verdict)
        return verdict
    return None
