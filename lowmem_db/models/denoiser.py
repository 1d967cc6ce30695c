"""The part of a model that trains: the UNet, and the text encoders where they train too."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lowmem_db.models.conditioning import embed
from lowmem_db.records import Conditioning

AUTOCAST_TYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class Denoiser:
    """Predicts from noisy latents, timesteps and conditioning.

    Args:
        unet: The UNet.
        text_encoder: The text encoder; None where conditioning carries embeddings.
        autocast_dtype: Type of the autocast; None: everything in the type of the weights.
        text_encoder_2: The second text encoder of SDXL, where the first one is given too.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel | None,
        autocast_dtype: torch.dtype | None = None,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
    ) -> None:
        self.unet = unet
        self.text_encoder = text_encoder
        self.autocast_dtype = autocast_dtype
        self.text_encoder_2 = text_encoder_2

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.unet.device

    def modules(self) -> Mapping[str, nn.Module]:
        """Return what trains, by the name of its component."""
        modules = {"unet": self.unet, "text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        return {name: module for name, module in modules.items() if module is not None}

    def predict(
        self,
        noisy_latents: Float[Tensor, "b c h w"],
        timesteps: Int[Tensor, " b"],
        conditioning: Conditioning,
    ) -> Float[Tensor, "b c h w"]:
        """Return what the UNet predicts, in fp32."""
        with self.autocast():
            embeds, added = self.embeds_and_added(conditioning)
            latents = noisy_latents.to(self.unet.dtype)
            prediction = self.unet(latents, timesteps, encoder_hidden_states=embeds, added_cond_kwargs=added).sample
        return prediction.float()

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which the model computes."""
        if self.autocast_dtype is None:
            return nullcontext()
        # Without the cache a weight's copy in low precision lives as long as its layer needs it, not the whole pass.
        return torch.autocast(self.device.type, self.autocast_dtype, cache_enabled=False)

    def embeds_and_added(self, conditioning: Conditioning) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Return the embeddings, and what SDXL is told beside them: pooled embedding, sizes and crop.

        The text encoders make them where they are part of the denoiser.
        """
        if self.text_encoder is not None:
            conditioning = embed(self.text_encoder, self.text_encoder_2, conditioning)
        embeds, pooled, time_ids = conditioning.prompt_embeds, conditioning.pooled_embeds, conditioning.time_ids
        assert embeds is not None, "conditioning has no embeddings, and there is no text encoder"
        if pooled is None or time_ids is None:
            return self._as_input(embeds, conditioning), None
        return self._as_input(embeds, conditioning), {
            "text_embeds": self._as_input(pooled, conditioning),
            "time_ids": time_ids.to(self.device, torch.float32),  # bf16 would round sizes above 256
        }

    def _as_input(self, embeds: Tensor, conditioning: Conditioning) -> Tensor:
        """Return embeddings on the UNet's device in its type, zeros where there is no prompt."""
        embeds = embeds.to(self.device, self.unet.dtype)
        if conditioning.has_prompt is None:
            return embeds
        has_prompt = conditioning.has_prompt.to(embeds.device, embeds.dtype)
        return embeds * has_prompt.view(-1, *[1] * (embeds.dim() - 1))
