import copy

import pytest
import torch

from lowmem_db.memory import fused_layers

diffusers = pytest.importorskip("diffusers")


def build_unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )


@pytest.fixture
def unet():
    return build_unet()


def batch(dtype=torch.float32, step=0):
    generator = torch.Generator().manual_seed(step)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    return draw(2, 4, 8, 8), torch.tensor([10, 700]), draw(2, 5, 16), draw(2, 4, 8, 8)


def loss_of(unet, step=0):
    dtype = next(unet.parameters()).dtype
    latents, timesteps, text, target = batch(dtype, step)
    return (unet(latents, timesteps, text).sample - target).square().mean()


def loss_and_gradients(unet):
    loss = loss_of(unet)
    gradients = torch.autograd.grad(loss, list(unet.parameters()))
    names = [name for name, _ in unet.named_parameters()]
    return {"loss": loss.detach()} | dict(zip(names, gradients, strict=True))


def error(values, exact):
    """Relative distance of all values together: a gradient that is 0 but for rounding says nothing on its own."""
    distance = sum(float((values[name].double() - exact[name]).square().sum()) for name in exact)
    return (distance / sum(float(exact[name].square().sum()) for name in exact)) ** 0.5


def train(unet, steps=30):
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        loss = loss_of(unet, step)
        losses.append(loss.detach().double())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.stack(losses)


def test_loss_and_gradients_are_as_good_as_unfused(unet):
    exact = loss_and_gradients(copy.deepcopy(unet).double())
    eager = loss_and_gradients(unet)
    fused_layers.apply(unet)
    fused = loss_and_gradients(unet)
    assert error(fused, exact) <= 1.5 * error(eager, exact)
    for name, gradient in fused.items():
        torch.testing.assert_close(
            gradient, eager[name], rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_30_training_steps_are_as_good_as_unfused(unet):
    exact, eager, fused = copy.deepcopy(unet).double(), copy.deepcopy(unet), unet
    fused_layers.apply(fused)
    losses = [train(model) for model in (exact, eager, fused)]
    distance = [(loss - losses[0]).square().mean().sqrt() for loss in losses[1:]]
    assert distance[1] <= 1.5 * distance[0]
    assert losses[2][-1] < losses[2][0]


def test_every_layer_that_can_be_fused_is(unet, monkeypatch):
    calls = {"norm": 0, "geglu": 0}

    def count(name, function):
        def counted(*args):
            calls[name] += 1
            return function(*args)

        return counted

    monkeypatch.setattr(fused_layers, "group_norm_silu", count("norm", fused_layers.group_norm_silu))
    monkeypatch.setattr(fused_layers, "geglu", count("geglu", fused_layers.geglu))
    fused_layers.apply(unet)
    loss_of(unet)
    blocks = sum(type(module).__name__ == "ResnetBlock2D" for module in unet.modules())
    layers = sum(type(module).__name__ == "GEGLU" for module in unet.modules())
    assert calls == {"norm": 2 * blocks + 1, "geglu": layers}
    assert min(blocks, layers) > 0


def test_state_dict_is_unchanged(unet):
    keys = list(unet.state_dict())
    fused_layers.apply(unet)
    assert list(unet.state_dict()) == keys


def test_undo_leaves_the_model_as_it_was(unet):
    before = [(name, module, dict(module.__dict__)) for name, module in unet.named_modules()]
    expected = loss_of(unet)
    fused_layers.apply(unet)()
    after = [(name, module, dict(module.__dict__)) for name, module in unet.named_modules()]
    assert [(name, module) for name, module, _ in after] == [(name, module) for name, module, _ in before]
    assert all("forward" not in attributes for _, _, attributes in after)
    assert torch.equal(loss_of(unet), expected)


def test_less_is_saved_for_backward(unet):
    def saved_bytes():
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: storages.update({tensor.untyped_storage().data_ptr(): tensor.untyped_storage()}) or tensor,
            lambda tensor: tensor,
        ):
            loss = loss_of(unet)
        total = sum(storage.nbytes() for storage in storages.values())
        del loss
        return total

    unfused = saved_bytes()
    fused_layers.apply(unet)
    assert saved_bytes() < 0.9 * unfused


def test_twice_is_refused(unet):
    fused_layers.apply(unet)
    with pytest.raises(ValueError, match="fused already"):
        fused_layers.apply(unet)


def test_a_block_with_scale_and_shift_is_left_alone(unet):
    blocks = [module for module in unet.modules() if type(module).__name__ == "ResnetBlock2D"]
    for block in blocks:
        block.time_embedding_norm = "scale_shift"
    fused_layers.apply(unet)
    assert all("forward" not in block.norm1.__dict__ for block in blocks)
