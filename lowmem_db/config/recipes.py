"""A configuration for a new subject, made from one in this package: at most 25 lines, each with a reason.

The configurations in this package name their subject "sks dog"; a recipe puts another in its place.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lowmem_db.config import shipped
from lowmem_db.config.loading import Tree
from lowmem_db.config.spelling import nearest_name
from lowmem_db.config.yaml_text import parse_yaml, read_text
from lowmem_db.errors import ConfigError

RECIPES = ("demo", "sd15", "sd15_lora", "sd15_textual_inversion", "sd21", "sdxl", "sdxl_unet", "sdxl_lora")
"""Configurations that leave the choice of a strategy to the planner, and what it trains to their name."""
IDENTIFIER = "sks"
"""The rare word of the configurations in this package."""
MAX_LINES = 25
_NOUN = "dog"
_SMALL_WORDS = {"a", "an", "at", "in", "on", "the"}
_WIDTH = 100
_WORD = re.compile(r"[^\W_][\w-]*", re.UNICODE)
_COMMENTS = {
    "subject": "A text file beside a photo replaces instance_prompt for it. What class_prompt draws stays as it is.",
    "training": "Samples that all look like one photo want fewer steps; samples without the subject, more.",
    "sampling": "Drawn with every checkpoint.",
}


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a new configuration is for.

    Attributes:
        photos: Folder of the photos.
        noun: What they show: ``dog``, ``teapot``.
        identifier: The rare word that names the subject.
        recipe: The configuration in this package to start from, one of :data:`RECIPES`.
        base: A model in place of that of the recipe, or None.
        output_dir: The run folder.
    """

    photos: Path
    noun: str
    identifier: str = IDENTIFIER
    recipe: str = "sd15"
    base: str | None = None
    output_dir: Path


def check_recipe(name: str) -> str:
    """Return the name of a recipe.

    Raises:
        ConfigError: There is none of this name.
    """
    if name in RECIPES:
        return name
    near = nearest_name(name, RECIPES)
    raise ConfigError(
        f"--config: {name!r} is not one to start from; {f'did you mean {near}? ' if near else ''}"
        f"allowed: {', '.join(RECIPES)}"
    )


def check_words(noun: str, identifier: str) -> None:
    """Check what the subject is, and its rare word.

    Raises:
        ConfigError: One of them is empty, or the identifier is not one word.
    """
    if not noun.strip() or "\n" in noun:
        raise ConfigError(f"--what: {noun!r} names nothing; allowed: what the photos show, such as dog or red teapot")
    if _WORD.fullmatch(identifier) is None:
        raise ConfigError(
            f"--identifier: {identifier!r} is not one word; allowed: a rare one such as {IDENTIFIER}; "
            "`lowmem-db identifiers` lists some"
        )


def name_for(noun: str) -> str:
    """Return what a subject means as the name of a file: letters, digits and hyphens."""
    return re.sub(r"[\W_]+", "-", noun.strip().lower()).strip("-")[:40] or "subject"


def fields_for(wish: Wish) -> Tree:
    """Return the fields of a new configuration."""
    tree = parse_yaml(read_text(shipped.CONFIGS / f"{wish.recipe}.yaml"))
    tree.pop("cache_dir", None)
    tree["output_dir"] = wish.output_dir.as_posix()
    if wish.base is not None:
        tree["model"] = {"base": wish.base}
    subject = tree["subject"]
    prompt, class_prompt = _named(subject["instance_prompt"], wish), _named(subject["class_prompt"], wish)
    tree["subject"] = {
        "instance_dir": str(wish.photos),
        "instance_prompt": prompt,
        "class_prompt": class_prompt,
    }
    prior = tree.get("prior", {})
    if "class_prompts" in prior:
        prior["class_prompts"] = [_named(each, wish) for each in prior["class_prompts"] if _may_stay(each, wish)]
    if "textual_inversion" in tree:
        tree["textual_inversion"] |= {"initializer": wish.noun.split()[-1]}
    tree["sampling"] |= {"prompts": [prompt, f"{prompt} on the beach" if wish.recipe != "demo" else class_prompt]}
    return tree


def text_of(fields: Tree, header: list[str]) -> str:
    """Return a configuration as text, with one line for each section where it fits.

    Args:
        fields: Its fields.
        header: Lines of the comment at its top.
    """
    lines = [f"# {line}" for line in header]
    for name, value in fields.items():
        if name in _COMMENTS:
            lines.append(f"# {_COMMENTS[name]}")
        lines += _dump(name, value).splitlines()
    return "\n".join(lines) + "\n"


def _dump(name: str, value: Any) -> str:
    """Return a field or a section; only the section of the subject has a line for each field."""
    if name == "subject" or not isinstance(value, dict):
        return yaml.safe_dump({name: value}, sort_keys=False, width=_WIDTH, allow_unicode=True)
    section = yaml.safe_dump(value, sort_keys=False, default_flow_style=True, width=_WIDTH, allow_unicode=True)
    return f"{name}: {section}"


def _named(prompt: str, wish: Wish) -> str:
    """Return a prompt of a configuration in this package for another subject."""
    words = [{IDENTIFIER: wish.identifier, _NOUN: wish.noun}.get(word, word) for word in prompt.split()]
    return " ".join(words)


def _may_stay(prompt: str, wish: Wish) -> bool:
    """Return whether a prompt of further class images is of the class itself, or of a noun that has nothing of it."""
    return _NOUN in prompt.split() or not {*wish.noun.lower().split()} & ({*prompt.split()} - _SMALL_WORDS)
