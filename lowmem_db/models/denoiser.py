"""The part of a model that trains: the denoiser, and the text encoders if they train too."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowmem_db.models.families import Family
from lowmem_db.models.families.blocks import Block
from lowmem_db.records import Conditioning

AUTOCAST_TYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class Denoiser:
    """Makes predictions from noisy latents, timesteps and conditioning.

    Args:
        family: The model's family.
        modules: The denoiser, and the text encoders unless the conditioning has embeddings, by component.
        autocast_dtype: Type for autocast. Default: no autocast.
        with_variance: Also return the variance that the model predicts, in further channels.
    """

    def __init__(
        self,
        family: Family,
        modules: Mapping[str, nn.Module],
        autocast_dtype: torch.dtype | None = None,
        *,
        with_variance: bool = False,
    ) -> None:
        self.family = family
        self.with_variance = with_variance
        self.autocast_dtype = autocast_dtype
        self._modules = dict(modules)

    @property
    def name(self) -> str:
        """Component name of the denoiser."""
        return self.family.denoiser

    @property
    def module(self) -> Any:
        """The denoiser."""
        return self._modules[self.name]

    @property
    def device(self) -> torch.device:
        """Device of the denoiser."""
        return self.module.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the denoiser's inputs."""
        return self.module.dtype

    def modules(self) -> Mapping[str, nn.Module]:
        """Return the denoiser and the text encoders, by component."""
        return dict(self._modules)

    def text_encoders(self) -> Mapping[str, nn.Module]:
        """Return the text encoders; empty if the conditioning has embeddings."""
        return {name: module for name, module in self._modules.items() if name != self.name}

    def blocks(self) -> Mapping[str, Block]:
        """Return the blocks for which activation checkpointing is chosen separately."""
        return self.family.blocks(self._modules)

    def predict(
        self, noisy_latents: Float[Tensor, "b c h w"], timesteps: Tensor, conditioning: Conditioning
    ) -> Float[Tensor, "b d h w"]:
        """Return the denoiser's prediction, in fp32.

        Args:
            noisy_latents: Noisy pictures or latents.
            timesteps: One for each sample.
            conditioning: The conditioning of each sample.
        """
        predict = self.family.predict_to_draw if self.with_variance else self.family.predict
        with self.autocast():
            told = self.told(conditioning)
            prediction = predict(self.module, noisy_latents.to(self.dtype), timesteps, told)
        return prediction.float()

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which the model computes."""
        if self.autocast_dtype is None:
            return nullcontext()
        # Without the cache, a weight's low-precision copy lives only while its layer needs it, not for the whole pass.
        return torch.autocast(self.device.type, self.autocast_dtype, cache_enabled=False)

    def told(self, conditioning: Conditioning) -> Conditioning:
        """Return the conditioning with embeddings, on the denoiser's device and in its type.

        The text encoders make the embeddings if they are part of this denoiser. Picture sizes stay in fp32: bf16
        would round those above 256.
        """
        embeds = conditioning.embeds
        if text_encoders := self.text_encoders():
            embeds = self.family.encode(text_encoders, conditioning.tokens)
        assert embeds, "conditioning has no embeddings, and there is no text encoder"
        return replace(
            conditioning,
            embeds={name: self._as_input(rows, conditioning.has_prompt) for name, rows in embeds.items()},
            picture={name: rows.to(self.device, torch.float32) for name, rows in conditioning.picture.items()},
        )

    def _as_input(self, embeds: Tensor, has_prompt: Tensor | None) -> Tensor:
        """Return embeddings in the denoiser's type, zeros for samples without a prompt."""
        embeds = embeds.to(self.device, self.dtype)
        if has_prompt is None:
            return embeds
        return embeds * has_prompt.to(embeds.device, embeds.dtype).view(-1, *[1] * (embeds.dim() - 1))
