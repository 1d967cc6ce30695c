import torch
from lowmem_db_kernels import layers


def test_layers_serve_on_the_parameters_of_a_model():
    x, norm = torch.randn(2, 8, 4, 4), torch.nn.GroupNorm(4, 8)
    expected = torch.nn.functional.silu(norm(x))
    torch.testing.assert_close(layers.GroupNormSiLU.forward(norm, x), expected)
    gated = torch.nn.Module()
    gated.proj = torch.nn.Linear(8, 12)
    hidden, gate = gated.proj(x.transpose(1, 3)).chunk(2, dim=-1)
    got = layers.GEGLU.forward(gated, x.transpose(1, 3))
    torch.testing.assert_close(got, hidden * torch.nn.functional.gelu(gate))


def test_layers_have_no_constructor_of_their_own():
    for layer in (layers.GroupNormSiLU, layers.GEGLU):
        assert "__init__" not in vars(layer)
