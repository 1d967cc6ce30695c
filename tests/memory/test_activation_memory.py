"""Activations that each placement keeps, and the peak of a step, from traces on the meta device.

Weights are not counted, nor are gradients of weights once they are complete: as where each parameter steps in backward.
"""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import UNet2DConditionModel

import lowmem_db.models
from lowmem_db.memory import checkpointing
from lowmem_db.models.families.unet_blocks import find_blocks
from tests.memory.device_trace import traced
from tests.memory.models import sdxl_like_unet

MIB = 2**20
SD15 = Path(lowmem_db.models.__file__).parent / "configs" / "sd15" / "unet"
pytestmark = pytest.mark.long
ROWS = [
    ("none", False),
    ("layers", False),
    ("layers", True),
    ("segments", False),
    ("segments", True),
    ("nested", False),
    ("nested", True),
]


class Bytes(NamedTuple):
    kept: float  # after the forward pass, in MiB
    peak: float
    host: float
    left: float  # after the backward pass


def trace(unet: UNet2DConditionModel, placement: str, *, offload: bool) -> Bytes:
    """Trace one step on two samples in the type of the UNet."""
    size, text_dim, dtype = unet.config["sample_size"], unet.config["cross_attention_dim"], unet.dtype
    with torch.device("meta"):
        latents = torch.empty(2, 4, size, size, dtype=dtype)
        text = torch.empty(2, 77, text_dim, dtype=dtype, requires_grad=True)
        timesteps = torch.empty(2, dtype=torch.long)
        added = None
        if unet.config["addition_embed_type"] == "text_time":
            pooled_dim = (
                unet.config["projection_class_embeddings_input_dim"] - 6 * unet.config["addition_time_embed_dim"]
            )
            added = {"text_embeds": torch.empty(2, pooled_dim, dtype=dtype), "time_ids": torch.empty(2, 6, dtype=dtype)}
    undo = checkpointing.apply(find_blocks({"unet": unet}), placement, offload=offload)
    with traced(unet, latents, text, timesteps) as trace:
        loss = unet(latents, timesteps, text, added_cond_kwargs=added).sample.float().square().mean()
        kept = trace.live
        loss.backward()
        text.grad = None
    undo()
    return Bytes(kept / MIB, trace.peak / MIB, trace.host_bytes / MIB, trace.live / MIB)


def table(unet: UNet2DConditionModel, rows: list[tuple[str, bool]]) -> dict[tuple[str, bool], Bytes]:
    return {(placement, offload): trace(unet, placement, offload=offload) for placement, offload in rows}


def on_meta(config: dict[str, object]) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config).to(torch.bfloat16)


@pytest.fixture(scope="module")
def sd15() -> dict[tuple[str, bool], Bytes]:
    return table(on_meta(UNet2DConditionModel.load_config(SD15)), ROWS)


@pytest.mark.parametrize(
    ("placement", "offload", "kept", "peak"),
    [
        ("none", False, 1786.6, 1816.4),
        ("layers", False, 293.3, 459.0),
        ("layers", True, 191.4, 357.2),
        ("segments", False, 123.6, 304.3),
        ("segments", True, 28.6, 229.6),
        ("nested", False, 123.6, 273.6),
        ("nested", True, 28.6, 198.9),
    ],
)
def test_figures_of_sd15(
    sd15: dict[tuple[str, bool], Bytes], placement: str, offload: bool, kept: float, peak: float
) -> None:
    """512 pixels, 2 samples, bf16. The peak is that of the feed-forward layer of a transformer of 64x64 tokens.

    With offload, what is kept is mostly the input and the output of the UNet's last norm, which is outside all
    segments, and two tensors that had not yet left.
    """
    traced = sd15[placement, offload]
    assert traced.kept == pytest.approx(kept, abs=1)
    assert traced.peak == pytest.approx(peak, abs=1)


def test_nothing_outlives_a_step(sd15: dict[tuple[str, bool], Bytes]) -> None:
    assert {row: traced.left for row, traced in sd15.items() if traced.left > 0.01} == {}


def test_host_memory_of_sd15(sd15: dict[tuple[str, bool], Bytes]) -> None:
    """Two chunks of 64 MiB hold it; none is allocated without offload."""
    assert {row: traced.host for row, traced in sd15.items()} == {row: 128 if row[1] else 0 for row in ROWS}


def test_order_where_transformers_have_many_blocks() -> None:
    with torch.device("meta"):
        unet = sdxl_like_unet(
            block_out_channels=(32, 64, 128),
            sample_size=64,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 4),
        )
    figures = table(unet, [row for row in ROWS if not row[1]])
    none, layers, segments, nested = (figures[placement, False] for placement in checkpointing.PLACEMENTS)
    assert none.peak > 3 * layers.peak
    assert layers.peak > 1.2 * segments.peak
    assert segments.peak > 1.1 * nested.peak
    assert layers.kept > 1.5 * segments.kept
    assert segments.kept > 1.2 * nested.kept


@pytest.mark.parametrize("block", ["down_blocks.0", "mid_block", "up_blocks.3"])
def test_a_placement_of_one_block_saves_in_proportion(sd15: dict[tuple[str, bool], Bytes], block: str) -> None:
    """The planner may spend what it has on blocks that need not be recomputed."""
    unet = on_meta(UNet2DConditionModel.load_config(SD15))
    names = list(find_blocks({"unet": unet}))
    one = trace(unet, dict.fromkeys([f"unet.{block}"], "segments"), offload=False)
    others = trace(unet, {name: "segments" for name in names if name != f"unet.{block}"}, offload=False)
    none, every = sd15["none", False], sd15["segments", False]
    assert every.kept < others.kept < none.kept
    assert none.kept - one.kept == pytest.approx(others.kept - every.kept, abs=6)  # a boundary between blocks


def test_figures_of_sdxl() -> None:
    """1024 pixels, 2 samples, bf16."""
    config = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "norm_num_groups": 32,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    with torch.device("meta"):
        unet = sdxl_like_unet(**config).to(torch.bfloat16)
    peaks = {row: round(traced.peak) for row, traced in table(unet, ROWS).items()}
    assert peaks == {
        ("none", False): 13199,
        ("layers", False): 1356,
        ("layers", True): 817,
        ("segments", False): 1004,
        ("segments", True): 507,
        ("nested", False): 704,
        ("nested", True): 517,
    }
