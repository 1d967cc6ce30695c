"""The families of models that can be trained, and how to add one."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from lowmem_db.errors import ModelError
from lowmem_db.models.configurations import NONSENSE
from lowmem_db.models.families.base import Component, Family
from lowmem_db.models.families.deepfloyd_if import IF_STAGE_1, IF_SUPER_RESOLUTION
from lowmem_db.models.families.stable_diffusion import SD_1, SD_2, SD_OF_ANY_WIDTH
from lowmem_db.models.families.stable_diffusion_xl import SD_XL, SD_XL_OF_ANY_WIDTH
from lowmem_db.models.files import ModelFiles

__all__ = ["FAMILIES", "Component", "Family", "families_of", "find_family", "find_lora_prefixes", "register"]

FAMILIES: list[Family] = [SD_1, SD_2, SD_XL, SD_OF_ANY_WIDTH, SD_XL_OF_ANY_WIDTH, IF_STAGE_1, IF_SUPER_RESOLUTION]
"""All families; a model belongs to the first one that recognises it."""


@contextmanager
def register(family: Family) -> Iterator[Family]:
    """Return a context in which a family is registered, ahead of all others."""
    FAMILIES.insert(0, family)
    try:
        yield family
    finally:
        FAMILIES.remove(family)


def families_of(files: ModelFiles) -> list[Family]:
    """Return the families that a model can belong to, by the class of its pipeline if it names one.

    Raises:
        ModelError: There is no such family.
    """
    if not (files.path / "model_index.json").is_file():
        return FAMILIES
    pipeline = files.index.get("_class_name")
    found = [family for family in FAMILIES if pipeline in family.pipelines]
    if not found:
        allowed = dict.fromkeys(name for family in FAMILIES for name in family.pipelines)
        raise ModelError(f"is a {pipeline}; allowed: {', '.join(allowed)}")
    return found


def find_family(files: ModelFiles) -> Family:
    """Return the family of a model in diffusers' layout; its configurations are enough.

    Raises:
        ModelError: There is no such family.
    """
    try:
        found = next((family for family in families_of(files) if family.recognises(files)), None)
    except NONSENSE as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ModelError(f"{files.path}: its configurations make no sense ({reason}); download it again") from error
    if found is None:
        allowed = ", ".join(family.name for family in FAMILIES)
        raise ModelError(f"{files.path}: its family is not supported; allowed: {allowed}")
    return found


def find_lora_prefixes(components: Iterable[str]) -> Mapping[str, str]:
    """Return the prefixes that kohya's scripts use for the adapters of some components.

    Raises:
        ModelError: They have none for one of them.
    """
    names = set(components)
    for family in FAMILIES:
        if names <= family.lora_prefixes.keys():
            return family.lora_prefixes
    raise ModelError(f"kohya's layout has no names for adapters of {', '.join(sorted(names))}; use lora-diffusers")
