import pytest
import torch
from kernel_contract import (
    MINIMUM_COUNT,
    assert_bit_equal,
    assert_independent_of_order,
    assert_no_worse_than_eager,
    assert_together_no_worse_than_eager,
    guarded,
    slow_to_interpret,
)
from lowmem_db_kernels import group_norm_silu
from lowmem_db_kernels.group_norm_silu import (
    group_norm_silu_backward_eager,
    group_norm_silu_backward_triton,
    group_norm_silu_eager,
    group_norm_silu_triton,
)

EPS = 1e-5
LAYOUTS = [torch.contiguous_format, torch.channels_last]
FEW_LAYOUTS = [torch.contiguous_format, slow_to_interpret(torch.channels_last)]
NAMES = ("output", "mean", "rstd", "grad_x", "grad_weight", "grad_bias")
SMALL_NAMES = ("mean", "rstd", "grad_weight", "grad_bias")
TRITON = (group_norm_silu_triton, group_norm_silu_backward_triton)
EAGER = (group_norm_silu_eager, group_norm_silu_backward_eager)


def problem(
    device,
    shape=(2, 12, 9, 11),
    dtype=torch.float32,
    layout=torch.contiguous_format,
    *,
    shift=0.5,
    seed=0,
    parameter_dtype=None,
):
    generator = torch.Generator().manual_seed(seed)
    x, grad_output = (torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(2))
    parameters = torch.randn(2, shape[1], generator=generator) + torch.tensor([[1.0], [0.0]])
    weight, bias = parameters.to(parameter_dtype or dtype).to(device)
    x = x + shift
    if len(shape) == 4:
        x, grad_output = (tensor.contiguous(memory_format=layout) for tensor in (x, grad_output))
    return {"x": x, "grad_output": grad_output, "weight": weight, "bias": bias}


def run(functions, arguments, num_groups=4):
    forward, backward = functions
    x, grad_output, weight, bias = arguments.values()
    output, mean, rstd = forward(x, num_groups, weight, bias, EPS)
    return dict(zip(NAMES, (output, mean, rstd, *backward(grad_output, x, mean, rstd, weight, bias)), strict=True))


def exact_result(arguments, num_groups=4):
    x, weight, bias = (arguments[name].double().requires_grad_() for name in ("x", "weight", "bias"))
    groups = x.reshape(x.shape[0], num_groups, -1)
    mean, rstd = groups.mean(2), (groups.var(2, correction=0) + EPS).rsqrt()
    normalized = ((groups - mean[..., None]) * rstd[..., None]).reshape(x.shape)
    channel = (1, -1, *[1] * (x.ndim - 2))
    output = torch.nn.functional.silu(normalized * weight.reshape(channel) + bias.reshape(channel))
    gradients = torch.autograd.grad(output, (x, weight, bias), arguments["grad_output"].double())
    return dict(zip(NAMES, (output.detach(), mean.detach(), rstd.detach(), *gradients), strict=True))


def check(*problem_arguments, num_groups=4, num_problems=4, **problem_options):
    """Compare over several problems: an error of a group's statistics is one error of all its elements."""
    results = []
    for seed in range(num_problems):
        arguments = problem(*problem_arguments, seed=seed, **problem_options)
        with guarded() as guard:
            got = run(TRITON, {name: guard(tensor) for name, tensor in arguments.items()}, num_groups)
        results.append((got, run(EAGER, arguments, num_groups), exact_result(arguments, num_groups)))
    by_server = [{name: torch.stack([part[name] for part in parts]) for name in NAMES} for parts in zip(*results)]  # noqa: B905
    stacked = {name: [server[name] for server in by_server] for name in NAMES}
    few = any(stacked[name][0].numel() < MINIMUM_COUNT for name in SMALL_NAMES)
    if few:
        assert_together_no_worse_than_eager({name: stacked[name] for name in SMALL_NAMES})
    for name in NAMES:
        if not (few and name in SMALL_NAMES):
            assert_no_worse_than_eager(name, *stacked[name], sums=True)
    for name in ("output", "grad_x"):
        strides = [tensors[name].stride() for tensors in results[0][:2]]
        assert strides == [arguments["x"].stride()] * 2, name


@pytest.mark.parametrize(
    "dtype", [slow_to_interpret(torch.float32), slow_to_interpret(torch.float16), torch.bfloat16], ids=str
)
@pytest.mark.parametrize("layout", FEW_LAYOUTS, ids=str)
def test_kernel_matches_its_twin(device, dtype, layout):
    check(device, dtype=dtype, layout=layout, num_problems=8)


@pytest.mark.parametrize(
    ("shape", "num_problems"),
    [
        ((6, 8, 1, 1), 4),
        ((2, 4, 1, 3), 12),
        slow_to_interpret((1, 4, 7, 9), 8),
        slow_to_interpret((6, 2, 1, 257), 3),
        slow_to_interpret((1, 8, 33, 31), 4),
        ((2, 6, 5), 6),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_odd_sizes(device, shape, num_problems, layout):
    check(device, shape, layout=layout, num_groups=2, num_problems=num_problems)


@pytest.mark.parametrize("num_groups", [1, 3, slow_to_interpret(24)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_groups_of_any_size(device, num_groups, layout):
    check(device, (2, 24, 4, 4), layout=layout, num_groups=num_groups)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("layout", FEW_LAYOUTS, ids=str)
def test_a_large_mean_does_not_cancel_the_variance(device, layout):
    """E[x^2] - E[x]^2 would leave no correct digit here."""
    check(device, layout=layout, shift=3000.0)
    arguments = problem(device, layout=layout, shift=3000.0)
    got, exact = run(TRITON, arguments), exact_result(arguments)
    torch.testing.assert_close(got["rstd"].double(), exact["rstd"], rtol=1e-4, atol=0)


def test_weights_may_be_wider_than_the_input(device):
    check(device, dtype=torch.float16, parameter_dtype=torch.float32)
    arguments = problem(device, dtype=torch.float16, parameter_dtype=torch.float32)
    assert run(TRITON, arguments)["grad_weight"].dtype == torch.float32


def test_empty_batch(device):
    got = run(TRITON, problem(device, (0, 12, 4, 4)))
    assert got["output"].shape == got["grad_x"].shape == (0, 12, 4, 4)
    assert not got["grad_weight"].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_spoils_its_own_group_only(device):
    arguments = problem(device)
    arguments["x"][1, 4, 2, 2] = float("nan")
    output = run(TRITON, arguments)["output"]
    assert output[0].isfinite().all()
    assert output[1, :3].isfinite().all()
    assert output[1, 3:6].isnan().all()


@pytest.mark.parametrize("layout", FEW_LAYOUTS, ids=str)
def test_result_does_not_depend_on_program_order(device, layout):
    arguments = problem(device, (1, 8, 17, 31), layout=layout)
    assert_independent_of_order(lambda: run(TRITON, arguments), blocks=(512,))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_operator_is_served_by_the_kernel(device, layout):
    arguments = problem(device, layout=layout)
    leaves = [arguments[name].detach().requires_grad_() for name in ("x", "weight", "bias")]
    output = group_norm_silu(leaves[0], 4, *leaves[1:], EPS)
    gradients = torch.autograd.grad(output, leaves, arguments["grad_output"])
    expected = run(TRITON, arguments)
    for name, gradient in zip(("grad_x", "grad_weight", "grad_bias"), gradients, strict=True):
        assert_bit_equal(name, gradient, expected[name])
