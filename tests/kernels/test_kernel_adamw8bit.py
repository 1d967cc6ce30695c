import pytest
import torch
from lowmem_db_kernels import (
    AdamW8bitState,
    adamw8bit_step,
    from_bitsandbytes,
    init_state,
    pack_extra_bits_eager,
    to_bitsandbytes,
    unpack_extra_bits_eager,
)
from lowmem_db_kernels.codec import decode_eager, dynamic_map

STEPS = 200


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bitsandbytes_optimizer(parameter, lr=1e-3):
    optim = pytest.importorskip("bitsandbytes").optim
    return optim.AdamW8bit([parameter], lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)


def take_steps(param, optimizer, state, first, count, *, theirs=True, mine=None):
    """Step both copies on the same gradients."""
    for step in range(first, first + count):
        grad = draw(*param.shape, seed=step) * 1e-2 + 0.1 * draw(*param.shape, seed=0)
        if theirs:
            param.grad = grad.clone()
            optimizer.step()
        if mine is not None:
            adamw8bit_step(mine, grad, state, lr=1e-3, step=step)


@pytest.fixture
def exact_quantizer(monkeypatch):
    """Let bitsandbytes quantize by its own generic code, which finds the nearest code as its CUDA kernels do.

    Its native CPU routine looks the code up by 16 bits of the value, so that 0 becomes code 131 and not 127.
    """
    ops = pytest.importorskip("bitsandbytes.backends.cpu.ops")

    def quantize(values, code, absmax, out, blocksize):
        codes, maxima = torch.ops.bitsandbytes.quantize_blockwise(values.double(), code, blocksize)
        out.copy_(codes)
        absmax.copy_(maxima)

    monkeypatch.setattr(ops, "_quant_blockwise_fp32_direct", quantize)


@pytest.mark.parametrize("shape", [(64, 64), (10, 1000), (16, 20, 3, 7)])
def test_200_steps_agree_with_bitsandbytes(shape, exact_quantizer):
    theirs = torch.nn.Parameter(draw(*shape, seed=9) * 0.03)
    mine = theirs.detach().clone()
    optimizer, state = bitsandbytes_optimizer(theirs), init_state(theirs)
    take_steps(theirs, optimizer, state, 1, STEPS, mine=mine)
    expected, _ = from_bitsandbytes(optimizer.state[theirs])
    for name in ("state1", "state2"):
        difference = (getattr(state, name).int() - getattr(expected, name).int()).abs()
        assert difference.max() <= 1, f"{name} differs by more than a tie"
        assert (difference != 0).float().mean() < 1e-3, name
    # Half a unit in the last place a step; where a tie fell to the other code, less than one step.
    distance = (mine - theirs.detach()).abs().flatten()
    assert distance.quantile(0.999) <= STEPS * torch.finfo(torch.float32).eps / 2 * theirs.abs().max()
    assert distance.max() < 1e-3


def nearest_codes(moment, absmax, *, signed):
    """Find the nearest code of float64 moments by looking through the map."""
    table = dynamic_map(signed).double()
    scale = absmax.double().repeat_interleave(256)[: moment.numel()].clamp(min=1e-38)
    return torch.bucketize(moment / scale, (table[1:] + table[:-1]) / 2)


def decoded(codes, absmax, *, signed):
    scale = absmax.double().repeat_interleave(256)[: codes.numel()]
    return decode_eager(codes.flatten(), signed=signed).double() * scale


@pytest.mark.parametrize("shape", [(64, 64), (10, 1000), (16, 20, 3, 7)])
def test_where_codes_differ_from_bitsandbytes_on_a_cpu_its_code_is_not_the_nearest(shape):
    """Every twentieth of 200 steps, both from its state; its native routine looks codes up by 16 bits of the value."""
    theirs = torch.nn.Parameter(draw(*shape, seed=9) * 0.03)
    optimizer = bitsandbytes_optimizer(theirs)
    for last in range(20, STEPS + 1, 20):
        take_steps(theirs, optimizer, None, last - 19, 19)
        before, step = from_bitsandbytes(optimizer.state[theirs])
        mine = AdamW8bitState(*(tensor.clone() for tensor in before))
        m, v = (decoded(*state, signed=signed) for state, signed in ((mine[::2], True), (mine[1::2], False)))
        take_steps(theirs, optimizer, mine, step + 1, 1, mine=theirs.detach().clone())
        grad = theirs.grad.flatten().double()
        exact = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        after, _ = from_bitsandbytes(optimizer.state[theirs])
        for index, signed in ((0, True), (1, False)):
            got, other = mine[index].flatten().long(), after[index].flatten().long()
            nearest = nearest_codes(exact[index], mine[2 + index], signed=signed)
            assert (got != nearest).double().mean() < 1e-3
            assert ((got != other) & (other == nearest)).double().mean() < 1e-3


def test_one_step_from_a_state_of_bitsandbytes_moves_the_weights_alike():
    theirs = torch.nn.Parameter(draw(64, 64) * 0.03)
    optimizer = bitsandbytes_optimizer(theirs)
    take_steps(theirs, optimizer, None, 1, 10)
    state, step = from_bitsandbytes(optimizer.state[theirs])
    state = AdamW8bitState(*(tensor.clone() for tensor in state))
    mine = theirs.detach().clone()
    take_steps(theirs, optimizer, state, step + 1, 1, mine=mine)
    assert (mine - theirs).abs().max() <= 2 * torch.finfo(torch.float32).eps * theirs.abs().max()


def test_state_goes_to_bitsandbytes_and_back_unchanged():
    theirs = torch.nn.Parameter(draw(80, 100))
    optimizer = bitsandbytes_optimizer(theirs)
    take_steps(theirs, optimizer, None, 1, 5)
    before = {
        key: value.clone() if isinstance(value, torch.Tensor) else value
        for key, value in optimizer.state[theirs].items()
    }
    after = to_bitsandbytes(*from_bitsandbytes(optimizer.state[theirs]))
    assert set(after) == set(before)
    for key, value in before.items():
        assert torch.equal(torch.as_tensor(after[key]), torch.as_tensor(value)), key
    # And bitsandbytes goes on from it as if it had never left.
    other = torch.nn.Parameter(theirs.detach().clone())
    resumed = bitsandbytes_optimizer(other)
    resumed.load_state_dict({**optimizer.state_dict(), "state": {0: after}})
    for parameter, stepper in ((theirs, optimizer), (other, resumed)):
        take_steps(parameter, stepper, None, 6, 1)
    assert torch.equal(theirs, other)


def test_another_map_is_refused():
    entries = to_bitsandbytes(init_state(torch.zeros(5000)), 1)
    entries["qmap1"] = entries["qmap1"] + 0.1
    with pytest.raises(ValueError, match="qmap1 is not the dynamic map"):
        from_bitsandbytes(entries)


def test_agrees_with_adamw_of_torch_while_states_are_fp32():
    theirs = torch.nn.Parameter(draw(1000))
    mine, state = theirs.detach().clone(), init_state(theirs)
    optimizer = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.01)
    take_steps(theirs, optimizer, state, 1, 20, mine=mine)
    torch.testing.assert_close(mine, theirs.detach(), rtol=1e-5, atol=1e-7)


def test_stochastic_rounding_is_unbiased():
    """100,000 draws of one update much smaller than the spacing of bf16."""
    n, lr = 100_000, 1e-6
    param = torch.full((n,), 0.03, dtype=torch.bfloat16)
    start = param[0].double()
    spacing = 2.0**-13
    zeros = torch.zeros(n)
    adamw8bit_step(
        param,
        torch.ones(n),
        AdamW8bitState(zeros, zeros.clone(), None, None),
        lr=lr,
        step=1,
        weight_decay=0.0,
        rounding_seed=5,
    )
    p = lr / spacing
    assert abs((start - param.double().mean()) / spacing - p) < 4 * (p * (1 - p) / n) ** 0.5
    assert set(param.double().unique().tolist()) == {start.item(), start.item() - spacing}


def test_24_bit_weights_lose_at_most_2_to_the_minus_16():
    x = draw(100_000) * torch.logspace(-30, 30, 100_000)
    high, low = pack_extra_bits_eager(x)
    back = unpack_extra_bits_eager(high, low)
    assert ((back - x) / x).abs().max() <= 2**-16
    assert ((high.float() - x) / x).abs().max() <= 2**-8 * 1.01
    assert torch.equal(torch.stack(list(pack_extra_bits_eager(back)[:1])), torch.stack([high]))


def test_weight_decay_survives_a_small_learning_rate():
    """1 - 2e-6 * 0.01 rounds to 1 in fp32, so decay done on its own would be lost; 24 bits keep it in the mean."""
    param = torch.full((5000,), 1.0)
    adamw8bit_step(param, torch.ones(5000), init_state(param), lr=1e-6, step=1, weight_decay=0.5)
    plain = torch.full((5000,), 1.0)
    adamw8bit_step(plain, torch.ones(5000), init_state(plain), lr=1e-6, step=1, weight_decay=0.0)
    torch.testing.assert_close(plain - param, torch.full_like(param, 5e-7), rtol=0.2, atol=0)


def test_channels_last_weights_keep_their_layout():
    param = (draw(32, 16, 3, 3) * 0.03).to(memory_format=torch.channels_last)
    grad = draw(32, 16, 3, 3, seed=1).to(memory_format=torch.channels_last)
    contiguous, state = param.permute(0, 2, 3, 1).contiguous(), init_state(param)
    sums = adamw8bit_step(param, grad, state, lr=1e-3, step=1)
    other = init_state(contiguous)
    expected = adamw8bit_step(contiguous, grad.permute(0, 2, 3, 1).contiguous(), other, lr=1e-3, step=1)
    assert param.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(param.permute(0, 2, 3, 1), contiguous)
    assert torch.equal(sums, expected)
    assert state.absmax1 is not None
    assert torch.equal(state.absmax1, other.absmax1)


@pytest.mark.parametrize("scales", [{"grad_scale": torch.tensor(0.5)}, {"update_scale": torch.tensor(0.0)}])
def test_scales_are_tensors(scales):
    param, grad = draw(5000), draw(5000, seed=1)
    got, expected = param.clone(), param.clone()
    sums = adamw8bit_step(got, grad, init_state(param), lr=1e-3, step=1, weight_decay=0.0, **scales)
    scaled = grad * scales.get("grad_scale", 1.0)
    adamw8bit_step(expected, scaled, init_state(param), lr=1e-3, step=1, weight_decay=0.0)
    if "update_scale" in scales:
        expected = param
    assert torch.equal(got, expected)
    torch.testing.assert_close(sums[0], grad.square().sum())


@pytest.mark.parametrize(("root_mean_square", "scale"), [(0.5, 1.0), (1.0, 1.0), (4.0, 0.25)])
def test_update_is_scaled_down_to_a_root_mean_square_of_one(root_mean_square, scale):
    param, grad = draw(5000), draw(5000, seed=1)
    got, expected = param.clone(), param.clone()
    squares = torch.tensor(root_mean_square**2 * 5000)
    sums = adamw8bit_step(got, grad, init_state(param), lr=1e-3, step=1, update_squares=squares)
    other = adamw8bit_step(expected, grad, init_state(param), lr=1e-3, step=1, update_scale=torch.tensor(scale))
    assert torch.equal(got, expected)
    assert torch.equal(sums, other), "before the scale"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"update_scale": torch.tensor(1.0), "update_squares": torch.tensor(1.0)}, "pass either update_scale or"),
        ({"param": torch.zeros(8, dtype=torch.float16)}, "float16 weights are not supported"),
        ({"param": torch.zeros(8, dtype=torch.bfloat16)}, "lose small updates by rounding"),
        ({"rounding_seed": 1}, "are for bf16 weights"),
        ({"param": torch.zeros(4, 4)[:, :2]}, "is not dense"),
        ({"grad": torch.zeros(4, 2)}, "grad must have the shape"),
    ],
)
def test_what_cannot_be_stepped_is_refused(change, match):
    param = change.pop("param", torch.zeros(8))
    grad = change.pop("grad", torch.zeros(param.shape))
    with pytest.raises(ValueError, match=match):
        adamw8bit_step(param, grad, init_state(param), lr=1e-3, step=1, **change)


def test_a_gradient_in_another_layout_is_refused():
    param = draw(8, 4, 3, 3).to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="grad must have the shape"):
        adamw8bit_step(param, draw(8, 4, 3, 3), init_state(param), lr=1e-3, step=1)


def test_scalars_of_another_type_count_alike():
    param, grad = draw(5000), draw(5000, seed=1)
    other = param.clone()
    scales = {"grad_scale": torch.tensor(0.5), "update_scale": torch.tensor(0.25)}
    adamw8bit_step(param, grad, init_state(param), lr=torch.tensor(1e-3), step=1, **scales)
    scales = {name: scale.double() for name, scale in scales.items()}
    adamw8bit_step(other, grad, init_state(other), lr=torch.tensor(1e-3).double(), step=1, **scales)
    assert torch.equal(param, other)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)])
def test_an_empty_parameter_is_stepped(shape):
    param = torch.zeros(shape)
    assert adamw8bit_step(param, torch.zeros(shape), init_state(param), lr=1e-3, step=1).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"state1": torch.zeros(4999, dtype=torch.uint8)}, "state1 is torch.uint8 with 4999 elements"),
        ({"state2": torch.zeros(5000)}, "needs 5000 dense elements of torch.uint8"),
        ({"absmax1": torch.zeros(19)}, "absmax1 is torch.float32 with 19 elements.*needs 20"),
        ({"absmax2": torch.zeros(40)[::2]}, r"absmax2 .* strides \(2,\)"),
        ({"absmax2": None}, "a state must have both absmax1 and absmax2, or neither"),
    ],
)
def test_a_state_of_another_parameter_is_refused(change, match):
    param = torch.zeros(5000)
    with pytest.raises(ValueError, match=match):
        adamw8bit_step(param, param, init_state(param)._replace(**change), lr=1e-3, step=1)


@pytest.mark.parametrize("weights", ["fp32", "extra_bits", "stochastic"])
@pytest.mark.parametrize("size", [300, 5000])
@pytest.mark.parametrize("dry_run", [False, True])
def test_operator_is_registered_correctly(weights, size, dry_run):
    param, extra_bits = draw(size), None
    if weights == "extra_bits":
        param, extra_bits = pack_extra_bits_eager(param)
    elif weights == "stochastic":
        param = param.to(torch.bfloat16)
    lr, step, corrections = torch.tensor(1e-3), torch.tensor(1), torch.tensor([0.1, 0.03])
    scales = torch.tensor(0.5), torch.tensor(0.5)
    arguments = (param, extra_bits, draw(size), *init_state(param), lr, step, corrections, *scales)
    operator = torch.ops.lowmem_db_kernels.adamw8bit_step.default
    torch.library.opcheck(operator, (*arguments, 0.9, 0.999, 1e-8, 0.01, 1, 2, dry_run))
