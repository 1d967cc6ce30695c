"""The weights of a component on disk in diffusers' layout, checked against its configuration."""

from pathlib import Path

from torch import nn

from lowmem_db.errors import ModelError
from lowmem_db.models.files import safetensors_of
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.loading import META, check_names
from lowmem_db.models.names import current_name, published_name, second_names
from lowmem_db.models.reading import same_shape
from lowmem_db.models.stored_tensor import StoredTensor, read_header


def stored_weights(model: ModelFolder, component: str) -> dict[str, StoredTensor]:
    """Return the tensors of a component under their published names: all that its configuration needs, and no others.

    Raises:
        ModelError: There are no safetensors, or they do not match the component's configuration.
    """
    folder = model.folder_of(component)
    whole = model.load_whole(component, META)
    expected = _shapes(model, component, whole)
    found: dict[str, StoredTensor] = {}
    for file in _files(model, component):
        found |= {_published(model, component, name): tensor for name, tensor in read_header(file)[0].items()}
    for alias, name in second_names(whole).items():  # a file may hold either of them, or both
        if (stored := found.pop(_published(model, component, alias), None)) is not None:
            found.setdefault(_published(model, component, name), stored)
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
    return _shapes(model, component, model.load_whole(component, META))


def _shapes(model: ModelFolder, component: str, whole: nn.Module) -> dict[str, tuple[int, ...]]:
    second = second_names(whole)
    state = {name: tensor for name, tensor in whole.state_dict().items() if name not in second}
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
