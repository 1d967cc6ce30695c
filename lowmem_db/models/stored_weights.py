"""The weights of a component on disk in diffusers' layout: all names and shapes at once, tensors one by one."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowmem_db.errors import ModelError
from lowmem_db.models.files import damaged, safetensors_of
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.loading import META, check_names
from lowmem_db.models.names import current_name, published_name
from lowmem_db.models.reading import same_shape
from lowmem_db.storage.tensor_stream import dtype_of_name


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, described by the header.

    Attributes:
        file: The file.
        name: Its name there.
        shape: Its shape.
        dtype: Its type.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        """Return the tensor, memory-mapped rather than copied."""
        with safe_open(self.file, framework="pt") as weights:
            return weights.get_tensor(self.name)


def read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file from its header, without reading weights.

    Raises:
        ModelError: It is truncated, or not a safetensors file.
    """
    try:
        with safe_open(file, framework="pt") as weights:
            metadata = weights.metadata() or {}
            tensors = {}
            for name in weights.keys():  # noqa: SIM118
                part = weights.get_slice(name)
                dtype = dtype_of_name(part.get_dtype(), file)
                tensors[name] = StoredTensor(file, name, tuple(part.get_shape()), dtype)
            return tensors, metadata
    except (SafetensorError, OSError) as error:
        raise damaged(file, error) from error


def stored_weights(model: ModelFolder, component: str) -> dict[str, StoredTensor]:
    """Return the tensors of a component under their published names: all that its configuration needs, and no others.

    Raises:
        ModelError: There are no safetensors, or they do not match the component's configuration.
    """
    folder = model.folder_of(component)
    found: dict[str, StoredTensor] = {}
    for file in _files(model, component):
        found |= {_published(model, component, name): tensor for name, tensor in read_header(file)[0].items()}
    expected = expected_shapes(model, component)
    check_names(folder, missing=expected.keys() - found.keys(), unexpected=sorted(found.keys() - expected.keys()))
    for name, shape in expected.items():
        if not same_shape(found[name].shape, shape):
            raise ModelError(
                f"{folder}: {name} is {list(found[name].shape)}, but config.json needs {list(shape)}; download the "
                "model again"
            )
    return {name: found[name] for name in expected}


def weights_name(model: ModelFolder, component: str) -> str:
    """Return the name under which a component's weights are written; transformers and diffusers have their own."""
    is_of_text = model.family.component(component).role == "text_encoder"
    return "model.safetensors" if is_of_text else "diffusion_pytorch_model.safetensors"


def expected_shapes(model: ModelFolder, component: str) -> dict[str, tuple[int, ...]]:
    """Return the published names and the shapes of a component's tensors, from its configuration."""
    state = model.load(component, META).state_dict()
    return {_published(model, component, name): tuple(tensor.shape) for name, tensor in state.items()}


def _published(model: ModelFolder, component: str, name: str) -> str:
    if model.family.component(component).role == "autoencoder":
        return current_name(name)
    return published_name(component, name)


def _files(model: ModelFolder, component: str) -> list[Path]:
    folder, variant = model.folder_of(component), model.variant_of(component)
    files = safetensors_of(folder, variant)
    if not files:
        name = "" if variant is None else f" of the variant {variant}"
        raise ModelError(
            f"{folder}: has no safetensors{name}; allowed: safetensors weights in one file or in shards; check "
            "model.variant"
        )
    return files
