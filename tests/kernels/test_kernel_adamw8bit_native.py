"""The compiled step equals the eager one bit for bit; its sums are as exact."""

import pytest
import torch
from lowmem_db_kernels import (
    AdamW8bitState,
    KernelUnavailableError,
    adamw8bit_eager,
    adamw8bit_step,
    bias_corrections,
    dispatch,
    init_state,
    pack_extra_bits_eager,
    status,
)
from lowmem_db_kernels.adamw8bit_eager import adamw8bit_step_eager
from lowmem_db_kernels.adamw8bit_native import adamw8bit_step_native
from lowmem_db_kernels.adamw8bit_state import StepOperands
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem_db.planning.tracker import AllocationTracker

NAMES = ("param", "extra_bits", "grad", "state1", "state2", "absmax1", "absmax2")
FORMATS = ("fp32", "stochastic", "extra_bits")
SCALES = {"grad_scale": torch.tensor(0.7), "update_scale": torch.tensor(0.3)}
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8

native_only = pytest.mark.skipif(
    dispatch.choose("adamw8bit_step", torch.device("cpu")).backend != "native",
    reason=dispatch.choose("adamw8bit_step", torch.device("cpu")).reason,
)
both = pytest.mark.parametrize("serve", [adamw8bit_step_eager, pytest.param(adamw8bit_step_native, marks=native_only)])


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problem(size, weight_format="fp32", grad_dtype=torch.float32, *, quantized=True, seed=0, wide=True):
    generator = torch.Generator().manual_seed(seed)
    param, extra_bits = torch.randn(size, generator=generator) * 0.03, None
    grad = torch.randn(size, generator=generator)
    grad = grad * (torch.logspace(-15, 3, size) if wide else 1e-3)
    if weight_format == "extra_bits":
        param, extra_bits = pack_extra_bits_eager(param)
    elif weight_format == "stochastic":
        param = param.to(torch.bfloat16)
    if quantized:
        codes = torch.randint(0, 256, (2, size), generator=generator, dtype=torch.uint8)
        state = [*codes, *torch.rand(2, -(-size // 256), generator=generator) * torch.tensor([[1e-3], [1e-5]])]
    else:
        state = [
            torch.randn(size, generator=generator) * 1e-3,
            torch.rand(size, generator=generator) * 1e-5,
            None,
            None,
        ]
    return dict(zip(NAMES, (param, extra_bits, grad.to(grad_dtype), *state), strict=True))


def run(serve, tensors, *, dry_run=False, grad_scale=None, update_scale=None, update_squares=None, step=7):
    copies = {name: None if tensor is None else tensor.clone() for name, tensor in tensors.items()}
    count = torch.tensor(step)
    corrections = bias_corrections(count, (BETA1, BETA2))
    operands = StepOperands(
        *copies.values(), torch.tensor(1e-3), count, corrections, grad_scale, update_scale, BETA1, BETA2, EPS, 0.01, 11,
        -22, dry_run, update_squares,
    )  # fmt: skip
    sums = serve(operands)
    return {name: tensor for name, tensor in copies.items() if tensor is not None} | {"sums": sums}


def assert_bit_equal(got, expected, *, but_for=()):
    assert got.keys() == expected.keys()
    for name in expected.keys() - set(but_for):
        assert torch.equal(got[name].view(torch.uint8), expected[name].view(torch.uint8)), name


@native_only
@pytest.mark.parametrize("size", [0, 1, 3, 63, 255, 256, 257, 1023, 70_000])
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("scales", [{}, SCALES], ids=["unscaled", "scaled"])
def test_every_bit_is_that_of_the_eager_twin(size, weight_format, grad_dtype, quantized, scales):
    tensors = problem(size, weight_format, grad_dtype, quantized=quantized, seed=size)
    got, expected = (run(serve, tensors, **scales) for serve in (adamw8bit_step_native, adamw8bit_step_eager))
    assert_bit_equal(got, expected, but_for=["sums"])
    torch.testing.assert_close(got["sums"], expected["sums"], rtol=2e-6, atol=0)


@native_only
@pytest.mark.parametrize("squares", [100.0, 1234.5])
def test_limit_of_the_update_has_the_bits_of_the_eager_twin(squares):
    tensors, limit = problem(1023, "extra_bits"), torch.tensor(squares)
    got, expected = (
        run(serve, tensors, update_squares=limit) for serve in (adamw8bit_step_native, adamw8bit_step_eager)
    )
    unlimited = run(adamw8bit_step_native, tensors)
    assert_bit_equal(got, expected, but_for=["sums"])
    assert torch.equal(got["param"], unlimited["param"]) == (squares < 1023)


@native_only
def test_200_steps_stay_bit_equal():
    results = []
    for serve in (adamw8bit_step_native, adamw8bit_step_eager):
        tensors = problem(5000, "extra_bits", wide=False)
        for step in range(1, 201):
            generator = torch.Generator().manual_seed(step)
            tensors["grad"] = torch.randn(5000, generator=generator) * 1e-2
            result = run(serve, tensors, step=step)
            tensors = {name: result.get(name) for name in NAMES}
        results.append(result)
    assert_bit_equal(*results, but_for=["sums"])


def exact_sums(tensors):
    """Sums of squares in float64, with fp32 states."""
    grad, m, v = (tensors[name].double() for name in ("grad", "state1", "state2"))
    m, v = BETA1 * m + (1 - BETA1) * grad, BETA2 * v + (1 - BETA2) * grad**2
    update = m / (1 - BETA1**7) / ((v / (1 - BETA2**7)).sqrt() + EPS)
    return torch.stack([grad.square().sum(), update.square().sum()])


@native_only
def test_sums_are_no_worse_than_eagers():
    """Root mean square of relative errors over several problems: a single sum is right by luck."""
    errors = torch.zeros(2, 30, 2, dtype=torch.float64)
    for seed in range(30):
        tensors = problem(50_000, quantized=False, seed=seed, wide=False)
        exact = exact_sums(tensors)
        for index, serve in enumerate((adamw8bit_step_native, adamw8bit_step_eager)):
            errors[index, seed] = run(serve, tensors)["sums"].double() / exact - 1
    mine, eagers = errors.square().mean((1, 2)).sqrt()
    assert mine <= 1.5 * eagers


@native_only
@pytest.mark.parametrize("num_threads", [2, 7])
def test_no_result_depends_on_the_number_of_threads(num_threads):
    tensors = problem(150_001, "stochastic")
    expected = run(adamw8bit_step_native, tensors)
    torch.set_num_threads(num_threads)
    assert_bit_equal(run(adamw8bit_step_native, tensors), expected)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("chunk", [256, 1024])
def test_no_result_of_the_eager_twin_depends_on_its_chunks(weight_format, chunk, monkeypatch):
    tensors = problem(5000, weight_format)
    expected = run(adamw8bit_step_eager, tensors)
    monkeypatch.setattr(adamw8bit_eager, "CPU_CHUNK", chunk)
    assert_bit_equal(run(adamw8bit_step_eager, tensors), expected)


class LargestAllocation(TorchDispatchMode):
    """Remembers the largest storage that an operation made, in bytes."""

    def __init__(self, known):
        super().__init__()
        self.known, self.num_bytes = {tensor.untyped_storage().data_ptr() for tensor in known}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.num_bytes = max(self.num_bytes, tensor.untyped_storage().nbytes())
        return result


def test_temporaries_of_the_eager_twin_do_not_grow_with_the_parameter(monkeypatch):
    monkeypatch.setattr(adamw8bit_eager, "CPU_CHUNK", 1024)
    tensors = list(problem(64 * 1024, "stochastic").values())
    step = torch.tensor(7)
    corrections = bias_corrections(step, (BETA1, BETA2))
    operands = StepOperands(
        *tensors, torch.tensor(1e-3), step, corrections, None, None, BETA1, BETA2, EPS, 0.01, 11, -22, False
    )
    with LargestAllocation([tensor for tensor in tensors if tensor is not None]) as largest:
        adamw8bit_step_eager(operands)
    assert 0 < largest.num_bytes <= 8 * 1024


@pytest.mark.parametrize("weight_format", FORMATS)
def test_temporaries_of_the_eager_twin_on_a_device_stay_below_100_mib(weight_format):
    """It serves CUDA devices without Triton, where 2^24 elements at a time take 1 GiB."""
    tensors = problem(300, weight_format, wide=False)
    size = 2560 * 1280 * 9
    tensors = {name: x if x is None else x.new_empty(size, device="meta") for name, x in tensors.items()}
    tensors |= {name: torch.empty(-(-size // 256), device="meta") for name in ("absmax1", "absmax2")}
    step = torch.tensor(7, device="meta")
    corrections = torch.empty(2, device="meta")
    operands = StepOperands(
        *tensors.values(), torch.empty((), device="meta"), step, corrections, None, None, BETA1, BETA2, EPS, 0.01, 1, 2,
        False,
    )  # fmt: skip
    tracker = AllocationTracker()
    tracker.register([tensor for tensor in tensors.values() if tensor is not None], "weights")
    with tracker.tracking():
        adamw8bit_step_eager(operands)
    assert 16 * 2**20 < tracker.peak.other < 100 * 2**20


@both
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1e30])
def test_an_element_without_finite_gradient_keeps_its_weight(serve, value):
    tensors = problem(600, wide=False)
    expected = run(serve, tensors)
    tensors["grad"][300] = value
    got = run(serve, tensors)
    assert got["param"][300] == tensors["param"][300]
    others = torch.arange(600) != 300
    assert torch.equal(got["param"][others], expected["param"][others])
    assert not got["sums"][0].isfinite()
    assert got["sums"][1].isfinite()


@both
def test_dry_run_writes_nothing_and_returns_the_same_sums(serve):
    tensors = problem(1000, "extra_bits")
    dry, wet = run(serve, tensors, dry_run=True), run(serve, tensors)
    assert torch.equal(dry.pop("sums"), wet["sums"])
    assert_bit_equal(dry, {name: tensor for name, tensor in tensors.items() if tensor is not None})


@both
@pytest.mark.parametrize("weight_format", FORMATS)
def test_nothing_is_written_outside_the_tensors(serve, weight_format):
    guard = 64
    tensors, inner = problem(700, weight_format), {}
    storages = []
    for name, tensor in tensors.items():
        if tensor is None:
            inner[name] = None
            continue
        size = tensor.numel() * tensor.element_size()
        storage = torch.full((size + 2 * guard,), 0xAB, dtype=torch.uint8)
        inner[name] = storage[guard : guard + size].view(tensor.dtype)
        inner[name].copy_(tensor)
        storages.append(storage)
    step = torch.tensor(7)
    arguments = torch.tensor(1e-3), step, bias_corrections(step, (0.9, 0.999)), None, None, 0.9, 0.999, 1e-8, 0.01
    serve(StepOperands(*inner.values(), *arguments, 1, 2, False))
    for storage in storages:
        assert bool((storage[:guard] == 0xAB).all())
        assert bool((storage[-guard:] == 0xAB).all())
    expected = run(serve, tensors)
    if weight_format != "stochastic":
        assert torch.equal(inner["param"], expected["param"])


@native_only
def test_channels_last_weights_step_in_storage_order(monkeypatch):
    results = []
    for mode in ("native", "eager"):
        monkeypatch.setenv("LOWMEM_DB_KERNELS", mode)
        generator = torch.Generator().manual_seed(0)
        param, grad = (
            torch.randn(32, 16, 3, 3, generator=generator).to(memory_format=torch.channels_last) for _ in range(2)
        )
        state = init_state(param)
        adamw8bit_step(param, grad, state, lr=1e-3, step=1)
        results.append([param, *state])
    assert all(torch.equal(got, expected) for got, expected in zip(*results, strict=True))


@pytest.mark.parametrize("mode", ["eager", pytest.param("native", marks=native_only)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_states_may_be_views_of_one_buffer_of_bytes(mode, layout, monkeypatch):
    monkeypatch.setenv("LOWMEM_DB_KERNELS", mode)
    generator = torch.Generator().manual_seed(0)
    param, grad = (torch.randn(16, 17, 5, 5, generator=generator).to(memory_format=layout) for _ in range(2))
    expected, plain = param.clone(), init_state(param)
    slab = torch.full((3 * 256 + 2 * 7168 + 2 * 256,), 0xAB, dtype=torch.uint8)
    offsets, num_blocks = {"state1": 256, "state2": 7424, "absmax1": 14592, "absmax2": 14848}, -(-param.numel() // 256)
    codes = [slab.as_strided(param.shape, param.stride(), offsets[name]) for name in ("state1", "state2")]
    maxima = [slab[offsets[n] :][: 4 * num_blocks].view(torch.float32) for n in ("absmax1", "absmax2")]
    state = AdamW8bitState(*codes, *maxima)
    for tensor in state:
        assert tensor is not None
        tensor.zero_()
    for step in (1, 2):
        sums = adamw8bit_step(param, grad, state, lr=1e-3, step=step)
        assert torch.equal(sums, adamw8bit_step(expected, grad, plain, lr=1e-3, step=step))
    assert torch.equal(param, expected)
    assert_bit_equal(state._asdict(), plain._asdict())
    assert bool((slab[:256] == 0xAB).all())
    assert bool((slab[256 + param.numel() : 7424] == 0xAB).all())


def test_a_gradient_the_compiled_step_does_not_know_is_served_by_the_twin(monkeypatch):
    param, grad = torch.ones(5000), torch.ones(5000, dtype=torch.float16)
    expected = torch.ones(5000)
    adamw8bit_step(expected, grad.float(), init_state(param), lr=1e-3, step=1)
    adamw8bit_step(param, grad, init_state(param), lr=1e-3, step=1)
    assert torch.equal(param, expected)
    monkeypatch.setenv("LOWMEM_DB_KERNELS", "native")
    if "native" in {row.backend for row in status("cpu")}:
        with pytest.raises(KernelUnavailableError, match=r"for adamw8bit_step: no native form for torch\.float16"):
            adamw8bit_step(param, grad, init_state(param), lr=1e-3, step=1)


@native_only
def test_native_mode_leaves_the_other_operators_to_their_twins(monkeypatch):
    monkeypatch.setenv("LOWMEM_DB_KERNELS", "native")
    rows = {row.op: row for row in status("cpu")}
    assert rows.pop("adamw8bit_step").backend == "native"
    assert {(row.backend, row.reason) for row in rows.values()} == {("eager", "it has no native form")}


def test_meta_tensors_are_stepped_by_nobody():
    param = torch.ones(5000, device="meta")
    assert adamw8bit_step(param, param, init_state(param), lr=1e-3, step=1).shape == (2,)
