"""The layout of the published single files, as data: where each tensor of diffusers' layout goes, and in what form.

The names are those of ``v1-5-pruned-emaonly``, ``v2-1_768-ema-pruned`` and ``sd_xl_base_1.0``: an LDM UNet and
autoencoder, CLIP as transformers names it, OpenCLIP as that library names it. The same table serves both directions.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Form = Literal["same", "conv", "transposed", "packed", "positions", "logit_scale", "identity"]

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."


@dataclass(frozen=True)
class Entry:
    """One tensor of a single file.

    Attributes:
        name: Its name in the file.
        sources: Names of the tensors in diffusers' layout that it is made of.
        form: How it is made: unchanged; a matrix as a 1x1 convolution; transposed; queries, keys and values stacked;
            or a constant: the position ids, the logarithm of CLIP's greatest scale, an identity matrix.
        spare: Whether it is written only because published files have it; nothing reads it.
    """

    name: str
    sources: tuple[str, ...]
    form: Form = "same"
    spare: bool = False

    def shape(self, sources: list[tuple[int, ...]]) -> tuple[int, ...]:
        """Return its shape, given the shapes of its sources."""
        first = sources[0]
        if self.form == "conv":
            return (*first[:2], 1, 1)
        if self.form == "transposed":
            return first[::-1]
        return (sum(shape[0] for shape in sources), *first[1:]) if self.form == "packed" else first

    def pack(self, sources: list[Tensor]) -> Tensor:
        """Return the tensor made from its sources."""
        first = sources[0]
        if self.form == "packed":
            return torch.cat(sources)
        return first.T if self.form == "transposed" else first.reshape(self.shape([tuple(first.shape)]))

    def unpack(self, tensor: Tensor, source: str, shape: tuple[int, ...]) -> Tensor:
        """Return one of its sources, in the given shape."""
        if self.form == "packed":
            return tensor.chunk(len(self.sources))[self.sources.index(source)]
        return tensor.T if self.form == "transposed" else tensor.reshape(shape)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The single-file layout of a family of models.

    Attributes:
        architecture: Its name in ModelSpec, without the resolution.
        prefixes: Prefix of each component's tensors.
        open_clip: Text encoders stored as OpenCLIP stores them.
        penultimate: Those of them whose last block is unused and missing from diffusers' layout.
        configs: Folder of its configurations in this package.
        configs_of_epsilon: The folder for models that predict epsilon. Default: the same.
        usual_prediction: What most of its models predict; None if it has many of both.
        sizes_in_name: Whether ModelSpec's names for such models include size and prediction.
    """

    architecture: str
    prefixes: Mapping[str, str]
    open_clip: frozenset[str] = frozenset()
    penultimate: frozenset[str] = frozenset()
    configs: str
    configs_of_epsilon: str | None = None
    usual_prediction: str | None = "epsilon"
    sizes_in_name: bool = False

    def folder_of_configs(self, prediction_type: str) -> str:
        """Return the folder of the configurations of models with some prediction type."""
        return (prediction_type == "epsilon" and self.configs_of_epsilon) or self.configs

    def architecture_of(self, sample_size: int, prediction_type: str) -> str:
        """Return the architecture name of a model in ModelSpec.

        Args:
            sample_size: The side length, in latent pixels, that it was trained for.
            prediction_type: What it predicts.
        """
        if not self.sizes_in_name:
            return self.architecture
        size = 768 if sample_size > 64 else 512
        return f"{self.architecture}-{size}" + ("-v" if prediction_type == "v_prediction" else "")

    def entries(self, component: str, config: Mapping[str, Any], names: Iterable[str]) -> list[Entry]:
        """Return the tensors of a component in the single file.

        Args:
            component: ``unet``, ``vae``, ``text_encoder`` or ``text_encoder_2``.
            config: Its configuration.
            names: Names of its tensors in diffusers' layout, as published.

        Raises:
            KeyError: A tensor has no place in this layout.
        """
        if component == "unet":
            found = _unet_entries(config, names)
        elif component == "vae":
            found = _vae_entries(config, names)
        elif component in self.open_clip:
            found = _open_clip_entries(config, names, penultimate=component in self.penultimate)
        else:
            found = [Entry(name, (name,)) for name in names]
            found.append(Entry("text_model.embeddings.position_ids", (), "positions", spare=True))
        prefix = self.prefixes[component]
        return [Entry(prefix + entry.name, entry.sources, entry.form, entry.spare) for entry in found]


SD1 = Layout(
    architecture="stable-diffusion-v1",
    configs="sd15",
    prefixes={"unet": UNET_PREFIX, "vae": VAE_PREFIX, "text_encoder": "cond_stage_model.transformer."},
)
SD2 = Layout(
    architecture="stable-diffusion-v2",
    configs="sd21",
    configs_of_epsilon="sd21_base",
    usual_prediction=None,
    sizes_in_name=True,
    prefixes={"unet": UNET_PREFIX, "vae": VAE_PREFIX, "text_encoder": "cond_stage_model.model."},
    open_clip=frozenset({"text_encoder"}),
    penultimate=frozenset({"text_encoder"}),
)
SDXL = Layout(
    architecture="stable-diffusion-xl-v1-base",
    configs="sdxl_base",
    prefixes={
        "unet": UNET_PREFIX,
        "vae": VAE_PREFIX,
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    open_clip=frozenset({"text_encoder_2"}),
)


def layout_for(configs: Mapping[str, Mapping[str, Any]]) -> Layout:
    """Return the layout of a model: SDXL has two text encoders, and SD 2.x has OpenCLIP's.

    Args:
        configs: Configurations of its components.
    """
    if "text_encoder_2" in configs:
        return SDXL
    return SD2 if configs["text_encoder"].get("hidden_act") == "gelu" else SD1


_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.attentions.0": "middle_block.1",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ENDS = {
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
    **{f"{half}.{name}": f"{half}.{name}" for half in ("encoder", "decoder") for name in ("conv_in", "conv_out")},
    **{f"{half}.conv_norm_out": f"{half}.norm_out" for half in ("encoder", "decoder")},
}
_VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
_VAE_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_BLOCK = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_QUERIES = "self_attn.q_proj"


def _unet_entries(config: Mapping[str, Any], names: Iterable[str]) -> list[Entry]:
    modules = _unet_modules(config)
    return [Entry(_renamed(name, modules), (name,)) for name in names]


def _unet_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the file's name of each module of the UNet: the blocks of each half are numbered consecutively."""
    modules = dict(_UNET_ENDS)
    depth, layers = len(config["block_out_channels"]), config["layers_per_block"]
    for i in range(depth):
        first = 1 + i * (layers + 1)
        for j in range(layers):
            modules |= _resnet(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{first + j}.0", _UNET_RESNET)
            modules[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{first + j}.1"
        modules[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{first + layers}.0.op"
        first = i * (layers + 1)
        for j in range(layers + 1):
            modules |= _resnet(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{first + j}.0", _UNET_RESNET)
            modules[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{first + j}.1"
        place = 2 if "CrossAttn" in config["up_block_types"][i] else 1
        modules[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{first + layers}.{place}.conv"
    for j, place in enumerate((0, 2)):
        modules |= _resnet(f"mid_block.resnets.{j}", f"middle_block.{place}", _UNET_RESNET)
    return modules


def _vae_entries(config: Mapping[str, Any], names: Iterable[str]) -> list[Entry]:
    modules = _vae_modules(config)
    linear = re.compile(r"mid_block\.attentions\.0\.to_.*\.weight")
    return [Entry(_renamed(name, modules), (name,), "conv" if linear.search(name) else "same") for name in names]


def _vae_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the name of each module of the autoencoder: the decoder's blocks are counted from the image inwards."""
    modules = dict(_VAE_ENDS)
    depth, layers = len(config["block_out_channels"]), config["layers_per_block"]
    for i in range(depth):
        for j in range(layers):
            modules |= _resnet(f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}", _VAE_RESNET)
        modules[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        up = f"decoder.up.{depth - 1 - i}"
        for j in range(layers + 1):
            modules |= _resnet(f"decoder.up_blocks.{i}.resnets.{j}", f"{up}.block.{j}", _VAE_RESNET)
        modules[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"{up}.upsample.conv"
    for half in ("encoder", "decoder"):
        for j in range(2):
            modules |= _resnet(f"{half}.mid_block.resnets.{j}", f"{half}.mid.block_{j + 1}", _VAE_RESNET)
        attention = _VAE_ATTENTION | {"group_norm": "norm"}
        modules |= _resnet(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", attention)
    return modules


def _open_clip_entries(config: Mapping[str, Any], names: Iterable[str], *, penultimate: bool) -> list[Entry]:
    entries = []
    last = config["num_hidden_layers"] - 1
    for name in names:
        block = _BLOCK.fullmatch(name)
        if block is None:
            transposed = name == "text_projection.weight"
            entries.append(Entry("text_projection", (name,), "transposed") if transposed else _open_clip_end(name))
            continue
        number = int(block[1])
        entries += _open_clip_block(name, number, block[2], block[3])
        if penultimate and number == last:
            entries += [
                Entry(entry.name.replace(f".{last}.", f".{last + 1}.", 1), entry.sources, entry.form, spare=True)
                for entry in _open_clip_block(name, number, block[2], block[3])
            ]
    if penultimate:
        entries.append(Entry("text_projection", (), "identity", spare=True))
    return [*entries, Entry("logit_scale", (), "logit_scale", spare=True)]


def _open_clip_end(name: str) -> Entry:
    return Entry(_OPEN_CLIP[name], (name,))


def _open_clip_block(name: str, number: int, module: str, kind: str) -> list[Entry]:
    start = f"transformer.resblocks.{number}."
    if module == _QUERIES:
        sources = tuple(name.replace("q_proj", f"{letter}_proj") for letter in "qkv")
        return [Entry(f"{start}attn.in_proj_{kind}", sources, "packed")]
    if module in {"self_attn.k_proj", "self_attn.v_proj"}:
        return []
    return [Entry(f"{start}{_OPEN_CLIP_BLOCK[module]}.{kind}", (name,))]


def _resnet(module: str, place: str, inner: Mapping[str, str]) -> dict[str, str]:
    return {f"{module}.{ours}": f"{place}.{theirs}" for ours, theirs in inner.items()}


def _renamed(name: str, modules: Mapping[str, str]) -> str:
    """Replace the longest module that ``name`` starts with."""
    module, rest = name, ""
    while module not in modules:
        module, dot, last = module.rpartition(".")
        if not dot:
            raise KeyError(name)
        rest = f".{last}{rest}"
    return modules[module] + rest
