import pytest
import torch
from kernel_contract import (
    assert_bit_equal,
    assert_independent_of_order,
    assert_no_worse_than_eager,
    assert_sums_no_worse_than_eager,
    guarded,
    slow_to_interpret,
)
from lowmem_db_kernels.adamw8bit_eager import adamw8bit_step_eager
from lowmem_db_kernels.adamw8bit_state import AdamW8bitState, StepOperands, bias_corrections, init_state
from lowmem_db_kernels.adamw8bit_step import adamw8bit_step
from lowmem_db_kernels.adamw8bit_triton import adamw8bit_step_triton
from lowmem_db_kernels.codec import decode_eager, encode_eager
from lowmem_db_kernels.rounding import pack_extra_bits_eager, unpack_extra_bits_eager

NAMES = ("param", "extra_bits", "state1", "state2", "absmax1", "absmax2")
COMPARED = ("weight", "m", "v", "sums")
BETA1, BETA2, EPS, WEIGHT_DECAY = 0.9, 0.999, 1e-8, 0.01
FORMATS = ["fp32", "extra_bits", "stochastic"]


def problem(
    device, shape=(1300,), grad_dtype=torch.float32, weight_format="fp32", *, quantized=True, lr=1e-3, step=7, seed=2
):
    generator = torch.Generator().manual_seed(seed)
    param = torch.randn(shape, generator=generator) * 0.03
    grad = torch.randn(shape, generator=generator) * 1e-2
    size = param.numel()
    m = torch.randn(size, generator=generator) * 1e-3
    v = torch.rand(size, generator=generator) * 1e-5
    num_blocks = -(-size // 256)
    if quantized:
        absmax = torch.rand(2, num_blocks, generator=generator) * torch.tensor([[1e-3], [1e-5]])
        codes = [encode_eager(m / 5e-3, signed=True), encode_eager(v / 1e-5, signed=False)]
        state = AdamW8bitState(*(code.reshape(shape) for code in codes), *absmax)
    else:
        state = AdamW8bitState(m.reshape(shape), v.reshape(shape), None, None)
    extra_bits = None
    if weight_format == "extra_bits":
        param, extra_bits = pack_extra_bits_eager(param)
    elif weight_format == "stochastic":
        param = param.to(torch.bfloat16)
    tensors = dict(zip(NAMES, (param, extra_bits, *state), strict=True))
    tensors = {name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()}
    fixed = {
        "grad": grad.to(grad_dtype).to(device),
        "lr": torch.tensor(lr, device=device),
        "step": torch.tensor(step, device=device),
        "grad_scale": torch.tensor(0.7, device=device),
        "update_scale": torch.tensor(0.9, device=device),
    }
    return tensors, fixed


def run(serve, tensors, fixed, *, dry_run=False, seed=(11, -22), update_squares=None):
    """Step copies of the tensors between guard bands; return them by name, with the sums."""
    with guarded() as guard:
        copies = {name: guard(tensor) for name, tensor in tensors.items()}
        operands = StepOperands(
            copies["param"], copies["extra_bits"], fixed["grad"], *(copies[name] for name in NAMES[2:]), fixed["lr"],
            fixed["step"], bias_corrections(fixed["step"], (BETA1, BETA2)), fixed["grad_scale"],
            fixed["update_scale"], BETA1, BETA2, EPS, WEIGHT_DECAY, *seed, dry_run, update_squares,
        )  # fmt: skip
        sums = serve(operands)
    return {name: copy for name, copy in copies.items() if copy is not None} | {"sums": sums}


def weight_of(tensors):
    if "extra_bits" in tensors and tensors["extra_bits"] is not None:
        return unpack_extra_bits_eager(tensors["param"], tensors["extra_bits"])
    return tensors["param"]


def moments_of(tensors, dtype=torch.float64):
    moments = []
    for index, signed in ((1, True), (2, False)):
        state, absmax = tensors[f"state{index}"].flatten(), tensors.get(f"absmax{index}")
        if absmax is None:
            moments.append(state.to(dtype))
        else:
            scale = absmax.to(dtype).repeat_interleave(256)[: state.numel()]
            moments.append(decode_eager(state, signed=signed).to(dtype) * scale)
    return moments


def exact_result(tensors, fixed):
    weight, grad = weight_of(tensors).double().flatten(), fixed["grad"].double().flatten()
    m, v = moments_of(tensors)
    g = grad * fixed["grad_scale"].double()
    m = BETA1 * m + (1 - BETA1) * g
    v = BETA2 * v + (1 - BETA2) * g * g
    step, lr = int(fixed["step"]), fixed["lr"].double()
    update = m / (1 - BETA1**step) / ((v / (1 - BETA2**step)).sqrt() + EPS)
    moved = weight - lr * (fixed["update_scale"].double() * update + WEIGHT_DECAY * weight)
    sums = torch.stack([grad.square().sum(), update.square().sum()])
    return {"weight": moved, "m": m, "v": v, "sums": sums}


def check(*arguments, **options):
    """Compare over many problems: the sums are single numbers, and a small parameter has few elements."""
    results = []
    for seed in range(64 if arguments[1:] == ((1,),) else 32):
        tensors, fixed = problem(*arguments, seed=seed, **options)
        got, eager = (run(serve, tensors, fixed) for serve in (adamw8bit_step_triton, adamw8bit_step_eager))
        results.append([comparable(got), comparable(eager), exact_result(tensors, fixed)])
        for name in ("state1", "state2"):
            if got[name].dtype == torch.uint8:
                assert_same_codes_but_for_ties(name, got[name], eager[name])
    for name in ("weight", "m", "v"):
        assert_no_worse_than_eager(
            name, *(torch.cat([part[name] for part in parts]) for parts in zip(*results, strict=True))
        )
    sums = (torch.cat([part["sums"] for part in parts]) for parts in zip(*results, strict=True))
    assert_sums_no_worse_than_eager("sums", *sums)


def comparable(result):
    m, v = moments_of(result)
    return dict(zip(COMPARED, (weight_of(result).flatten(), m, v, result["sums"]), strict=True))


def assert_same_codes_but_for_ties(name, got, eager):
    difference = (got.int() - eager.int()).abs()
    assert difference.max() <= 1, f"{name} differs by more than a tie"
    assert difference.sum() <= 2 + 1e-4 * difference.numel(), f"{name} differs in {difference.sum()} codes"


@pytest.mark.parametrize("weight_format", [slow_to_interpret("fp32"), slow_to_interpret("stochastic"), "extra_bits"])
@pytest.mark.parametrize("grad_dtype", [torch.float32, slow_to_interpret(torch.float16), torch.bfloat16], ids=str)
def test_kernel_matches_its_twin(device, weight_format, grad_dtype):
    check(device, grad_dtype=grad_dtype, weight_format=weight_format)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_fp32_states(device, weight_format):
    check(device, weight_format=weight_format, quantized=False)


@pytest.mark.parametrize("size", [slow_to_interpret(1), 3, 63, 257, 1023])
@pytest.mark.parametrize("quantized", [True, False])
def test_odd_sizes(device, size, quantized):
    check(device, (size,), quantized=quantized)


@pytest.mark.parametrize("step", [1, 2, 100, 100_000])
def test_bias_correction(device, step):
    check(device, (700,), step=step)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_kernel_is_bit_equal_where_the_arithmetic_is(device, weight_format):
    """Both round every operation alike; only sums depend on their order."""
    tensors, fixed = problem(device, (2000,), weight_format=weight_format)
    got, eager = (run(serve, tensors, fixed) for serve in (adamw8bit_step_triton, adamw8bit_step_eager))
    for name in got.keys() - {"sums"}:
        assert_bit_equal(name, got[name], eager[name])


@pytest.mark.parametrize("root_mean_square", [0.5, 4.0])
def test_update_is_scaled_down_to_a_root_mean_square_of_one(device, root_mean_square):
    tensors, fixed = problem(device, (2000,))
    squares = torch.tensor(root_mean_square**2 * 2000, device=device)
    got, eager = (
        run(serve, tensors, fixed | {"update_scale": None}, update_squares=squares)
        for serve in (adamw8bit_step_triton, adamw8bit_step_eager)
    )
    scale = torch.tensor(1 / max(root_mean_square, 1.0), device=device)
    scaled = run(adamw8bit_step_triton, tensors, fixed | {"update_scale": scale})
    for name in got.keys() - {"sums"}:
        assert_bit_equal(name, got[name], eager[name])
        assert_bit_equal(name, got[name], scaled[name])


def test_empty_parameter(device):
    tensors, fixed = problem(device, (0,))
    assert run(adamw8bit_step_triton, tensors, fixed)["sums"].tolist() == [0, 0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("serve", [adamw8bit_step_triton, adamw8bit_step_eager])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_element_without_finite_gradient_keeps_its_weight_and_the_sum_tells(device, serve, value):
    tensors, fixed = problem(device, (600,))
    expected = run(serve, tensors, {**fixed, "grad": fixed["grad"].clone()})
    fixed["grad"][300] = value
    got = run(serve, tensors, fixed)
    assert not got["sums"][0].isfinite()
    assert got["sums"][1].isfinite()
    others = torch.arange(600, device=device) != 300
    assert got["param"][300] == tensors["param"][300]
    assert_bit_equal("other weights", got["param"][others], expected["param"][others])
    assert all(moment.isfinite().all() for moment in moments_of(got))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("serve", [adamw8bit_step_triton, adamw8bit_step_eager])
def test_gradient_scale_of_nan_leaves_every_bit_as_it_is(device, serve, weight_format):
    """The lowest code of the signed map is short of -1: encoding a block again would move it."""
    tensors, fixed = problem(device, (600,), weight_format=weight_format)
    fixed["grad_scale"].fill_(float("nan"))
    got = run(serve, tensors, fixed)
    for name, before in tensors.items():
        if before is not None:
            assert_bit_equal(name, got[name], before)


@pytest.mark.parametrize("serve", [adamw8bit_step_triton, adamw8bit_step_eager])
def test_zero_gradient_from_zero_state(device, serve):
    tensors, fixed = problem(device, (600,), step=1)
    fixed["grad"].zero_()
    tensors |= dict(zip(NAMES[2:], init_state(torch.zeros(4096, device=device)), strict=True))
    for name, size in (("state1", 600), ("state2", 600), ("absmax1", 3), ("absmax2", 3)):
        tensors[name] = tensors[name][:size]
    got = run(serve, tensors, fixed)
    assert got["sums"].tolist() == [0, 0]
    decay = tensors["param"].double() * (1 - fixed["lr"].double() * WEIGHT_DECAY)
    torch.testing.assert_close(got["param"].double(), decay, rtol=1e-7, atol=0)


def test_dry_run_writes_nothing_and_returns_the_same_sums(device):
    tensors, fixed = problem(device, (600,))
    dry, wet = run(adamw8bit_step_triton, tensors, fixed, dry_run=True), run(adamw8bit_step_triton, tensors, fixed)
    assert_bit_equal("sums", dry["sums"], wet["sums"])
    for name, tensor in tensors.items():
        if tensor is not None:
            assert_bit_equal(name, dry[name], tensor)


@pytest.mark.parametrize("weight_format", [slow_to_interpret("fp32"), slow_to_interpret("stochastic"), "extra_bits"])
def test_result_does_not_depend_on_program_order(device, weight_format):
    tensors, fixed = problem(device, (9000,), weight_format=weight_format)
    assert_independent_of_order(lambda: run(adamw8bit_step_triton, tensors, fixed), blocks=(512,))


def test_operator_is_served_by_the_kernel_in_storage_order(device):
    tensors, fixed = problem(device, (16, 16, 3, 7))
    expected = run(adamw8bit_step_triton, tensors, fixed, seed=(0, 0))
    lay_out = lambda tensor: tensor.as_strided((16, 16, 3, 7), (336, 1, 112, 16))  # noqa: E731
    param, state = tensors["param"].clone(), AdamW8bitState(*(tensors[name].clone() for name in NAMES[2:]))
    sums = adamw8bit_step(
        lay_out(param), lay_out(fixed["grad"]), state, lr=fixed["lr"], step=fixed["step"], weight_decay=WEIGHT_DECAY,
        grad_scale=fixed["grad_scale"], update_scale=fixed["update_scale"],
    )  # fmt: skip
    assert_bit_equal("param", param, expected["param"])
    assert_bit_equal("state1", state.state1, expected["state1"])
    assert_bit_equal("sums", sums, expected["sums"])


def test_states_may_be_views_of_one_buffer_of_bytes(device):
    tensors, fixed = problem(device, (5000,))
    expected = run(adamw8bit_step_triton, tensors, fixed)
    slab = torch.full((16384,), 0xAB, dtype=torch.uint8, device=device)
    offsets = {"state1": 256, "state2": 5376, "absmax1": 10496, "absmax2": 10752}
    views = {}
    for name, offset in offsets.items():
        size = tensors[name].numel() * tensors[name].element_size()
        views[name] = slab[offset : offset + size].view(tensors[name].dtype).copy_(tensors[name])
    before = slab.clone()
    param = tensors["param"].clone()
    sums = adamw8bit_step(
        param, fixed["grad"], AdamW8bitState(**views), lr=fixed["lr"], step=fixed["step"], weight_decay=WEIGHT_DECAY,
        grad_scale=fixed["grad_scale"], update_scale=fixed["update_scale"],
    )  # fmt: skip
    for name, got in {"param": param, "sums": sums, **views}.items():
        assert_bit_equal(name, got, expected[name])
    for view in views.values():
        view.zero_()
    for name, offset in offsets.items():
        before[offset : offset + tensors[name].numel() * tensors[name].element_size()] = 0
    assert torch.equal(slab, before)
