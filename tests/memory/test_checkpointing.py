"""Recomputing changes no bit of losses and gradients, at any placement, and can be undone."""

from functools import cache

import pytest
import torch
from torch import nn

from lowmem_db.memory import boundary_offload, checkpointing, fused_layers
from lowmem_db.memory.segments import Segment
from lowmem_db.models.families.unet_blocks import Concatenation, find_blocks
from tests.memory.models import (
    UNETS,
    assert_same_bits,
    build,
    clones,
    loss_and_gradients,
    loss_of,
    sdxl_like_unet,
    step_in_backward,
)
from tests.tiny_models import tiny_unet

BLOCKS = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
RECOMPUTING = ("layers", "segments", "nested")


def layers_of(text_encoder):
    """Return CLIP's layers; transformers 4 has them one level deeper."""
    return getattr(text_encoder, "text_model", text_encoder).encoder.layers


@pytest.fixture(autouse=True)
def _tiny_tensors_go_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundary_offload, "MIN_BYTES", 4096)


@cache
def expected(name: str) -> dict[str, torch.Tensor]:
    return loss_and_gradients(build(name))


@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
@pytest.mark.parametrize("placement", RECOMPUTING)
@pytest.mark.parametrize("name", UNETS)
def test_the_same_bits(name: str, placement: str, offload: bool) -> None:
    modules = build(name)
    checkpointing.apply(find_blocks(modules), placement, offload=offload)
    assert_same_bits(loss_and_gradients(modules), expected(name))
    assert_same_bits(loss_and_gradients(modules), expected(name))


@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
@pytest.mark.parametrize("placement", RECOMPUTING)
@pytest.mark.parametrize("name", UNETS)
def test_the_same_weights_where_parameters_step_in_backward(name: str, placement: str, offload: bool) -> None:
    modules = build(name)
    plain = clones(modules)
    checkpointing.apply(find_blocks(modules), placement, offload=offload)
    for either in (modules, plain):
        step_in_backward(either)
    for step in range(3):
        losses = [loss_of(either, step) for either in (modules, plain)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
    before = build(name)
    for component, module in modules.items():
        assert_same_bits(module.state_dict(), plain[component].state_dict())
        changed = [
            not torch.equal(new, old)
            for new, old in zip(module.parameters(), before[component].parameters(), strict=True)
        ]
        assert sum(changed) > 0.9 * len(changed)


@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
@pytest.mark.parametrize("cache_enabled", [False, True], ids=["no_cache", "cache"])
@pytest.mark.parametrize("placement", RECOMPUTING)
def test_the_same_bits_under_autocast(placement: str, cache_enabled: bool, offload: bool) -> None:
    modules = build("sdxl_like")

    def values() -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache_enabled):
            loss = loss_of(modules)
        loss.backward()
        return {"loss": loss.detach()} | {
            name: parameter.grad.clone() for name, parameter in modules["unet"].named_parameters()
        }

    plain = values()
    for module in modules.values():
        module.zero_grad()
    checkpointing.apply(find_blocks(modules), placement, offload=offload)
    assert_same_bits(values(), plain)


@pytest.mark.parametrize("placement", RECOMPUTING)
def test_odd_sizes(placement: str) -> None:
    """Sizes that are no multiple of what the UNet halves: upsamplers get the size of the skip connections."""
    modules = build("tiny")
    plain = loss_and_gradients(modules, size=(15, 11))
    checkpointing.apply(find_blocks(modules), placement, offload=True)
    assert_same_bits(loss_and_gradients(modules, size=(15, 11)), plain)


@pytest.mark.parametrize("placement", RECOMPUTING)
def test_a_text_encoder_that_does_not_train(placement: str) -> None:
    modules = build("tiny")
    modules["text_encoder"].requires_grad_(False)
    plain = loss_and_gradients(modules)
    checkpointing.apply(find_blocks(modules), placement)
    assert_same_bits(loss_and_gradients(modules), plain)


@pytest.mark.parametrize("placement", RECOMPUTING)
def test_dropout_draws_the_same_numbers_again(placement: str) -> None:
    modules = build("tiny") | {"unet": tiny_unet().train()}
    for module in modules["unet"].modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    for layer in layers_of(modules["text_encoder"]):
        layer.self_attn.dropout = 0.3
    torch.manual_seed(1)
    plain = loss_and_gradients(modules)
    checkpointing.apply(find_blocks(modules), placement)
    torch.manual_seed(1)
    assert_same_bits(loss_and_gradients(modules), plain)
    torch.manual_seed(2)
    assert not torch.equal(loss_and_gradients(modules)["loss"], plain["loss"])


@pytest.mark.parametrize("placement", RECOMPUTING)
def test_hidden_states_of_a_text_encoder(placement: str) -> None:
    """SDXL takes the last hidden state but one, which transformers collects with hooks."""
    modules = build("tiny")
    encode = lambda: modules["text_encoder"](torch.arange(16)[None], output_hidden_states=True).hidden_states  # noqa: E731
    plain = encode()
    undo = checkpointing.apply(find_blocks(modules), placement)
    for state, expected_state in zip(encode(), plain, strict=True):
        assert torch.equal(state, expected_state)
    undo()
    for state, expected_state in zip(encode(), plain, strict=True):
        assert torch.equal(state, expected_state)


def calls_per_step(modules: dict[str, nn.Module], part: nn.Module) -> int:
    """Count how often a part of a model begins to compute in one step."""
    calls = []
    hook = part.register_forward_pre_hook(lambda *_: calls.append(1))
    loss_of(modules).backward()
    hook.remove()
    return len(calls)


def test_what_each_placement_recomputes() -> None:
    modules = build("sdxl_like")
    block = modules["unet"].down_blocks[1]
    transformer = block.attentions[0]
    parts = {
        "resnet": block.resnets[0].norm1,
        "norm": transformer.norm,
        "transformer block": transformer.transformer_blocks[0].norm1,
        "attention": transformer.transformer_blocks[0].attn1.to_q,
        "projection": transformer.proj_out,
        "upsampler": modules["unet"].up_blocks[0].upsamplers[0].conv,
        "text": layers_of(modules["text_encoder"])[0].mlp,
        "output": modules["unet"].conv_out,
    }
    counts = {}
    for placement in checkpointing.PLACEMENTS:
        undo = checkpointing.apply(find_blocks(modules), placement)
        counts[placement] = {name: calls_per_step(modules, part) for name, part in parts.items()}
        undo()
    once = dict.fromkeys(parts, 1)
    layers = once | {"resnet": 2, "transformer block": 2, "attention": 2, "text": 2}
    segments = layers | {"norm": 2, "projection": 2, "upsampler": 2}
    assert counts == {
        "none": once,
        "layers": layers,
        "segments": segments,
        "nested": segments | {"transformer block": 3, "attention": 3},
    }


def test_attentions_are_nested_where_a_transformer_has_one_block() -> None:
    modules = build("tiny")
    block = modules["unet"].mid_block.attentions[0].transformer_blocks[0]
    checkpointing.apply(find_blocks(modules), "nested")
    assert calls_per_step(modules, block.norm1) == 2
    assert calls_per_step(modules, block.attn1.to_q) == 3
    assert calls_per_step(modules, block.ff) == 2


def test_a_placement_per_block() -> None:
    modules = build("tiny")
    unet = modules["unet"]
    chosen = {"unet.down_blocks.1": "layers", "unet.up_blocks.0": "segments", "unet.mid_block": "nested"}
    checkpointing.apply(find_blocks(modules), chosen | {"text_encoder": "none"}, offload=True)
    recomputed = {name: calls_per_step(modules, unet.get_submodule(name).resnets[0].norm1) == 2 for name in BLOCKS}
    assert recomputed == {name: f"unet.{name}" in chosen for name in BLOCKS}
    assert calls_per_step(modules, layers_of(modules["text_encoder"])[0].mlp) == 1
    for module in modules.values():
        module.zero_grad()
    assert_same_bits(loss_and_gradients(modules), expected("tiny"))


def test_names_of_blocks() -> None:
    modules = build("tiny")
    assert list(find_blocks(modules)) == [*(f"unet.{name}" for name in BLOCKS), "text_encoder"]


@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
@pytest.mark.parametrize("placement", checkpointing.PLACEMENTS)
def test_undo_restores_the_modules(placement: str, offload: bool) -> None:
    modules = build("sdxl_like")
    before = {name: set(part.__dict__) for module in modules.values() for name, part in module.named_modules()}
    states = {component: list(module.state_dict()) for component, module in modules.items()}
    undo = checkpointing.apply(find_blocks(modules), placement, offload=offload)
    assert {component: list(module.state_dict()) for component, module in modules.items()} == states
    undo()
    assert {name: set(part.__dict__) for module in modules.values() for name, part in module.named_modules()} == before
    assert_same_bits(loss_and_gradients(modules), expected("sdxl_like"))
    checkpointing.apply(find_blocks(modules), "layers")


@pytest.mark.parametrize("second", RECOMPUTING)
@pytest.mark.parametrize("first", RECOMPUTING)
def test_applying_twice_is_refused(first: str, second: str) -> None:
    modules = build("sdxl_like")
    checkpointing.apply(find_blocks(modules), first)
    with pytest.raises(ValueError, match="checkpointing has already been applied to unet, text_encoder; undo it first"):
        checkpointing.apply(find_blocks(modules), second)


def test_applying_to_another_block_later_is_refused() -> None:
    modules = build("tiny")
    undo = checkpointing.apply(find_blocks(modules), {"unet.up_blocks.1": "segments"})
    with pytest.raises(ValueError, match="has already been applied"):
        checkpointing.apply(find_blocks(modules), {"unet.mid_block": "layers"})
    undo()
    checkpointing.apply(find_blocks(modules), {"unet.mid_block": "layers"})


def test_a_forward_that_somebody_else_replaced_is_used_and_restored() -> None:
    modules = build("tiny")
    resnet = modules["unet"].mid_block.resnets[0]
    calls, original = [], resnet.forward
    replaced = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]  # noqa: E731
    resnet.forward = replaced
    undo = checkpointing.apply(find_blocks(modules), "segments")
    assert_same_bits(loss_and_gradients(modules), expected("tiny"))
    assert len(calls) == 2
    undo()
    assert resnet.forward is replaced


def test_fused_layers_go_with_it() -> None:
    modules = build("tiny")
    fused_layers.apply(modules["unet"])
    plain = loss_and_gradients(modules)
    undo = checkpointing.apply(find_blocks(modules), "nested", offload=True)
    assert_same_bits(loss_and_gradients(modules), plain)
    undo()
    assert_same_bits(loss_and_gradients(modules), plain)


def test_an_unknown_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'unet.middle' is not a block; allowed: unet.down_blocks.0, .*encoder"):
        checkpointing.apply(find_blocks(build("tiny")), {"unet.middle": "layers"})


@pytest.mark.parametrize("placement", ["all", {"unet.mid_block": "all"}], ids=["one", "per block"])
def test_an_unknown_placement_is_refused(placement: str | dict[str, str]) -> None:
    with pytest.raises(ValueError, match="'all' is not a placement; allowed: none, layers, segments, nested"):
        checkpointing.apply(find_blocks(build("tiny")), placement)


@pytest.mark.parametrize("placement", ["segments", "nested"])
def test_a_block_of_another_kind_is_refused_and_nothing_is_changed(placement: str) -> None:
    unet = sdxl_like_unet(down_block_types=("DownBlock2D", "AttnDownBlock2D"))
    refusal = f"unet.down_blocks.1: '{placement}' does not support AttnDownBlock2D; choose another placement"
    with pytest.raises(ValueError, match=refusal):
        checkpointing.apply(find_blocks({"unet": unet}), placement)
    assert not any("forward" in part.__dict__ for part in unet.modules())
    checkpointing.apply(find_blocks({"unet": unet}), {"unet.down_blocks.0": placement, "unet.down_blocks.1": "layers"})


@pytest.mark.parametrize("placement", RECOMPUTING)
def test_a_model_of_another_kind_is_refused(placement: str) -> None:
    with pytest.raises(ValueError, match=f"of vae: '{placement}' does not support Linear"):
        checkpointing.apply(find_blocks({"vae": nn.Linear(1, 1)}), placement)


@pytest.mark.parametrize("placement", RECOMPUTING)
def test_images_are_drawn_as_before(placement: str) -> None:
    modules = build("sdxl_like")
    checkpointing.apply(find_blocks(modules), placement, offload=True)
    with torch.no_grad():
        assert torch.equal(loss_of(modules), expected("sdxl_like")["loss"])


def test_weights_that_autocast_converts_die_with_their_segment() -> None:
    layer = nn.Linear(4, 4, bias=False)
    segment = Segment(layer.forward, layer)
    x = torch.ones(1, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=True):
        assert segment(x).any()
        layer.weight.data.zero_()
        assert not segment(x).any()
        assert torch.is_autocast_cache_enabled()


def test_a_skip_connections_gradient_does_not_keep_the_other_alive() -> None:
    hidden_states = torch.randn(2, 3, 4, 4, requires_grad=True)
    skip = torch.randn(2, 5, 4, 4, requires_grad=True)
    gradients = torch.autograd.grad(Concatenation.apply(hidden_states, skip).square().sum(), (hidden_states, skip))
    for gradient, source in zip(gradients, (hidden_states, skip), strict=True):
        assert torch.equal(gradient, 2 * source)
        assert gradient.untyped_storage().nbytes() == source.nbytes
