"""The frozen records that are passed between packages."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """One image on disk, checked and ready to be read.

    Attributes:
        path: The file.
        content_key: Key of the file's bytes.
        width: Pixels, after the EXIF orientation is applied.
        height: Pixels, after the EXIF orientation is applied.
        prompt: The prompt for this image during training.
    """

    path: Path
    content_key: str
    width: int
    height: int
    prompt: str


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the denoiser is conditioned on, one row per sample. The model family names the tensors.

    Attributes:
        tokens: Token ids from the tokenizers.
        embeds: Embeddings from the text encoders; empty if the encoders train too.
        picture: Tensors that describe the images, such as SDXL's sizes and crops.
        has_prompt: Whether a row has a prompt; the embeddings of a row without one are zeros. None if all have one.
    """

    tokens: Mapping[str, Shaped[Tensor, "b ..."]]
    embeds: Mapping[str, Shaped[Tensor, "b ..."]] = field(default_factory=dict)
    picture: Mapping[str, Shaped[Tensor, "b ..."]] = field(default_factory=dict)
    has_prompt: Bool[Tensor, " b"] | None = None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Instance samples first, then prior samples.

    Attributes:
        latent_mean: Mean of the autoencoder's posterior, in the denoiser's scale.
        latent_std: Its standard deviation; zero for a deterministic autoencoder.
        conditioning: What the denoiser is conditioned on.
        sample_ids: Number of each sample within its optimizer step; every random draw for the sample depends on it.
        num_instance: How many of the samples are instance samples.
        sources: File name of each sample, for messages.
    """

    latent_mean: Float[Tensor, "b c h w"]
    latent_std: Float[Tensor, "b c h w"]
    conditioning: Conditioning
    sample_ids: Int[Tensor, " b"]
    num_instance: int
    sources: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What one optimizer step reports.

    Attributes:
        loss: Equation 2 of arXiv:2208.12242, the mean over the accumulated batches.
        loss_instance: Its first term.
        loss_prior: Its second term, without the factor ``prior_loss_weight``; None without prior preservation.
        grad_norm: Joint norm of all gradients before clipping; None if it is not computed.
        num_samples: Samples that each process computed, by rank.
    """

    loss: float
    loss_instance: float
    loss_prior: float | None
    grad_norm: float | None
    num_samples: tuple[int, ...]


@dataclass(frozen=True)
class MemoryParts:
    """Bytes on a device, by what they hold.

    Attributes:
        weights: Weights of every model in memory.
        optimizer_state: Moments, their scales, and the extra bits of 24-bit weights.
        gradients: Gradients that the backward pass has assigned to parameters.
        activations: Tensors that a training or sampling step has made and not freed yet.
        other: Everything else: tables, ring buffers, moving averages, inputs.
    """

    weights: int = 0
    optimizer_state: int = 0
    gradients: int = 0
    activations: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(astuple(self))


PARTS = tuple(MemoryParts.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class PhaseMemory:
    """What one phase of a run needs at its peak.

    Attributes:
        name: ``class_images``, ``encode_images``, ``encode_text``, ``train`` or ``sample``.
        parts: Bytes of the device.
        host_bytes: Bytes on the host that belong to the device's work.
        pinned_bytes: Bytes of those that are pinned.
    """

    name: str
    parts: MemoryParts
    host_bytes: int = 0
    pinned_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A strategy that was not chosen.

    Attributes:
        strategy: Its name.
        reason: Why, in words.
    """

    strategy: str
    reason: str


_Config = TypeVar("_Config")


@dataclass(frozen=True, kw_only=True)
class MemoryPlan(Generic[_Config]):
    """What a run will need, and how it saves memory.

    Attributes:
        device: The device it was planned for, in words.
        config: The configuration with the fastest strategy that fits.
        phases: The phases of the run in their order.
        allowance_bytes: What the device needs in addition to tensors: context, workspaces, fragmentation.
        reserved_bytes: What the caching allocator takes at the peak; None on the CPU, which has none.
        budget_bytes: Bytes that the run may use.
        seconds_per_step: Predicted seconds of a training step.
        seconds: Predicted seconds of the phases; those that take almost none are left out.
        disk_bytes: About how many bytes ``cache``, ``checkpoints``, ``final`` and ``records`` (samples, curves, page)
            take on the disk.
        refused: Strategies that would be faster, or that a rule refuses.
        notes: Remarks for the user.
        seconds_to_plan: Seconds that planning took.
        host_peak_bytes: What a card's run needs of the host beside it; 0 on the CPU.
        sent_bytes: Gradients that the busiest of several processes sends to others in each step.
        received_bytes: What it receives from them.
    """

    device: str
    config: _Config
    phases: tuple[PhaseMemory, ...]
    allowance_bytes: int
    reserved_bytes: int | None
    budget_bytes: int
    seconds_per_step: float
    seconds: Mapping[str, float]
    disk_bytes: Mapping[str, int]
    refused: tuple[Refusal, ...]
    notes: tuple[str, ...]
    seconds_to_plan: float
    host_peak_bytes: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0

    @property
    def tensor_bytes(self) -> int:
        """Bytes of tensors at the peak of the run."""
        return max(phase.parts.total for phase in self.phases)

    @property
    def peak_bytes(self) -> int:
        """Bytes of the device at the peak of the run, allowance included: what the whole process takes of it."""
        return self.tensor_bytes + self.allowance_bytes
