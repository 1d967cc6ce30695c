import pytest
import torch
from lowmem_db_kernels import geglu


@pytest.fixture
def packed():
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def test_agrees_with_diffusers(packed):
    activations = pytest.importorskip("diffusers.models.activations")
    layer = activations.GEGLU(8, 8)
    layer.proj = torch.nn.Identity()
    assert torch.equal(geglu(packed), layer(packed))


def test_gradient(packed):
    torch.autograd.gradcheck(geglu, (packed[:1].double().requires_grad_(),))


def test_only_the_input_is_saved(packed):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        geglu(packed.requires_grad_())
    assert [tensor.data_ptr() for tensor in saved] == [packed.data_ptr()]


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="cannot be halved"):
        geglu(torch.zeros(2, 3))


def test_operators_are_registered_correctly(packed):
    ops = torch.ops.lowmem_db_kernels
    torch.library.opcheck(ops.geglu.default, (packed.requires_grad_(),))
    torch.library.opcheck(ops.geglu_backward.default, (torch.ones(2, 5, 8), packed.detach()))
