"""The interface of a family of models: everything that differs from family to family.

To add one, write a subclass of :class:`Family`, see docs/adding_a_family.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lowmem_db.config.schema import Config, ObjectiveConfig, SuperResolutionConfig
from lowmem_db.config.schema import Sampler as SamplerName
from lowmem_db.errors import ConfigError, ModelError
from lowmem_db.models.families.blocks import Block
from lowmem_db.models.families.original_layout import Layout
from lowmem_db.models.families.spaces import Space
from lowmem_db.models.files import ModelFiles
from lowmem_db.objective.low_resolution import LowResolution
from lowmem_db.objective.process import NoiseProcess
from lowmem_db.records import Conditioning

Role = Literal["denoiser", "text_encoder", "tokenizer", "autoencoder", "scheduler"]
Load = Callable[[ModelFiles, str, torch.device, torch.dtype], Any]
Tensors = Mapping[str, Tensor]
"""Named tensors with one row per sample."""


@runtime_checkable
class Sampler(Protocol):
    """The common interface of diffusers' schedulers."""

    timesteps: Tensor

    def set_timesteps(self, num_inference_steps: int, *, device: Any) -> None:
        """Set the timesteps."""
        ...

    def step(self, prediction: Tensor, timestep: Any, latents: Tensor, /, **options: Any) -> Any:
        """Take one step from noise to picture."""
        ...


@dataclass(frozen=True)
class Component:
    """A folder of a model in diffusers' layout.

    Attributes:
        name: Its name.
        role: What it is for.
        load: Loads it, given the model's files, its name, a device and a type; on the meta device its
            configuration is enough. Default: nothing to load but a configuration.
        load_whole: Loads it with all weights in memory, if :attr:`load` does not. Default: :attr:`load`.
    """

    name: str
    role: Role
    load: Load | None = None
    load_whole: Load | None = None

    @property
    def has_weights(self) -> bool:
        """Whether there are weights in the folder."""
        return self.role in {"denoiser", "text_encoder", "autoencoder"}


@dataclass(frozen=True)
class Reading:
    """How prompts are read.

    Attributes:
        clip_skip: Layer of the text encoders that is read, counted from the end. Default: the family's.
        num_chunks: Chunks in which prompts are read, each with its own start and end token.
    """

    clip_skip: int | None = None
    num_chunks: int = 1


class Family:
    """A family of models that can be trained.

    Attributes:
        name: Name for users.
        components: Its components; cache keys depend on their order.
        pipelines: Pipeline classes in ``model_index.json`` that such a model may have.
        hub_ids: Models on the hub whose configurations are in this package, with their folders.
        lora_prefixes: Prefixes of each component's adapters in kohya's scripts; empty if they do not support it.
        kohya_version: Name of the base model in kohya's scripts, or None if they do not support it.
        layout: Layout of its published single files, or None.
        reading: How prompts are read.
        reads_in_chunks: Whether long prompts can be read in several chunks.
        masks_padding: Whether the text encoders ignore padding.
        enlarges: Whether it enlarges pictures instead of drawing from a prompt alone.
    """

    name: str
    components: tuple[Component, ...]
    pipelines: tuple[str, ...]
    hub_ids: Mapping[str, str] = {}
    lora_prefixes: Mapping[str, str] = {}
    kohya_version: str | None = None
    layout: Layout | None = None
    reading: Reading = Reading()
    reads_in_chunks: bool = False
    masks_padding: bool = False
    enlarges: bool = False

    def with_reading(self, files: ModelFiles, reading: Reading) -> "Family":
        """Return the family with another way to read prompts.

        Raises:
            ConfigError: The family does not support it, or the model has fewer layers.
        """
        if reading == Reading():
            return self
        field = "clip_skip" if reading.clip_skip else "prompt_chunks"
        raise ConfigError(
            f"model.{field}: {files.path} is {self.name}, whose prompts are read in one way only; leave it out"
        )

    def recognises(self, files: ModelFiles) -> bool:
        """Return whether a folder with one of :attr:`pipelines` is a model of this family."""
        raise NotImplementedError

    def recognises_file(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether a single file whose tensors have these names and shapes is a model of this family."""
        del shapes
        return False

    def recognises_lora(self, state: Tensors) -> bool:
        """Return whether adapters belong to a model of this family."""
        del state
        return False

    def names_of(self, *roles: Role) -> tuple[str, ...]:
        """Return the names of the components with some role, in order."""
        return tuple(component.name for component in self.components if component.role in roles)

    def component(self, name: str) -> Component:
        """Return a component by name."""
        return next(component for component in self.components if component.name == name)

    @property
    def denoiser(self) -> str:
        """Component name of the denoiser."""
        return self.names_of("denoiser")[0]

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Component names of the text encoders."""
        return self.names_of("text_encoder")

    @property
    def with_weights(self) -> tuple[str, ...]:
        """Names of the components that have weights."""
        return tuple(component.name for component in self.components if component.has_weights)

    def problems(self, files: ModelFiles) -> list[str]:
        """Return what does not fit together in a model's configurations: a component, what is wrong, a way out."""
        del files
        return []

    def refusals(self, config: Config, files: ModelFiles) -> list[str]:
        """Return what a configuration asks for that the model cannot do: a field, what is wrong, a way out."""
        found = []
        if not self.enlarges and config.super_resolution != SuperResolutionConfig():
            found.append(
                f"super_resolution: has no effect on {self.name}, which draws from a prompt alone; leave it out"
            )
        if config.objective.variance != "frozen" and not self.predicts_variance(files):
            found.append(
                f"objective.variance: {config.objective.variance!r} has no effect on {self.name}, which predicts no "
                "variance between two bounds; leave it out"
            )
        return found

    def predicts_variance(self, files: ModelFiles) -> bool:
        """Return whether :meth:`predict_to_draw` predicts a variance, as arXiv:2102.09672 has it (Eq. 15)."""
        del files
        return False

    # Conditioning.

    def word_widths(self, files: ModelFiles) -> Mapping[str, int]:
        """Return the widths of the vectors that a new word needs, by text encoder.

        Raises:
            ConfigError: The family does not support new words.
        """
        return {name: files.config_of(name)["hidden_size"] for name in self.text_encoders}

    def tokenize(self, files: ModelFiles, prompts: Sequence[str]) -> Tensors:
        """Tokenize prompts: token ids, and attention masks if the model uses them."""
        raise NotImplementedError

    def encode(self, text_encoders: Mapping[str, nn.Module], tokens: Tensors) -> Tensors:
        """Return the embeddings of tokens."""
        raise NotImplementedError

    def encode_each(self, text_encoders: Mapping[str, nn.Module], tokens: Sequence[Tensors]) -> list[Tensors]:
        """Return the embeddings of several batches of tokens, each computed by itself."""
        return [self.encode(text_encoders, each) for each in tokens]

    def zeroes_empty_prompt(self, files: ModelFiles) -> bool:
        """Return whether the empty prompt is embedded as zeros."""
        del files
        return False

    def describe_pictures(self, facts: Float[Tensor, "b 6"]) -> Tensors:
        """Return the denoiser's conditioning on the sizes and crops of pictures.

        Args:
            facts: Original height and width, top and left of the crop, height and width of the crop, in pixels.
        """
        del facts
        return {}

    def blank_tokens(self, files: ModelFiles, count: int) -> Tensors:
        """Return dummy tokens for ``count`` prompts, on the CPU; only configurations are read."""
        raise NotImplementedError

    def blank_embeds(self, files: ModelFiles, count: int, device: torch.device, dtype: torch.dtype) -> Tensors:
        """Return dummy embeddings with the shapes that :meth:`encode` returns; only configurations are read."""
        raise NotImplementedError

    # Picture space, prediction and noise process.

    def space(self, files: ModelFiles) -> Space:
        """Return the space it works in: latents or pixels."""
        raise NotImplementedError

    def low_resolution(self, files: ModelFiles, config: Config | None = None) -> LowResolution | None:
        """Return how a super-resolution model is told of the pictures that it enlarges; None for other models.

        Args:
            files: The model.
            config: The run. Default: the usual fields of ``super_resolution``.
        """
        del files, config
        return None

    def resolution(self, files: ModelFiles) -> int:
        """Return the side length, in pixels, that it was trained for."""
        return self.space(files).cell * files.config_of(self.denoiser)["sample_size"]

    def size_step(self, files: ModelFiles) -> int:
        """Return the number of pixels that heights and widths must be multiples of."""
        return self.space(files).cell

    def drawing_step(self, files: ModelFiles) -> int:
        """Return the number of pixels that heights and widths of drawn pictures must be multiples of."""
        return self.space(files).cell

    def predict(
        self, denoiser: nn.Module, noisy: Float[Tensor, "b c h w"], timesteps: Tensor, conditioning: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        """Return the denoiser's prediction, without a predicted variance.

        Args:
            denoiser: The denoiser.
            noisy: Noisy pictures or latents, in the type of its weights.
            timesteps: One for each sample, or one for all.
            conditioning: With embeddings, on the denoiser's device and in the type of its weights.
        """
        raise NotImplementedError

    def predict_to_draw(
        self, denoiser: nn.Module, noisy: Float[Tensor, "b c h w"], timesteps: Tensor, conditioning: Conditioning
    ) -> Float[Tensor, "b d h w"]:
        """Return what :meth:`predict` does and, in further channels, a variance for samplers that use one."""
        return self.predict(denoiser, noisy, timesteps, conditioning)

    def process(self, files: ModelFiles, objective: ObjectiveConfig) -> NoiseProcess:
        """Return the noise process the model was trained with.

        Args:
            files: The model.
            objective: The run's changes to it.

        Raises:
            ConfigError: The model cannot be trained with these changes.
        """
        raise NotImplementedError

    def sampler(self, files: ModelFiles, name: SamplerName, objective: ObjectiveConfig | None = None) -> Sampler:
        """Return a new sampler for the model's noise process.

        Args:
            files: The model.
            name: ``ddpm`` (ancestral, arXiv:2006.11239), ``ddim`` (arXiv:2010.02502; Euler's method for the straight
                lines of a flow), ``dpm_solver`` (arXiv:2211.01095).
            objective: The run's changes to the process. Default: the model has not been trained.

        Raises:
            ConfigError: The family does not support the sampler.
        """
        raise NotImplementedError

    def scheduler_changes(self, files: ModelFiles, objective: ObjectiveConfig) -> Mapping[str, Any]:
        """Return what training for an objective changes in the configuration of the scheduler, besides its fields."""
        del files, objective
        return {}

    # Activation checkpointing.

    def blocks(self, modules: Mapping[str, nn.Module]) -> dict[str, Block]:
        """Return the blocks for which activation checkpointing is chosen separately, in the order of the forward pass.

        Args:
            modules: What trains, by component; a block's name begins with that of its component.
        """
        raise NotImplementedError

    # Other file formats.

    def layout_of(self, files: ModelFiles) -> Layout:
        """Return the layout of a single file for a model.

        Raises:
            ModelError: The model cannot be written as a single file.
        """
        raise ModelError(f"{files.path}: {self.name} has no single-file format; export --format diffusers")

    def finished_index(self, index: dict[str, Any]) -> dict[str, Any]:
        """Return the ``model_index.json`` of a trained model, given its base's, without parts that are not copied."""
        return index


def token_ids(count: int, length: int) -> Int[Tensor, "b tokens"]:
    """Return dummy token ids."""
    return torch.zeros(count, length, dtype=torch.int64)
