"""The two numeric contracts, and buffers that notice a write outside of them."""

import importlib
from contextlib import contextmanager

import pytest
import torch
from lowmem_db_kernels import launch, requested_mode
from lowmem_db_kernels._triton import INTERPRETED

INTERPRETING = INTERPRETED and requested_mode() == "interpret"
GUARD = 64
# Single errors are luck. Of two equally exact results the root mean square of 64 errors is 1.5 times the other's in one
# comparison of 2,000 if errors are normal, and of 32 in one of 75 (drawn 100,000 times); the largest of them takes many
# more to mean something.
MINIMUM_COUNT = 64
MINIMUM_COUNT_FOR_LARGEST = 1000
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def slow_to_interpret(*values):
    """Return a case that takes the interpreter many seconds: `make kernels-contract` runs it there."""
    return pytest.param(*values, marks=pytest.mark.slow if INTERPRETING else ())


def assert_bit_equal(name, got, expected):
    """Bit-exact contract: NaN equals NaN, -0 differs from 0."""
    assert got.dtype == expected.dtype, name
    as_bytes = [tensor.reshape(-1).view(torch.uint8).cpu() for tensor in (got, expected)]
    assert torch.equal(*as_bytes), f"{name} differs in {(as_bytes[0] != as_bytes[1]).sum()} bytes"


def assert_no_worse_than_eager(name, got, eager, exact, *, sums=False):
    """At most 1.5 times eager's own error against float64, in the root mean square and, of 1000 errors on, the largest.

    Fewer than 64 errors are refused: compare several problems at once. Of sums the largest error is left out.

    Where eager is right by luck (all values representable) its error says nothing, so an error that the result's type
    cannot avoid, half a unit in the last place of the largest value, always passes.
    """
    exact = exact.to(torch.float64).cpu()
    assert got.shape == exact.shape, f"{name}: {got.shape} is not {exact.shape}"
    if exact.numel() == 0:
        return
    assert exact.numel() >= MINIMUM_COUNT, f"{name}: {exact.numel()} errors say too little, compare more problems"
    unavoidable = torch.finfo(got.dtype).eps / 2 * exact.abs().max().item()
    differences = [tensor.detach().to(torch.float64).cpu() - exact for tensor in (got, eager)]
    measures = [lambda difference: difference.square().mean().sqrt(), lambda difference: difference.abs().max()]
    for measure in measures[: 1 if sums or exact.numel() < MINIMUM_COUNT_FOR_LARGEST else 2]:
        mine, eagers = (measure(difference).item() for difference in differences)
        assert mine <= max(1.5 * eagers, unavoidable), f"{name}: error {mine:.3e}, eager's {eagers:.3e}"


def assert_together_no_worse_than_eager(triples):
    """The same contract for tensors of few numbers, `{name: (got, eager, exact)}`, each in units of its eager error."""
    errors = []
    for got, eager, exact in triples.values():
        exact = exact.to(torch.float64).cpu()
        mine, eagers = (tensor.detach().to(torch.float64).cpu() - exact for tensor in (got, eager))
        unavoidable = torch.finfo(got.dtype).eps / 2 * exact.abs().max()
        unit = torch.maximum(eagers.square().mean().sqrt(), unavoidable / 1.5)
        errors.append((mine.flatten() / unit, eagers.flatten() / unit))
    mine, eagers = (torch.cat(part) for part in zip(*errors, strict=True))
    assert mine.numel() >= MINIMUM_COUNT, f"{mine.numel()} errors say too little, compare more problems"
    ratio = mine.square().mean().sqrt().item()
    assert ratio <= 1.5, f"{', '.join(triples)}: error {ratio:.2f} times eager's"


def assert_sums_no_worse_than_eager(name, got, eager, exact):
    """The same contract for sums, each of which is one number: the root mean square of their relative errors.

    A single sum is right by luck as often as not, so pass the results of several problems.
    """
    exact = exact.to(torch.float64).cpu().flatten()
    values = [tensor.detach().to(torch.float64).cpu().flatten() for tensor in (got, eager)]
    assert exact.numel() >= MINIMUM_COUNT, f"{name}: {exact.numel()} errors say too little, compare more problems"
    zero = exact == 0
    assert all(not value[zero].any() for value in values), f"{name} is not 0 where it should be"
    mine, eagers = ((value[~zero] / exact[~zero] - 1).square().mean().sqrt().item() for value in values)
    assert mine <= max(1.5 * eagers, torch.finfo(torch.float32).eps / 2), (
        f"{name}: error {mine:.3e}, eager's {eagers:.3e}"
    )


class GuardedBuffers:
    """Copies of tensors with a guard band on both sides of each, checked when the block ends."""

    def __init__(self):
        self._buffers = []

    def __call__(self, tensor):
        if tensor is None:
            return None
        size = tensor.element_size()
        storage = torch.full((tensor.numel() * size + 2 * GUARD,), 0xAB, dtype=torch.uint8, device=tensor.device)
        inner = storage[GUARD : GUARD + tensor.numel() * size].view(tensor.dtype)
        inner = inner.as_strided(tensor.shape, tensor.stride())
        inner.copy_(tensor)
        self._buffers.append(storage)
        return inner

    def check(self):
        for storage in self._buffers:
            assert bool((storage[:GUARD] == 0xAB).all()), "written before a buffer"
            assert bool((storage[-GUARD:] == 0xAB).all()), "written behind a buffer"


@contextmanager
def guarded():
    """Give a function that copies a tensor between guard bands, and guard every tensor a launcher allocates."""
    buffers = GuardedBuffers()
    yield buffers
    buffers.check()


@contextmanager
def reversed_grid(enabled=True):
    """Let the interpreter run the last program of a grid first, over all axes and in every kernel."""
    if not (enabled and INTERPRETED):
        yield
        return
    builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
    set_index = builder.set_grid_idx
    builder.set_grid_idx = lambda *index: set_index(*(n - 1 - i for n, i in zip(builder.grid_dim, index, strict=True)))
    try:
        yield
    finally:
        del builder.set_grid_idx


def assert_independent_of_order(run, *, blocks=()):
    """Compare results of programs in order, in reverse, in other numbers, and with other blocks.

    Kernels that add up take several chunks per program, so `programs` of 1, 2 and 7 are their splits. The others launch
    a program per block, so blocks decide their number; pass those on which no sum depends.
    """
    expected = run()
    variants = [{"reverse": True}, *({"programs": programs} for programs in (1, 2, 7)), *({"block": b} for b in blocks)]
    for fields, backwards in [({}, True), *((fields, False) for fields in variants)]:
        with launch.override_launch(**fields), reversed_grid(backwards):
            got = run()
        for name in expected:
            assert_bit_equal(f"{name} with {fields or 'the grid reversed'}", got[name], expected[name])
