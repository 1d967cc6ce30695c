"""A model is looked at as a whole before it is used: its configurations, and the headers of its weights."""

from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lowmem_db.config.schema import ObjectiveConfig
from lowmem_db.errors import ConfigError, ModelError
from lowmem_db.models.configurations import NONSENSE
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.loading import META
from lowmem_db.models.stored_weights import stored_weights

_Facts = tuple[tuple[str, int, int], ...]


def check_model(model: ModelFolder, *, weights: bool) -> None:
    """Build a model from its configurations without memory, and compare the headers of its safetensors with it.

    A model whose files have not changed is checked once per process.

    Args:
        model: The model.
        weights: Whether there have to be weights.

    Raises:
        ModelError: A configuration makes no sense, or a tensor is missing, superfluous or has the wrong shape.
    """
    folders = [model.folder_of(component.name) for component in model.family.components]
    files = sorted(file for folder in folders if folder.is_dir() for file in folder.iterdir() if file.is_file())
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    _check_once(_Model(model, weights), tuple(facts))


@dataclass(frozen=True)
class _Model:
    """A model as a key of the cache; single files have configurations that cannot be hashed."""

    model: ModelFolder
    weights: bool

    def __hash__(self) -> int:
        return hash((self.model.path, self.weights))


@lru_cache(maxsize=16)
def _check_once(checked: _Model, facts: _Facts) -> None:
    model = checked.model
    _check_facts(model)
    for component in model.family.with_weights:
        model.load(component, META)
        own = [file for file, _, _ in facts if Path(file).parent == model.folder_of(component)]
        if checked.weights and any(file.endswith(".safetensors") for file in own):
            stored_weights(model, component)


def _check_facts(model: ModelFolder) -> None:
    """Ask for everything that is read from configurations, so that nonsense is found now and not after training.

    Raises:
        ModelError: Something cannot be told, or is not positive.
    """
    for component in model.family.components:
        if component.role != "tokenizer":
            model.config_of(component.name)
    try:
        space = model.space
        sizes = {
            "pixels per latent pixel": space.cell,
            "latent channels": space.channels,
            "resolution": model.resolution,
            "smallest step of sizes": model.family.size_step(model),
        }
        model.family.blank_tokens(model, 1)
        with suppress(ConfigError):  # what cannot be drawn may be trained, and the other way round
            model.family.process(model, ObjectiveConfig())
    except NONSENSE as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ModelError(
            f"{model.path}: its configurations do not describe a {model.family.name} model ({reason}); get it again"
        ) from error
    for what, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ModelError(
                f"{model.path}: according to its configurations its {what} are {size!r}; download it again"
            )
