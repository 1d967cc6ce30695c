import pytest
import torch
from kernel_contract import DTYPES, assert_bit_equal, assert_independent_of_order, assert_no_worse_than_eager, guarded
from lowmem_db_kernels import geglu
from lowmem_db_kernels.geglu import geglu_backward_eager, geglu_backward_triton, geglu_eager, geglu_triton


def problem(shape, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    packed = 2.0 * torch.randn((*shape[:-1], 2 * shape[-1]), generator=generator)
    grad_output = torch.randn(shape, generator=generator)
    return packed.to(dtype).to(device), grad_output.to(dtype).to(device)


def exact_result(packed, grad_output):
    packed = packed.double().requires_grad_()
    output = geglu_eager(packed)
    (gradient,) = torch.autograd.grad(output, packed, grad_output.double())
    return output.detach(), gradient


def check(packed, grad_output):
    with guarded() as guard:
        inputs = guard(packed), guard(grad_output)
        got = geglu_triton(inputs[0]), geglu_backward_triton(inputs[1], inputs[0])
    eager = geglu_eager(packed), geglu_backward_eager(grad_output, packed)
    for name, *tensors in zip(("output", "gradient"), got, eager, exact_result(packed, grad_output), strict=True):
        assert_no_worse_than_eager(name, *tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 9, 320), (3, 1280)])
def test_kernel_matches_its_twin(device, dtype, shape):
    check(*problem(shape, device, dtype))


@pytest.mark.parametrize("size", [1, 3, 63, 257, 1023])
def test_odd_sizes(device, size):
    check(*problem((-(-64 // size) + 1, size), device))
    check(*problem((size, 67), device))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty(device, shape):
    packed, grad_output = problem(shape, device)
    assert geglu_triton(packed).shape == shape
    assert geglu_backward_triton(grad_output, packed).shape == packed.shape


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_far_tails(device):
    gate = torch.tensor([-40.0, -10.0, -6.0, 0.0, 6.0, 40.0], device=device).repeat(11)
    gate += torch.linspace(0, 0.1, 66, device=device)
    packed = torch.cat([torch.ones_like(gate), gate])[None]
    check(packed, torch.ones_like(gate)[None])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_inf_and_nan_stay_where_they_are(device):
    packed, grad_output = problem((3, 40), device)
    packed[1, 5], packed[2, 50] = float("inf"), float("nan")
    grad_output[0, 3] = float("nan")
    got = geglu_triton(packed), geglu_backward_triton(grad_output, packed)
    eager = geglu_eager(packed), geglu_backward_eager(grad_output, packed)
    for name, mine, expected in zip(("output", "gradient"), got, eager, strict=True):
        assert torch.equal(mine.isfinite(), expected.isfinite()), name


def test_result_does_not_depend_on_program_order(device):
    packed, grad_output = problem((7, 250), device)
    run = lambda: {"output": geglu_triton(packed), "gradient": geglu_backward_triton(grad_output, packed)}  # noqa: E731
    assert_independent_of_order(run, blocks=(256, 2048))


def test_operator_is_served_by_the_kernel(device):
    packed, grad_output = problem((4, 64), device)
    (gradient,) = torch.autograd.grad(geglu(packed.requires_grad_()), packed, grad_output)
    assert_bit_equal("gradient", gradient, geglu_backward_triton(grad_output, packed.detach()))
