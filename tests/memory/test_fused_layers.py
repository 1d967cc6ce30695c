import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem_db.config.loading import load_config
from lowmem_db.config.strategy import resolve
from lowmem_db.memory import checkpointing, fused_layers
from lowmem_db.models.families.unet_blocks import find_blocks
from lowmem_db.optimizers.build import build_optimizer
from lowmem_db.optimizers.weights import apply as split_weights
from tests.config.test_rules import NEEDED

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


@pytest.mark.long
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
    with pytest.raises(ValueError, match="already fused"):
        fused_layers.apply(unet)


def test_a_block_with_scale_and_shift_is_left_alone(unet):
    blocks = [module for module in unet.modules() if type(module).__name__ == "ResnetBlock2D"]
    for block in blocks:
        block.time_embedding_norm = "scale_shift"
    fused_layers.apply(unet)
    assert all("forward" not in block.norm1.__dict__ for block in blocks)


@pytest.mark.parametrize("placement", ["layers", "segments", "nested"])
@pytest.mark.parametrize("fused_first", [True, False])
def test_recomputing_gives_the_same_bits(unet, placement, fused_first):
    expected = copy.deepcopy(unet)
    fused_layers.apply(expected)
    expected = loss_and_gradients(expected)
    techniques = [lambda: fused_layers.apply(unet), lambda: checkpointing.apply(find_blocks({"unet": unet}), placement)]
    for technique in techniques if fused_first else techniques[::-1]:
        technique()
    got = loss_and_gradients(unet)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_is_undone_before_or_after_checkpointing(unet):
    expected = loss_and_gradients(unet)
    for order in (1, -1):
        undo = [fused_layers.apply(unet), checkpointing.apply(find_blocks({"unet": unet}), "segments")]
        for each in undo[::order]:
            each()
        got = loss_and_gradients(unet)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def in_backward(unet):
    """An optimizer that steps 24-bit weights in the backward pass."""
    fields = {"optimizer.name": "adamw8bit", "memory.weights": "bf16_extra_bits", "memory.optimizer_in_backward": True}
    config = load_config(None, list((NEEDED | fields).items()))
    extra_bits = split_weights({"unet": unet}, "bf16_extra_bits")
    optimizer = build_optimizer(resolve(config), {"unet": unet}, torch.device("cpu"))
    for name, bits in optimizer.extra_bits().items():
        bits.copy_(extra_bits[name])
    optimizer.set_learning_rates({"unet": 1e-3})
    return optimizer


@pytest.mark.parametrize("placement", ["none", "segments", "nested"])
def test_24_bit_weights_step_in_the_backward_pass(placement):
    """The weights are other ones when a later layer is recomputed; each layer must see its own of the forward pass."""
    results = []
    for where in ("none", placement):
        unet = build_unet()
        names = list(unet.state_dict())
        optimizer = in_backward(unet)
        fused_layers.apply(unet)
        checkpointing.apply(find_blocks({"unet": unet}), where)
        losses = []
        for step in range(4):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(unet, step)
            optimizer.backward(loss)
            optimizer.step()
            losses.append(loss.detach())
        assert list(unet.state_dict()) == names
        results.append([*losses, *unet.state_dict().values(), *optimizer.extra_bits().values()])
    assert all(torch.equal(got, expected) for got, expected in zip(*results, strict=True))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_it_is_as_good_as_unfused(unet, weights):
    exact = loss_and_gradients(copy.deepcopy(unet).to(weights).double())
    unet.to(weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = loss_and_gradients(unet)
        fused_layers.apply(unet)
        fused = loss_and_gradients(unet)
    assert error(fused, exact) <= 1.5 * error(eager, exact)


class Operators(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_a_trace_on_meta_sees_the_operators_of_a_real_step(unet):
    seen = {}
    for device in ("cpu", "meta"):
        model = copy.deepcopy(unet).to(device)
        fused_layers.apply(model)
        latents, timesteps, text, _ = (tensor.to(device) for tensor in batch())
        with Operators() as operators:
            model(latents, timesteps, text).sample.sum().backward()
        seen[device] = [name for name in operators.names if name.startswith("lowmem_db_kernels::")]
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    assert seen["cpu"] == seen["meta"]
    assert {name.removeprefix("lowmem_db_kernels::") for name in seen["meta"]} == {
        f"{name}{way}" for name in ("group_norm_silu", "geglu") for way in ("", "_backward")
    }


def test_operators_and_the_way_around_them_give_the_same_bits(unet):
    fused_layers.apply(unet)
    plain = loss_and_gradients(unet)
    with Operators():
        watched = loss_and_gradients(unet)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
