"""DeepFloyd IF (github.com/deep-floyd/IF): pixels, T5, and a UNet that predicts a variance too, as in Imagen.

Imagen (arXiv:2205.11487) is the model of the DreamBooth paper, and nobody can get it; IF is the one of its kind that
people can have.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn
from transformers import T5EncoderModel

from lowmem_db.config.schema import Config, ObjectiveConfig, SuperResolutionConfig
from lowmem_db.config.schema import Sampler as SamplerName
from lowmem_db.errors import ConfigError
from lowmem_db.models.families import t5
from lowmem_db.models.families.base import Component, Family, Sampler, Tensors, token_ids
from lowmem_db.models.families.blocks import Block
from lowmem_db.models.families.spaces import PixelSpace
from lowmem_db.models.families.stable_diffusion import SAMPLERS, without_extras
from lowmem_db.models.families.unet_blocks import find_blocks
from lowmem_db.models.files import ModelFiles
from lowmem_db.models.loading import load_module, load_noise_schedule
from lowmem_db.objective.low_resolution import LowResolution, level_of
from lowmem_db.objective.process import Diffusion
from lowmem_db.records import Conditioning

_LEARNED = ("learned", "learned_range")
_OWN_LAYERS = (".add_k_proj.", ".add_v_proj.", "samplers.0.conv1.", "samplers.0.conv2.")


class DeepFloydIF(Family):
    """The first stage of the cascade, which draws small pictures from a prompt.

    The UNet has six output channels: the noise, and how large the variance of a step of sampling is. As in diffusers'
    training only the noise has a loss, so the variance, which shares all layers with it, is not to be trusted
    afterwards: a trained model is drawn with a fixed one, unless ``objective.variance`` gives the variance a loss.

    Args:
        name: Name for users.
        hub_ids: Models on the hub whose configurations are in this package, with their folders.
    """

    components = (
        Component("unet", "denoiser", partial(load_module, UNet2DConditionModel)),
        Component("text_encoder", "text_encoder", t5.load_layerwise, partial(load_module, T5EncoderModel)),
        Component("tokenizer", "tokenizer", t5.load_t5_tokenizer),
        Component("scheduler", "scheduler"),
    )
    pipelines = ("IFPipeline",)
    masks_padding = True
    channels = 3

    def __init__(self, name: str, hub_ids: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.hub_ids = hub_ids or {}

    def recognises(self, files: ModelFiles) -> bool:
        """Return whether the UNet takes pixels alone."""
        return files.config_of("unet").get("in_channels") == self.channels

    def recognises_lora(self, state: Tensors) -> bool:
        """Return whether the adapters belong to blocks that only such a UNet has."""
        return any(part in name for name in state for part in _OWN_LAYERS)

    def problems(self, files: ModelFiles) -> list[str]:
        """Return where UNet and text encoder do not fit each other."""
        unet, width = files.config_of("unet"), files.config_of("text_encoder").get("d_model")
        found = []
        if unet.get("encoder_hid_dim") != width:
            found.append(
                f"unet: takes text embeddings of width {unet.get('encoder_hid_dim')}, but text_encoder gives {width}; "
                "use the model that these files come from as a whole"
            )
        if unet.get("out_channels") not in (self.channels, 2 * self.channels):
            found.append(
                f"unet: gives {unet.get('out_channels')} channels; allowed: {self.channels}, or {2 * self.channels} "
                "with a variance. Download it again"
            )
        return found

    def word_widths(self, files: ModelFiles) -> Mapping[str, int]:
        """Refuse new words.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"model.base: {self.name} reads prompts with T5, to which no new words can be added; leave "
            "textual_inversion and model.embeddings out, or use a Stable Diffusion model"
        )

    def refusals(self, config: Config, files: ModelFiles) -> list[str]:
        """Refuse another resolution or diffusion than the model's, and a text encoder that trains."""
        found, resolution = super().refusals(config, files), self.resolution(files)
        if config.data.resolution != resolution:
            found.append(
                f"data.resolution: {config.data.resolution}, but {self.name} draws pictures of {resolution} px; set "
                f"data.resolution={resolution}"
            )
        if config.training.train_text_encoder:
            found.append(
                f"training.train_text_encoder: true, but the T5 of {self.name} is always frozen, as in the paper; set "
                "training.train_text_encoder=false"
            )
        changed = {name: getattr(config.objective, name) for name in ("prediction_type", "zero_terminal_snr")}
        found += [
            f"objective.{name}: {value!r}, but {self.name} goes on with the diffusion it was trained with; leave it out"
            for name, value in changed.items()
            if value is not None
        ]
        return found

    def tokenize(self, files: ModelFiles, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return 77 token ids for each prompt, and masks of those that are not padding."""
        return t5.tokenize(t5.load_t5_tokenizer(files, "tokenizer"), prompts)

    def encode(self, text_encoders: Mapping[str, nn.Module], tokens: Tensors) -> dict[str, Tensor]:
        """Return T5's last hidden states."""
        return dict(self.encode_each(text_encoders, [tokens])[0])

    def encode_each(self, text_encoders: Mapping[str, nn.Module], tokens: Sequence[Tensors]) -> list[Tensors]:
        """Return T5's last hidden states; every layer is read once for all of them."""
        encoder = cast("t5.LayerwiseT5", text_encoders["text_encoder"])
        return [{"embeds": embeds} for embeds in t5.encode(encoder, tokens)]

    def blank_tokens(self, files: ModelFiles, count: int) -> dict[str, Tensor]:
        """Return dummy token ids and their masks."""
        return {
            "input_ids": token_ids(count, t5.MAX_TOKENS),
            "attention_mask": torch.ones(count, t5.MAX_TOKENS, dtype=torch.int64),
        }

    def blank_embeds(
        self, files: ModelFiles, count: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Return embeddings of zeros."""
        width = files.config_of("text_encoder")["d_model"]
        return {"embeds": torch.zeros(count, t5.MAX_TOKENS, width, dtype=dtype, device=device)}

    def space(self, files: ModelFiles) -> PixelSpace:
        """Return pixels."""
        return PixelSpace()

    def size_step(self, files: ModelFiles) -> int:
        """Return the pixels per position at the lowest level of the UNet."""
        return 2 ** (len(files.config_of("unet")["block_out_channels"]) - 1)

    def drawing_step(self, files: ModelFiles) -> int:
        """Return the same: its blocks double sizes on the way up, and odd ones would not meet those from the way down.

        The UNet of Stable Diffusion has blocks that are told their size.
        """
        return self.size_step(files)

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Float[Tensor, "b 3 h w"]:
        """Return the predicted noise."""
        return self.predict_to_draw(denoiser, noisy, timesteps, conditioning)[:, : self.channels]

    def predict_to_draw(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        """Return the predicted noise, and the variance after it if the UNet predicts one."""
        return denoiser(noisy, timesteps, encoder_hidden_states=conditioning.embeds["embeds"]).sample

    def process(self, files: ModelFiles, objective: ObjectiveConfig) -> Diffusion:
        """Return the diffusion the model was trained with; no run changes it."""
        schedule = load_noise_schedule(files)
        return Diffusion(schedule.alphas_cumprod, schedule.config["prediction_type"])

    def sampler(self, files: ModelFiles, name: SamplerName, objective: ObjectiveConfig | None = None) -> Sampler:
        """Return one of diffusers' samplers, with the model's dynamic thresholding (arXiv:2205.11487, section 2.3).

        The ancestral one uses the variance that the model predicts, unless the model has been trained.
        """
        config: dict[str, Any] = dict(load_noise_schedule(files, clips=True).config)
        return SAMPLERS[name].from_config({**config, **(self.scheduler_changes(files, objective) if objective else {})})

    def scheduler_changes(self, files: ModelFiles, objective: ObjectiveConfig) -> Mapping[str, Any]:
        """Return the fixed variance, if the model has another one and training has not cared for it."""
        has_own = files.config_of("scheduler").get("variance_type") in _LEARNED
        return {"variance_type": "fixed_small"} if has_own and objective.variance == "frozen" else {}

    def predicts_variance(self, files: ModelFiles) -> bool:
        """Return whether the UNet has channels for it, and the scheduler reads them as a place between two bounds."""
        is_range = files.config_of("scheduler").get("variance_type") == "learned_range"
        return is_range and files.config_of("unet").get("out_channels") == 2 * self.channels

    def blocks(self, modules: Mapping[str, nn.Module]) -> dict[str, Block]:
        """Return the blocks of the UNet."""
        return find_blocks(modules)

    def finished_index(self, index: dict[str, Any]) -> dict[str, Any]:
        """Drop the safety checker and the watermarker, which are not in the folder."""
        return without_extras(index, "watermarker") | {"requires_safety_checker": False}


class IFSuperResolution(DeepFloydIF):
    """A later stage of the cascade, which enlarges pictures; it is told the prompt and the picture to enlarge.

    The paper fine-tunes it too, on photos and their low-resolution versions: else it invents the details.
    """

    components = (*DeepFloydIF.components, Component("image_noising_scheduler", "scheduler"))
    pipelines = ("IFSuperResolutionPipeline",)
    enlarges = True

    def recognises(self, files: ModelFiles) -> bool:
        """Return whether the UNet takes two pictures, and the level of the noise on one of them."""
        unet = files.config_of("unet")
        return unet.get("in_channels") == 2 * self.channels and unet.get("class_embed_type") == "timestep"

    def refusals(self, config: Config, files: ModelFiles) -> list[str]:
        """Refuse, besides what the first stage does, whatever would draw from a prompt alone."""
        found, prior = super().refusals(config, files), config.prior
        if prior.enabled and (prior.class_dir is None or not prior.class_dir.is_dir()):
            found.append(
                f"prior.enabled: true, but {self.name} cannot draw class images from a prompt; set prior.class_dir to "
                "a folder of pictures of the class, or prior.enabled=false"
            )
        drawing = {"sampling.prompts": config.sampling.prompts, "evaluation.every": config.evaluation.every}
        found += [
            f"{field}: {self.name} enlarges pictures, and draws none while it trains; leave it out, and draw "
            "afterwards with lowmem-db generate FIRST_STAGE --upscale RUN"
            for field, value in drawing.items()
            if value
        ]
        if config.data.aspect_ratio_buckets:
            found.append(f"data.aspect_ratio_buckets: true, but {self.name} enlarges squares; leave it out")
        small = config.super_resolution.low_resolution
        if small is not None and small >= config.data.resolution:
            found.append(
                f"super_resolution.low_resolution: {small} is not smaller than data.resolution, "
                f"{config.data.resolution}; leave it out for a quarter of that"
            )
        return found

    def low_resolution(self, files: ModelFiles, config: Config | None = None) -> LowResolution:
        """Return how pictures are reduced for training, and how much noise those to enlarge have."""
        chosen = SuperResolutionConfig() if config is None else config.super_resolution
        schedule = load_noise_schedule(files, component="image_noising_scheduler")
        return LowResolution(
            resolution=chosen.low_resolution or self.resolution(files) // 4,
            variance=chosen.noise_augmentation,
            level=level_of(chosen.noise_augmentation, schedule.alphas_cumprod),
            seed=0 if config is None else config.seed,
        )

    def predict_to_draw(
        self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        """Return the predicted noise and variance, for the picture to enlarge and the level of the noise on it."""
        beside = conditioning.picture["low_resolution"].to(noisy.dtype)
        return denoiser(
            torch.cat([noisy, beside], dim=1),
            timesteps,
            encoder_hidden_states=conditioning.embeds["embeds"],
            class_labels=conditioning.picture["noise_level"],
        ).sample


IF_STAGE_1 = DeepFloydIF("DeepFloyd IF, stage I", {"DeepFloyd/IF-I-XL-v1.0": "if_i_xl"})
IF_SUPER_RESOLUTION = IFSuperResolution("DeepFloyd IF, super-resolution", {"DeepFloyd/IF-II-M-v1.0": "if_ii_m"})
