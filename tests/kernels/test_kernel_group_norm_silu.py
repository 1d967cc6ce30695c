import pytest
import torch
from lowmem_db_kernels import group_norm_silu

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture
def arguments():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(2, 6, 3, 5), draw(6), draw(6)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_agrees_with_the_two_layers(arguments, layout):
    x, weight, bias = (tensor.float().requires_grad_() for tensor in arguments)
    x_in_layout = x.contiguous(memory_format=layout)
    expected = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 3, weight, bias, 1e-5))
    got = group_norm_silu(x_in_layout, 3, weight, bias, 1e-5)
    assert got.is_contiguous(memory_format=layout)
    torch.testing.assert_close(got, expected)
    for mine, theirs in zip(
        *(torch.autograd.grad(y.sin().sum(), (x, weight, bias)) for y in (got, expected)), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_only_input_and_statistics_are_saved(arguments):
    x, weight, bias = (tensor.float().requires_grad_() for tensor in arguments)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        group_norm_silu(x, 3, weight, bias)
    assert sorted(tensor.numel() for tensor in saved) == [6, 6, 6, 6, x.numel()]
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in saved)


@pytest.mark.parametrize(("num_groups", "size", "match"), [(4, 6, "cannot be divided"), (3, 5, "do not fit")])
def test_wrong_arguments_are_named(arguments, num_groups, size, match):
    with pytest.raises(ValueError, match=match):
        group_norm_silu(arguments[0].float(), num_groups, torch.ones(size), torch.ones(size))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_operators_are_registered_correctly(arguments, layout):
    x, weight, bias = (tensor.float().requires_grad_() for tensor in arguments)
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    ops = torch.ops.lowmem_db_kernels
    torch.library.opcheck(ops.group_norm_silu.default, (x, 3, weight, bias, 1e-5))
    statistics = torch.zeros(2, 3), torch.ones(2, 3)
    detached = [tensor.detach() for tensor in (x, weight, bias)]
    inputs = (torch.ones_like(detached[0]), detached[0], *statistics, *detached[1:])
    torch.library.opcheck(ops.group_norm_silu_backward.default, inputs)
