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
from lowmem_db_kernels.diffusion_loss import (
    LOSS_KINDS,
    LossOperands,
    diffusion_loss,
    diffusion_loss_eager,
    diffusion_loss_triton,
)

NAMES = ("total", "instance", "prior", "finite", "per_sample", "gradient")


def problem(
    shape=(3, 4, 6, 7), device="cpu", dtype=torch.float32, *, variance=False, kind="mse", num_instance=1,
    prior_loss_weight=0.7, seed=1,
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(size, generator=generator).to(device)  # noqa: E731
    batch, channels, *spatial = shape
    return LossOperands(
        prediction=draw(batch, channels * (2 if variance else 1), *spatial).to(dtype),
        target=draw(*shape),
        weights=draw(batch).abs(),
        huber_c=draw(batch).abs() + 0.1,
        num_instance=num_instance,
        prior_loss_weight=prior_loss_weight,
        kind=LOSS_KINDS.index(kind),
    )


def named(packed, gradient):
    return dict(zip(NAMES, (*packed[:4].unbind(), packed[4:], gradient), strict=True))


def run(serve, operands):
    gradient = torch.full_like(operands.prediction, 99)
    return named(serve(operands, gradient), gradient)


def exact_result(operands):
    prediction, num_instance = operands.prediction.double().requires_grad_(), operands.num_instance
    target = operands.target.double()
    difference = prediction[:, : target.shape[1]] - target
    c = operands.huber_c.double().reshape(-1, 1, 1, 1)
    value = {
        "mse": difference**2,
        "l1": difference.abs(),
        "huber": 2 * c * ((difference**2 + c**2).sqrt() - c),
    }[LOSS_KINDS[operands.kind]]
    losses = value.mean((1, 2, 3)) * operands.weights.double()
    instance, prior = (
        part.mean() if len(part) else part.sum() for part in losses.split((num_instance, len(losses) - num_instance))
    )
    total = instance + operands.prior_loss_weight * prior
    total.backward()
    packed = torch.stack([total, instance, prior, torch.ones_like(total), *losses]).detach()
    return named(packed, prediction.grad)


def guard_all(operands, guard):
    return LossOperands(*(guard(value) if isinstance(value, torch.Tensor) else value for value in operands))


def check(*problem_arguments, **problem_settings):
    """Compare over many problems: the losses are single numbers."""
    results = []
    for seed in range(12):
        operands = problem(*problem_arguments, seed=seed, **problem_settings)
        with guarded() as guard:
            got = run(diffusion_loss_triton, guard_all(operands, guard))
        results.append((got, run(diffusion_loss_eager, operands), exact_result(operands)))
    by_server = list(zip(*results, strict=True))
    assert_no_worse_than_eager("gradient", *(torch.stack([part["gradient"] for part in parts]) for parts in by_server))
    losses = [torch.cat([part[name].reshape(-1) for part in parts for name in NAMES[:-1]]) for parts in by_server]
    assert_sums_no_worse_than_eager("losses", *losses)


@pytest.mark.parametrize("dtype", [torch.float32, slow_to_interpret(torch.float16), torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_kernel_matches_its_twin(device, dtype, kind):
    check(device=device, dtype=dtype, kind=kind)


@pytest.mark.parametrize("num_instance", [0, 2, 3])
@pytest.mark.parametrize("prior_loss_weight", [0.0, 1.0])
def test_parts(device, num_instance, prior_loss_weight):
    check(device=device, num_instance=num_instance, prior_loss_weight=prior_loss_weight)


@pytest.mark.parametrize("size", [1, 3, 63, 257, 1023])
def test_odd_sizes(device, size):
    check((2, 3, 1, size), device, kind="huber")


def test_learned_variance_gets_a_zero_gradient(device):
    check((2, 3, 5, 5), device, variance=True)
    operands = problem((2, 3, 5, 5), device, variance=True)
    assert (run(diffusion_loss_triton, operands)["gradient"][:, 3:] == 0).all()


def test_empty_batch(device):
    got = run(diffusion_loss_triton, problem((0, 4, 8, 8), device, num_instance=0))
    assert [got[name].item() for name in NAMES[:4]] == [0, 0, 0, 1]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", LOSS_KINDS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_not_finite_prediction_is_reported(device, kind, value):
    operands = problem(device=device, kind=kind)
    operands.prediction[1, 2, 3, 4] = value
    for serve in (diffusion_loss_triton, diffusion_loss_eager):
        assert run(serve, operands)["finite"] == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("scale", "finite"), [(65536.0, 1), (2.0**30, 0)])
def test_fp16_gradient_that_overflows_is_reported(device, scale, finite):
    operands = problem(device=device, dtype=torch.float16)
    operands = operands._replace(weights=operands.weights * scale)
    for serve in (diffusion_loss_triton, diffusion_loss_eager):
        assert run(serve, operands)["finite"] == finite


def test_result_does_not_depend_on_program_order(device):
    operands = problem((2, 3, 9, 257), device, kind="huber")
    assert_independent_of_order(lambda: run(diffusion_loss_triton, operands))


def test_operator_is_served_by_the_kernel(device):
    operands = problem(device=device)
    prediction = operands.prediction.clone().requires_grad_()
    loss = diffusion_loss(prediction, operands.target, operands.weights, num_instance=1, prior_loss_weight=0.7)
    (3.0 * loss.total).backward()
    expected = run(diffusion_loss_triton, operands)
    assert_bit_equal("total", loss.total.detach(), expected["total"])
    assert_bit_equal("gradient", prediction.grad, expected["gradient"] * 3.0)
