"""Full-size models of the published configurations, without weights: the layout of their single files.

The layout is not compared with itself: diffusers' own converters read it, and have to find every tensor of the model.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils
from torch import Tensor

from lowmem_db.models.families.original_layout import SD1, SDXL, Entry
from lowmem_db.models.stored_weights import expected_shapes
from tests.original_models import LAYOUTS, entries_and_shapes, published, shapes_in_file

PROJECTION = "text_projection.weight"
COMPONENTS = [(name, component) for name, layout in LAYOUTS.items() for component in layout.prefixes]
NUM_PARAMETERS = {
    ("sd15", "unet"): 859520964,
    ("sd15", "text_encoder"): 123060480,
    ("sd21", "unet"): 865910724,
    ("sd21", "text_encoder"): 340387840,
    ("sd21_base", "unet"): 865910724,
    ("sd21_base", "text_encoder"): 340387840,
    ("sdxl_base", "unet"): 2567463684,
    ("sdxl_base", "text_encoder"): 123060480,
    ("sdxl_base", "text_encoder_2"): 694659840,
    **{(name, "vae"): 83653863 for name in LAYOUTS},
}
NUM_KEYS = {
    ("sd15", "unet"): 686,
    ("sd15", "text_encoder"): 197,  # 12 blocks of 16, 4 beside them, position_ids
    ("sd21", "unet"): 686,
    ("sd21", "text_encoder"): 294,  # 24 blocks of 12, 6 beside them, of which text_projection and logit_scale are spare
    ("sd21_base", "unet"): 686,
    ("sd21_base", "text_encoder"): 294,
    ("sdxl_base", "unet"): 1680,
    ("sdxl_base", "text_encoder"): 197,
    ("sdxl_base", "text_encoder_2"): 390,  # 32 blocks of 12, 6 beside them
    **{(name, "vae"): 248 for name in LAYOUTS},
}


def exported(name: str, component: str) -> dict[str, Tensor]:
    """Return the tensors of a component in the single file, on the meta device."""
    return {key: torch.empty(shape, device="meta") for key, shape in shapes_in_file(name, component).items()}


def read_by_diffusers(name: str, component: str, checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what diffusers' single-file loading makes of a component."""
    config = published(name).config_of(component)
    checkpoint = dict(checkpoint)
    if component == "unet":
        return single_file_utils.convert_ldm_unet_checkpoint(checkpoint, config)
    if component == "vae":
        return single_file_utils.convert_ldm_vae_checkpoint(checkpoint, config)
    if component in LAYOUTS[name].open_clip:
        text_model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
        prefix = LAYOUTS[name].prefixes[component]
        return single_file_utils.convert_open_clip_checkpoint(text_model, checkpoint, prefix=prefix)
    return single_file_utils.convert_ldm_clip_checkpoint(checkpoint)


@pytest.mark.parametrize(("name", "component"), COMPONENTS)
def test_diffusers_finds_every_tensor_of_the_model_and_no_other(name: str, component: str) -> None:
    shapes = expected_shapes(published(name), component)
    found = read_by_diffusers(name, component, exported(name, component))
    unread = {"text_model.embeddings.position_ids"} | (set() if "text_projection.weight" in shapes else {PROJECTION})
    assert {key: tuple(tensor.shape) for key, tensor in found.items() if key not in unread} == shapes


@pytest.mark.parametrize(("name", "component"), COMPONENTS)
def test_number_of_keys_is_that_of_the_published_file(name: str, component: str) -> None:
    entries, _ = entries_and_shapes(name, component)
    assert len({entry.name for entry in entries}) == len(entries) == NUM_KEYS[name, component]


def test_sdxl_base_has_as_many_keys_as_the_published_file() -> None:
    assert sum(len(exported("sdxl_base", component)) for component in SDXL.prefixes) == 2515


@pytest.mark.parametrize(("name", "kind"), [("sd15", "v1"), ("sd21", "v2"), ("sdxl_base", "xl_base")])
def test_diffusers_infers_the_family(name: str, kind: str) -> None:
    checkpoint = {key: tensor for part in LAYOUTS[name].prefixes for key, tensor in exported(name, part).items()}
    assert single_file_utils.infer_diffusers_model_type(checkpoint) == kind


@pytest.mark.parametrize(("name", "component"), COMPONENTS)
def test_number_of_parameters_is_the_published_one(name: str, component: str) -> None:
    entries, shapes = entries_and_shapes(name, component)
    tensors = exported(name, component)
    read = sum(tensors[entry.name].numel() for entry in entries if not entry.spare)
    assert read == sum(torch.Size(shape).numel() for shape in shapes.values()) == NUM_PARAMETERS[name, component]


@pytest.mark.parametrize(
    ("name", "key", "shape"),
    [
        ("sd15", "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", (320, 768)),
        ("sd15", "model.diffusion_model.input_blocks.1.1.proj_in.weight", (320, 320, 1, 1)),
        ("sd15", "model.diffusion_model.output_blocks.2.1.conv.weight", (1280, 1280, 3, 3)),
        ("sd15", "model.diffusion_model.output_blocks.5.2.conv.weight", (1280, 1280, 3, 3)),
        ("sd15", "first_stage_model.encoder.mid.attn_1.q.weight", (512, 512, 1, 1)),
        ("sd15", "first_stage_model.decoder.up.3.upsample.conv.weight", (512, 512, 3, 3)),
        ("sd15", "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight", (128, 256, 1, 1)),
        ("sd15", "cond_stage_model.transformer.text_model.embeddings.position_ids", (1, 77)),
        ("sd21", "model.diffusion_model.input_blocks.1.1.proj_in.weight", (320, 320)),
        ("sd21", "cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight", (3072, 1024)),
        ("sd21", "cond_stage_model.model.positional_embedding", (77, 1024)),
        ("sd21", "cond_stage_model.model.text_projection", (1024, 1024)),
        ("sdxl_base", "model.diffusion_model.label_emb.0.0.weight", (1280, 2816)),
        ("sdxl_base", "model.diffusion_model.middle_block.1.transformer_blocks.9.attn2.to_k.weight", (1280, 2048)),
        ("sdxl_base", "conditioner.embedders.1.model.text_projection", (1280, 1280)),
        ("sdxl_base", "conditioner.embedders.1.model.transformer.resblocks.31.mlp.c_fc.weight", (5120, 1280)),
        ("sdxl_base", "conditioner.embedders.1.model.logit_scale", ()),
    ],
)
def test_tensors_of_published_files_are_where_they_are_known_to_be(name: str, key: str, shape: tuple[int, ...]) -> None:
    component = next(part for part, prefix in LAYOUTS[name].prefixes.items() if key.startswith(prefix))
    assert tuple(exported(name, component)[key].shape) == shape


@pytest.mark.parametrize("form", ["packed", "transposed", "conv", "same"])
def test_unpacking_undoes_packing(form: Any) -> None:
    names = ("q", "k", "v") if form == "packed" else ("weight",)
    sources = [torch.randn(4, 6) for _ in names]
    entry = Entry("there", names, form)
    packed = entry.pack(sources)
    assert tuple(packed.shape) == entry.shape([(4, 6)] * len(names))
    for name, source in zip(names, sources, strict=True):
        assert torch.equal(entry.unpack(packed, name, (4, 6)), source)


def test_tensor_without_a_place_is_named() -> None:
    config = published("sd15").config_of("unet")
    with pytest.raises(KeyError, match="class_embedding"):
        SD1.entries("unet", config, ["conv_in.weight", "class_embedding.weight"])
