"""What a family of models answers: everything that this program asks about one, and nothing else knows.

A family is added by a subclass of :class:`Family`, see docs/adding_a_family.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lowmem_db.config.schema import ObjectiveConfig
from lowmem_db.config.schema import Sampler as SamplerName
from lowmem_db.errors import ModelError
from lowmem_db.models.families.blocks import Block
from lowmem_db.models.families.original_layout import Layout
from lowmem_db.models.families.spaces import Space
from lowmem_db.models.files import ModelFiles
from lowmem_db.objective.process import NoiseProcess
from lowmem_db.records import Conditioning

Role = Literal["denoiser", "text_encoder", "tokenizer", "autoencoder", "scheduler"]
Load = Callable[[ModelFiles, str, torch.device, torch.dtype], Any]
Tensors = Mapping[str, Tensor]
"""Named tensors, each with a row for each sample."""


@runtime_checkable
class Sampler(Protocol):
    """What diffusers' schedulers have in common."""

    timesteps: Tensor

    def set_timesteps(self, num_inference_steps: int, *, device: Any) -> None:
        """Choose the timesteps."""
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
        load: Loads it, given the model's files, its name, a device and a type; on the meta device from its
            configuration alone. None: it has a configuration only.
    """

    name: str
    role: Role
    load: Load | None = None

    @property
    def has_weights(self) -> bool:
        """Whether there are weights in the folder."""
        return self.role in {"denoiser", "text_encoder", "autoencoder"}


class Family:
    """A kind of model that can be trained.

    Attributes:
        name: As it is shown.
        components: Its components; keys of caches depend on their order.
        pipelines: Classes of pipelines in ``model_index.json`` that hold such a model.
        hub_ids: Models on the hub whose configurations are in this package, each with their folder.
        lora_prefixes: What kohya's scripts call adapters of each component; empty: they know no such model.
        kohya_version: What kohya's scripts call such a model; None: they do not.
        layout: Layout of its published single files, or None.
    """

    name: str
    components: tuple[Component, ...]
    pipelines: tuple[str, ...]
    hub_ids: Mapping[str, str] = {}
    lora_prefixes: Mapping[str, str] = {}
    kohya_version: str | None = None
    layout: Layout | None = None

    def recognises(self, files: ModelFiles) -> bool:
        """Say whether a folder that holds one of :attr:`pipelines` holds a model of this family."""
        raise NotImplementedError

    def recognises_file(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Say whether a single file whose tensors have some names and shapes holds a model of this family."""
        del shapes
        return False

    def recognises_lora(self, state: Tensors) -> bool:
        """Say whether adapters are those of a model of this family."""
        del state
        return False

    def names_of(self, *roles: Role) -> tuple[str, ...]:
        """Return the names of the components that have some role, in their order."""
        return tuple(component.name for component in self.components if component.role in roles)

    def component(self, name: str) -> Component:
        """Return a component by its name."""
        return next(component for component in self.components if component.name == name)

    @property
    def denoiser(self) -> str:
        """Name of the component that predicts."""
        return self.names_of("denoiser")[0]

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Names of the components that read prompts."""
        return self.names_of("text_encoder")

    @property
    def with_weights(self) -> tuple[str, ...]:
        """Names of the components that have weights."""
        return tuple(component.name for component in self.components if component.has_weights)

    # What it is told.

    def tokenize(self, files: ModelFiles, prompts: Sequence[str]) -> Tensors:
        """Return what tokenizers make of prompts: ids, and masks where the model looks at them."""
        raise NotImplementedError

    def encode(self, text_encoders: Mapping[str, nn.Module], tokens: Tensors) -> Tensors:
        """Return what text encoders make of tokens."""
        raise NotImplementedError

    def zeroes_empty_prompt(self, files: ModelFiles) -> bool:
        """Say whether the embeddings of the empty prompt are zeros."""
        del files
        return False

    def describe_pictures(self, facts: Float[Tensor, "b 6"]) -> Tensors:
        """Return what the denoiser is told about pictures.

        Args:
            facts: Original height and width, top and left of the crop, height and width of the crop, in pixels.
        """
        del facts
        return {}

    def blank_tokens(self, files: ModelFiles, count: int) -> Tensors:
        """Return tokens of any prompts on the host, known from configurations alone."""
        raise NotImplementedError

    def blank_embeds(self, files: ModelFiles, count: int, device: torch.device, dtype: torch.dtype) -> Tensors:
        """Return embeddings of the shapes that :meth:`encode` returns, known from configurations alone."""
        raise NotImplementedError

    # Where it works, and what it predicts there.

    def space(self, files: ModelFiles) -> Space:
        """Return the space of its pictures: latents or pixels."""
        raise NotImplementedError

    def resolution(self, files: ModelFiles) -> int:
        """Return the pixels of a side that it draws best."""
        return self.space(files).cell * files.config_of(self.denoiser)["sample_size"]

    def size_step(self, files: ModelFiles) -> int:
        """Return the pixels that heights and widths of pictures have to be multiples of."""
        return self.space(files).cell

    def predict(
        self, denoiser: nn.Module, noisy: Float[Tensor, "b c h w"], timesteps: Tensor, conditioning: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        """Return what the denoiser predicts.

        Where it predicts a variance too, that is left out.

        Args:
            denoiser: The denoiser.
            noisy: Noisy pictures or latents, in the type of its weights.
            timesteps: One for each sample, or one for all.
            conditioning: Has embeddings on the device in the type of the weights, and what is told about the pictures.
        """
        raise NotImplementedError

    def process(self, files: ModelFiles, objective: ObjectiveConfig) -> NoiseProcess:
        """Return the noise process the model was trained with.

        Args:
            files: The model.
            objective: What a run changes about it.

        Raises:
            ConfigError: There is no such process for the model.
        """
        raise NotImplementedError

    def sampler(self, files: ModelFiles, name: SamplerName, objective: ObjectiveConfig | None = None) -> Sampler:
        """Return a new sampler for the noise process of the model.

        Args:
            files: The model.
            name: ``ddpm`` (ancestral, arXiv:2006.11239), ``ddim`` (arXiv:2010.02502; on the straight lines of a flow
                that is Euler's method), ``dpm_solver`` (arXiv:2211.01095).
            objective: What a run has changed about the process; None: nothing.

        Raises:
            ConfigError: There is no such sampler for the family.
        """
        raise NotImplementedError

    # How it saves memory.

    def blocks(self, modules: Mapping[str, nn.Module]) -> dict[str, Block]:
        """Return the blocks whose checkpoints have a placement of their own, in the order of the forward pass.

        Args:
            modules: What trains, by component; a block's name begins with that of its component.
        """
        raise NotImplementedError

    # What else holds it.

    def layout_of(self, files: ModelFiles) -> Layout:
        """Return the layout of a single file for a model.

        Raises:
            ModelError: There is none.
        """
        raise ModelError(f"{files.path}: there are no single files of {self.name}; export --format diffusers")

    def finished_index(self, index: dict[str, Any]) -> dict[str, Any]:
        """Return ``model_index.json`` of a trained model from that of its base, without what was not copied."""
        return index


def token_ids(count: int, length: int) -> Int[Tensor, "b tokens"]:
    """Return ids of any tokens."""
    return torch.zeros(count, length, dtype=torch.int64)
