"""The part of a model that trains: the denoiser, and the text encoders where they train too."""

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
    """Predicts from noisy latents, timesteps and conditioning.

    Args:
        family: The kind of model.
        modules: The denoiser by the name of its component; and the text encoders, unless conditioning carries
            embeddings.
        autocast_dtype: Type of the autocast; None: everything in the type of the weights.
    """

    def __init__(
        self, family: Family, modules: Mapping[str, nn.Module], autocast_dtype: torch.dtype | None = None
    ) -> None:
        self.family = family
        self.autocast_dtype = autocast_dtype
        self._modules = dict(modules)

    @property
    def name(self) -> str:
        """Name of the component that predicts."""
        return self.family.denoiser

    @property
    def module(self) -> Any:
        """The component that predicts."""
        return self._modules[self.name]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.module.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of what the denoiser gets."""
        return self.module.dtype

    def modules(self) -> Mapping[str, nn.Module]:
        """Return what trains, by the name of its component."""
        return dict(self._modules)

    def text_encoders(self) -> Mapping[str, nn.Module]:
        """Return the text encoders; none where conditioning carries embeddings."""
        return {name: module for name, module in self._modules.items() if name != self.name}

    def blocks(self) -> Mapping[str, Block]:
        """Return the blocks whose checkpoints have a placement of their own."""
        return self.family.blocks(self._modules)

    def predict(
        self, noisy_latents: Float[Tensor, "b c h w"], timesteps: Tensor, conditioning: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        """Return what the denoiser predicts, in fp32.

        Args:
            noisy_latents: Noisy pictures or latents.
            timesteps: One for each sample.
            conditioning: What it is told of each sample.
        """
        with self.autocast():
            told = self.told(conditioning)
            prediction = self.family.predict(self.module, noisy_latents.to(self.dtype), timesteps, told)
        return prediction.float()

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which the model computes."""
        if self.autocast_dtype is None:
            return nullcontext()
        # Without the cache a weight's copy in low precision lives as long as its layer needs it, not the whole pass.
        return torch.autocast(self.device.type, self.autocast_dtype, cache_enabled=False)

    def told(self, conditioning: Conditioning) -> Conditioning:
        """Return conditioning with embeddings, on the denoiser's device in its type.

        The text encoders make them where they are part of the denoiser. What is told about pictures stays fp32: bf16
        would round sizes above 256.
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
        """Return embeddings as the denoiser gets them, zeros where there is no prompt."""
        embeds = embeds.to(self.device, self.dtype)
        if has_prompt is None:
            return embeds
        return embeds * has_prompt.to(embeds.device, embeds.dtype).view(-1, *[1] * (embeds.dim() - 1))
