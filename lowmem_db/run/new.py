"""A new run before its first command: a configuration written for photos, a base and the card at hand."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_db import nvidia
from lowmem_db.config.loading import load_config
from lowmem_db.config.recipes import Wish, check_recipe, check_words, fields_for, name_for, text_of
from lowmem_db.config.schema import Config
from lowmem_db.console import quoted
from lowmem_db.data.folder import look_into
from lowmem_db.errors import ConfigError, ModelError
from lowmem_db.storage.atomic import write_text
from lowmem_db.storage.places import place_of

if TYPE_CHECKING:
    from lowmem_db.planning.plan import Plan

RUNS = Path("runs")
"""Where runs are kept unless something else is asked for."""
_RECIPES = {"sd_v1": "sd15", "sd_v2": "sd21", "sdxl_base_v1-0": "sdxl_lora"}


def wish_and_file(
    *, photos: Path, noun: str, identifier: str, recipe: str | None, base: str | None, file: Path | None
) -> tuple[Wish, Path]:
    """Return a checked wish with what was left open filled in, and the file for it.

    Raises:
        LowmemDbError: As :func:`check_wish`; or the file exists.
    """
    check_words(noun, identifier)
    file = free_file(noun) if file is None else file
    if file.exists():
        raise ConfigError(f"--output: {file} exists and will not be overwritten; choose another file, or delete it")
    wish = Wish(
        photos=photos,
        noun=noun.strip(),
        identifier=identifier,
        recipe=recipe or recipe_here(),
        base=base,
        output_dir=RUNS / file.stem,
    )
    check_wish(wish)
    if recipe is None and base is not None:
        wish = replace(wish, recipe=recipe_for(base))
    return wish, file


def check_wish(wish: Wish) -> None:
    """Check what a new configuration is for, without slow imports.

    Raises:
        ConfigError: A word or the recipe cannot be used.
        DataError: The folder does not exist, or holds no photo.
        ModelError: The base does not exist.
    """
    check_words(wish.noun, wish.identifier)
    check_recipe(wish.recipe)
    look_into(wish.photos, "PHOTOS")
    if wish.base is not None:
        place_of(wish.base)


def free_file(noun: str, folder: Path = Path(), runs: Path = RUNS) -> Path:
    """Return the first of ``dog.yaml``, ``dog2.yaml``, ... that neither exists nor has a run."""
    name = name_for(noun)
    for number in _numbers():
        file = folder / f"{name}{number}.yaml"
        if not file.exists() and not (runs / file.stem).exists():
            return file
    raise AssertionError("numbers never end")


def recipe_here() -> str:
    """Return the recipe for this machine, found without torch: a card trains Stable Diffusion, a CPU the demo model."""
    has_card = bool(nvidia.installed_cards()) and not nvidia.are_hidden()
    return "sd15" if has_card else "demo"


def recipe_for(base: str) -> str:
    """Return the recipe for a model, found by its family.

    Raises:
        ModelError: There is no such model, or no recipe for its family.
    """
    from lowmem_db.models.finding import find_model

    if base == "demo":
        return "demo"
    family = find_model(base, weights=False).family
    if family.kohya_version not in _RECIPES:
        raise ModelError(
            f"--base: {base} is {family.name}, for which there is no recipe; `lowmem-db configs` "
            "lists configurations to copy: demo_cascade for the small pixel model, those that begin with if_ for others"
        )
    return _RECIPES[family.kohya_version]


def config_for(wish: Wish) -> Config:
    """Return the checked configuration of a wish.

    Raises:
        ConfigError: A field of it is refused.
    """
    return load_config(None, list(_flat(fields_for(wish))))


def write_new(wish: Wish, file: Path, plan: "Plan") -> None:
    """Write a configuration with what the planner says of it.

    Raises:
        StorageError: It cannot be written.
    """
    write_text(file, text_of(fields_for(wish), [*_header(wish, file), *answer_of(plan)]))


def answer_of(plan: "Plan") -> list[str]:
    """Return what the planner says of a run: card, strategy, memory, time, disk."""
    from lowmem_db.config.strategy import describe
    from lowmem_db.planning.output import disk_in_words, time_in_words
    from lowmem_db.planning.plan import gib

    return [
        f"Plan for {plan.device}: {gib(plan.peak_bytes)} of {gib(plan.budget_bytes)}; {describe(plan.config)}",
        time_in_words(plan),
        disk_in_words(plan),
    ]


def _header(wish: Wish, file: Path) -> list[str]:
    count = len(look_into(wish.photos, "PHOTOS").photos)
    photos = "1 photo" if count == 1 else f"{count} photos"
    return [
        f"{wish.noun}, {photos}; made from `lowmem-db configs {wish.recipe}`, all fields: docs/configuration.md",
        f"Train: lowmem-db train {quoted(file)}",
    ]


def _numbers() -> Iterator[str]:
    yield ""
    number = 2
    while True:
        yield str(number)
        number += 1


def _flat(tree: dict[str, object]) -> Iterator[tuple[str, object]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", each) for inner, each in value.items())
        else:
            yield name, value
