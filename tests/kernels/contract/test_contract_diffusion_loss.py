import pytest
import torch
from kernel_contract import (
    DTYPES,
    assert_bit_equal,
    assert_independent_of_order,
    assert_no_worse_than_eager,
    assert_sums_no_worse_than_eager,
    guarded,
)
from lowmem_db_kernels.diffusion_loss import (
    LOSS_KINDS,
    diffusion_loss,
    diffusion_loss_eager,
    diffusion_loss_triton,
)

NAMES = ("total", "instance", "prior", "finite", "per_sample", "gradient")


def problem(shape=(3, 4, 6, 7), device="cpu", dtype=torch.float32, *, mask=False, variance=False, seed=1):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(size, generator=generator).to(device)  # noqa: E731
    batch, channels, *spatial = shape
    return {
        "prediction": draw(batch, channels * (2 if variance else 1), *spatial).to(dtype),
        "target": draw(*shape),
        "timesteps": (torch.arange(batch, device=device) * 3) % 7,
        "weights": draw(7).abs(),
        "c_table": draw(7).abs() + 0.1,
        "mask": draw(batch, 1, *spatial).abs() if mask else None,
    }


def named(packed, gradient):
    return dict(zip(NAMES, (*packed[:4].unbind(), packed[4:], gradient), strict=True))


def run(serve, arguments, kind="mse", num_instance=1, prior_loss_weight=0.7, grad_scale=1.0):
    gradient = torch.full_like(arguments["prediction"], 99)
    packed = serve(*arguments.values(), num_instance, prior_loss_weight, LOSS_KINDS.index(kind), grad_scale, gradient)
    return named(packed, gradient)


def exact_result(arguments, kind="mse", num_instance=1, prior_loss_weight=0.7, grad_scale=1.0):
    prediction = arguments["prediction"].double().requires_grad_()
    target, t = arguments["target"].double(), arguments["timesteps"]
    difference = prediction[:, : target.shape[1]] - target
    c = arguments["c_table"].double()[t].reshape(-1, 1, 1, 1)
    value = {
        "mse": difference**2,
        "l1": difference.abs(),
        "huber": 2 * c * ((difference**2 + c**2).sqrt() - c),
    }[kind]
    value = value if arguments["mask"] is None else value * arguments["mask"].double()
    losses = value.mean((1, 2, 3)) * arguments["weights"].double()[t]
    instance, prior = (
        part.mean() if len(part) else part.sum() for part in losses.split((num_instance, len(losses) - num_instance))
    )
    total = instance + prior_loss_weight * prior
    (total * grad_scale).backward()
    packed = torch.stack([total, instance, prior, torch.ones_like(total), *losses]).detach()
    return named(packed, prediction.grad)


def check(*problem_arguments, settings=None, **problem_settings):
    """Compare over many problems: the losses are single numbers."""
    settings = settings or {}
    results = []
    for seed in range(12):
        arguments = problem(*problem_arguments, seed=seed, **problem_settings)
        with guarded() as guard:
            got = run(diffusion_loss_triton, {name: guard(value) for name, value in arguments.items()}, **settings)
        results.append((got, run(diffusion_loss_eager, arguments, **settings), exact_result(arguments, **settings)))
    by_server = list(zip(*results, strict=True))
    assert_no_worse_than_eager("gradient", *(torch.stack([part["gradient"] for part in parts]) for parts in by_server))
    losses = [torch.cat([part[name].reshape(-1) for part in parts for name in NAMES[:-1]]) for parts in by_server]
    assert_sums_no_worse_than_eager("losses", *losses)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LOSS_KINDS)
@pytest.mark.parametrize("mask", [False, True])
def test_kernel_matches_its_twin(device, dtype, kind, mask):
    check(device=device, dtype=dtype, mask=mask, settings={"kind": kind})


@pytest.mark.parametrize("num_instance", [0, 2, 3])
@pytest.mark.parametrize("prior_loss_weight", [0.0, 1.0])
def test_parts(device, num_instance, prior_loss_weight):
    check(device=device, settings={"num_instance": num_instance, "prior_loss_weight": prior_loss_weight})


@pytest.mark.parametrize("size", [1, 3, 63, 257, 1023])
@pytest.mark.parametrize("mask", [False, True])
def test_odd_sizes(device, size, mask):
    check((2, 3, 1, size), device, mask=mask, settings={"kind": "huber"})


@pytest.mark.parametrize("mask", [False, True])
def test_learned_variance_gets_a_zero_gradient(device, mask):
    check((2, 3, 5, 5), device, mask=mask, variance=True)
    arguments = problem((2, 3, 5, 5), device, mask=mask, variance=True)
    assert (run(diffusion_loss_triton, arguments)["gradient"][:, 3:] == 0).all()


def test_empty_batch(device):
    got = run(diffusion_loss_triton, problem((0, 4, 8, 8), device), num_instance=0)
    assert [got[name].item() for name in NAMES[:4]] == [0, 0, 0, 1]


def test_all_masked(device):
    arguments = problem(device=device, mask=True)
    arguments["mask"].zero_()
    got = run(diffusion_loss_triton, arguments)
    assert got["total"] == 0
    assert got["finite"] == 1
    assert not got["gradient"].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", LOSS_KINDS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_not_finite_prediction_is_reported(device, kind, value):
    arguments = problem(device=device)
    arguments["prediction"][1, 2, 3, 4] = value
    for serve in (diffusion_loss_triton, diffusion_loss_eager):
        assert run(serve, arguments, kind=kind)["finite"] == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("grad_scale", "finite"), [(65536.0, 1), (2.0**30, 0)])
def test_fp16_gradient_scale(device, grad_scale, finite):
    arguments = problem(device=device, dtype=torch.float16)
    got = run(diffusion_loss_triton, arguments, grad_scale=grad_scale)
    assert got["finite"] == finite
    assert run(diffusion_loss_eager, arguments, grad_scale=grad_scale)["finite"] == finite
    if finite:
        check(device=device, dtype=torch.float16, settings={"grad_scale": grad_scale})


def test_fp16_scale_saves_small_gradients(device):
    arguments = problem((2, 4, 64, 64), device, dtype=torch.float16)
    arguments["weights"] *= 1e-2
    exact = exact_result(arguments)["gradient"]
    error = {}
    for scale in (1.0, 1024.0):
        gradient = run(diffusion_loss_triton, arguments, grad_scale=scale)["gradient"].double() / scale
        error[scale] = ((gradient - exact).norm() / exact.norm()).item()
    assert error[1024.0] < error[1.0] / 4


def test_gradient_may_overwrite_the_prediction(device):
    arguments = problem(device=device, dtype=torch.bfloat16, mask=True)
    expected = run(diffusion_loss_triton, arguments)
    prediction = arguments["prediction"].clone()
    packed = diffusion_loss_triton(prediction, *list(arguments.values())[1:], 1, 0.7, 0, 1.0, prediction)
    for name, value in named(packed, prediction).items():
        assert_bit_equal(name, value, expected[name])


@pytest.mark.parametrize("mask", [False, True])
def test_result_does_not_depend_on_program_order(device, mask):
    arguments = problem((2, 3, 9, 257), device, mask=mask)
    assert_independent_of_order(lambda: run(diffusion_loss_triton, arguments, kind="huber"))


def test_operator_is_served_by_the_kernel(device):
    arguments = problem(device=device)
    prediction = arguments["prediction"].requires_grad_()
    rest = [arguments[name] for name in ("target", "timesteps", "weights")]
    loss = diffusion_loss(prediction, *rest, num_instance=1, prior_loss_weight=0.7)
    (3.0 * loss.total).backward()
    expected = run(diffusion_loss_triton, {**arguments, "prediction": prediction.detach()})
    assert_bit_equal("total", loss.total.detach(), expected["total"])
    assert_bit_equal("gradient", prediction.grad, expected["gradient"] * 3.0)
