"""Models and training steps for tests of what saves memory."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import lowmem_db.models
from tests.tiny_models import NUM_TOKENS, tiny_if_unet, tiny_text_encoder, tiny_unet

DEMO_BASE = Path(lowmem_db.models.__file__).parent / "demo" / "base"


def sdxl_like_unet(**changes: object) -> UNet2DConditionModel:
    """Transformers of two blocks, linear projections, and text and time ids added to the time embedding."""
    config = {
        "sample_size": 16,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 16 + 6 * 4,
    }
    return UNet2DConditionModel(**(config | changes))


def demo_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(DEMO_BASE / "unet")


UNETS: Mapping[str, Callable[[], UNet2DConditionModel]] = {
    "tiny": tiny_unet,
    "sdxl_like": sdxl_like_unet,
    "demo": demo_unet,
    "deepfloyd_if": lambda: tiny_if_unet(width=32),
}


def build(name: str) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    modules = {"unet": UNETS[name](), "text_encoder": tiny_text_encoder()}
    return {component: module.train().requires_grad_(True) for component, module in modules.items()}


def clones(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {component: copy.deepcopy(module) for component, module in modules.items()}


def loss_of(modules: Mapping[str, nn.Module], step: int = 0, size: tuple[int, int] = (16, 16)) -> Tensor:
    """Return the loss on random latents, which need no gradient, with text that the text encoder encodes."""
    unet, text_encoder = modules["unet"], modules["text_encoder"]
    generator = torch.Generator().manual_seed(step)
    device = next(unet.parameters()).device

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    latents = draw(2, unet.config["in_channels"], *size)
    input_ids = torch.randint(0, 512, (2, NUM_TOKENS), generator=generator).to(device)
    text = text_encoder(input_ids).last_hidden_state
    width = unet.config["encoder_hid_dim"] or unet.config["cross_attention_dim"]
    text = text.repeat(1, 1, width // text.shape[-1])
    added = None
    if unet.config["addition_embed_type"] == "text_time":
        added = {"text_embeds": text.mean(dim=1), "time_ids": draw(2, 6)}
    timesteps = torch.tensor([10, 900], device=device)
    return unet(latents, timesteps, text, added_cond_kwargs=added).sample.float().square().mean()


def loss_and_gradients(modules: Mapping[str, nn.Module], step: int = 0, **options) -> dict[str, Tensor]:
    loss = loss_of(modules, step, **options)
    loss.backward()
    values = {"loss": loss.detach()}
    for component, module in modules.items():
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                values[f"{component}.{name}"], parameter.grad = parameter.grad, None
    return values


def step_in_backward(modules: Mapping[str, nn.Module]) -> None:
    """Let each parameter step as soon as its gradient is there, and let the gradient go."""

    def step(parameter: Tensor) -> None:
        assert parameter.grad is not None
        with torch.no_grad():
            parameter.sub_(0.01 * parameter.grad.sign())
        parameter.grad = None

    for module in modules.values():
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(step)


def assert_same_bits(values: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(values[name], value), name
