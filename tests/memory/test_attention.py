"""Attention whose scores are larger than fp16 can hold, as those of Stable Diffusion 2.1 (``upcast_attention``)."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from lowmem_db import models
from lowmem_db.memory import attention
from tests.tiny_models import tiny_unet

HEAD_DIM, LARGE = 8, 600.0
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


def upcast_attention(dtype: torch.dtype, device: str) -> Attention:
    """Return an attention that picks the token itself, by scores of 127279."""
    layer = Attention(HEAD_DIM, heads=1, dim_head=HEAD_DIM, upcast_attention=True, bias=False)
    for linear, factor in ((layer.to_q, LARGE), (layer.to_k, LARGE), (layer.to_v, 1.0), (layer.to_out[0], 1.0)):
        nn.init.eye_(linear.weight)
        linear.weight.data *= factor
    nn.init.zeros_(layer.to_out[0].bias)
    return layer.to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True])
def test_scores_above_the_largest_fp16_are_no_overflow(device: str, autocast: bool) -> None:
    layer = upcast_attention(torch.float32 if autocast else torch.float16, device)
    assert layer.upcast_attention
    attention.apply(tiny_unet(), "sdpa", torch.device(device))
    tokens = torch.eye(HEAD_DIM, device=device)[None]
    with torch.no_grad(), torch.autocast(device, torch.float16) if autocast else nullcontext():
        found: Tensor = layer(tokens if autocast else tokens.half())
        scores = (layer.to_q(tokens.to(found.dtype)) @ layer.to_k(tokens.to(found.dtype)).mT) * HEAD_DIM**-0.5
    assert torch.isinf(scores).any(), "the scores fit fp16, so nothing is shown"
    assert found.dtype == torch.float16
    assert torch.equal(found.float(), tokens)


@pytest.mark.parametrize(("name", "upcasts"), [("sd21", True), ("sd21_base", False)])
def test_configuration_reaches_every_attention_of_the_unet(name: str, upcasts: bool) -> None:
    config = json.loads((Path(models.__file__).parent / "configs" / name / "unet" / "config.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    assert len(layers) == 32
    assert {bool(layer.upcast_attention) for layer in layers} == {upcasts}
