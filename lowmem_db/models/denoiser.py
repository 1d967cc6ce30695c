"""The part of a model that trains: the UNet, and the text encoder where it trains too."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPTextModel

from lowmem_db.models.conditioning import encode_prompt
from lowmem_db.records import Conditioning

AUTOCAST_TYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class Denoiser:
    """Predicts from noisy latents, timesteps and conditioning.

    Args:
        unet: The UNet.
        text_encoder: The text encoder; None where conditioning carries embeddings.
        autocast_dtype: Type of the autocast; None: everything in the type of the weights.
    """

    def __init__(
        self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel | None, autocast_dtype: torch.dtype | None = None
    ) -> None:
        self.unet = unet
        self.text_encoder = text_encoder
        self.autocast_dtype = autocast_dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.unet.device

    def modules(self) -> Mapping[str, nn.Module]:
        """Return what trains, by the name of its component."""
        modules: dict[str, nn.Module] = {"unet": self.unet}
        if self.text_encoder is not None:
            modules["text_encoder"] = self.text_encoder
        return modules

    def predict(
        self,
        noisy_latents: Float[Tensor, "b c h w"],
        timesteps: Int[Tensor, " b"],
        conditioning: Conditioning,
    ) -> Float[Tensor, "b c h w"]:
        """Return what the UNet predicts, in fp32."""
        with self.autocast():
            embeds = self.embeds(conditioning)
            latents = noisy_latents.to(self.unet.dtype)
            prediction = self.unet(latents, timesteps, encoder_hidden_states=embeds).sample
        return prediction.float()

    def embeds(self, conditioning: Conditioning) -> Float[Tensor, "b tokens dim"]:
        """Return the embeddings of conditioning; the text encoder makes them where it is part of the denoiser."""
        if self.text_encoder is not None:
            return encode_prompt(self.text_encoder, conditioning.input_ids)
        assert conditioning.prompt_embeds is not None, "conditioning has no embeddings and there is no text encoder"
        return conditioning.prompt_embeds.to(self.device, self.unet.dtype)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which the model computes."""
        if self.autocast_dtype is None:
            return nullcontext()
        # Without the cache a weight's copy in low precision lives as long as its layer needs it, not the whole pass.
        return torch.autocast(self.device.type, self.autocast_dtype, cache_enabled=False)
