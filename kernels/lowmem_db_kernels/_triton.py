# ruff: noqa: ANN001, ANN202 -- the arguments of a Triton function have no Python type
# pyright: reportInvalidTypeForm=false
"""The only module that imports Triton, and the few device functions that all kernels share.

Without Triton the package can still be imported: `jit` returns the function unchanged and `tl` is a stand-in with what
the signatures of the kernels need. `dispatch` decides whether a kernel may be launched.
"""

import os
import sys
from types import SimpleNamespace
from typing import Any

from torch import Tensor

# Triton reads TRITON_INTERPRET once, when it is imported.
if os.environ.get("LOWMEM_DB_KERNELS") == "interpret" and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

triton: Any
tl: Any
try:
    import triton
    import triton.language as tl
except ImportError as error:
    triton = None
    tl = SimpleNamespace(constexpr=lambda value: value)
    IMPORT_ERROR: str | None = str(error)
else:
    IMPORT_ERROR = None

HAS_TRITON = triton is not None
INTERPRETED = HAS_TRITON and not isinstance(tl.sum, triton.runtime.jit.JITFunction)

# Off, and passed explicitly at each launch, because Triton 3.10 changes the default. Without contraction the kernel,
# the interpreter and the eager twin round in the same way.
FP_FUSION = False


def jit(function: Any = None, *, unspecialized: tuple[str, ...] = ()) -> Any:
    """Mark a function as a Triton kernel or device function.

    Args:
        function: The function; if left out, a decorator is returned.
        unspecialized: Integer arguments that change from call to call and must not be specialized on.

    Returns:
        The Triton function, or `function` itself without Triton.
    """
    if function is None:
        return lambda function: jit(function, unspecialized=unspecialized)
    return triton.jit(function, do_not_specialize=list(unspecialized)) if HAS_TRITON else function


def cdiv(numerator: int, denominator: int) -> int:
    """Divide and round up.

    Args:
        numerator: Not negative.
        denominator: Positive.

    Returns:
        The smallest integer at or above the quotient.
    """
    return -(-numerator // denominator)


def next_power_of_2(value: int) -> int:
    """Round up to a power of two.

    Args:
        value: Positive.

    Returns:
        The smallest power of two at or above `value`.
    """
    return 1 << (value - 1).bit_length()


def or_dummy(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """Return the tensor, or a stand-in whose pointer is never read because the branch is switched off.

    Args:
        tensor: An optional argument of a kernel.
        stand_in: Any tensor on the same device.

    Returns:
        `tensor` if it is given, otherwise `stand_in`.
    """
    return stand_in if tensor is None else tensor


@jit
def program_index(REVERSE: tl.constexpr):
    """Return this program's index on the first grid axis; `REVERSE` runs the programs backwards, for tests of order."""
    index = tl.program_id(0)
    if REVERSE:
        index = tl.num_programs(0) - 1 - index
    return index


@jit
def round_to_bf16(x):
    """Round fp32 to the nearest bf16, ties to even, in integers: the interpreter truncates where hardware rounds."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = tl.where(x == x, rounded, 0x7FC0)
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@jit
def load_fp32(pointers, mask):
    """Load as fp32: no arithmetic is done in 16 bits anywhere."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@jit
def store_rounded(pointers, x, mask):
    """Store fp32 values in the pointer's type, rounded once to nearest."""
    if pointers.dtype.element_ty == tl.bfloat16:
        tl.store(pointers, round_to_bf16(x), mask=mask)
    else:
        tl.store(pointers, x.to(pointers.dtype.element_ty), mask=mask)
