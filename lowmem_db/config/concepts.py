"""The subjects of a run from a JSON file, as ``--concepts_list`` of scripts for several subjects reads it."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lowmem_db.config.loading import show_path
from lowmem_db.config.spelling import nearest_name
from lowmem_db.config.yaml_text import YamlError, read_text
from lowmem_db.errors import ConfigError

Concept = dict[str, str]

_FIELDS = {
    "instance_data_dir": "instance_dir",
    "instance_prompt": "instance_prompt",
    "class_prompt": "class_prompt",
    "class_data_dir": "class_dir",
}
_REQUIRED = ("instance_data_dir", "instance_prompt")
_OF_A_CLASS = ("class_prompt", "class_data_dir")
_OF_SAMPLES = (
    "validation_prompt", "validation_negative_prompt", "validation_guidance_scale", "validation_number_images",
    "validation_inference_steps", "save_sample_prompt", "save_sample_negative_prompt", "save_sample_template",
    "n_save_sample", "sample_seed", "save_guidance_scale", "save_infer_steps",
)  # fmt: skip
_REFUSED = {
    "num_class_images": "every class has the same number: --num_class_images",
    "num_class_images_per": "every class has the same number: --num_class_images",
    "class_guidance_scale": "it is the same for every class: prior.guidance_scale=7.5",
    "class_infer_steps": "it is the same for every class: prior.num_inference_steps=50",
}
_ONE_CONCEPT = '[{"instance_data_dir": "photos/dog", "instance_prompt": "a sks dog"}]'
REPLACED_FLAGS = tuple(_FIELDS)
"""Flags for a single subject, which the file holds for each."""


def read_concepts(file: Path, *, has_prior: bool | None) -> tuple[list[Concept], list[str]]:
    """Return the subjects in a file, with the names of :class:`ConceptConfig`, and remarks about keys without effect.

    Folders in the file are relative to the working folder, as in the scripts that read it.

    Args:
        file: The JSON file.
        has_prior: Whether there is prior preservation, so that each subject needs a class and otherwise has none.
            None if it is not known yet.

    Raises:
        ConfigError: With every problem of the file, one per line.
    """
    entries = _read_list(file)
    problems = [
        f"--concepts_list: {show_path(file)}: entry {number}: {problem}"
        for number, entry in enumerate(entries, 1)
        for problem in [*_problems(entry, needs_class=bool(has_prior)), *_repetitions(entries[: number - 1], entry)]
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    keys = [key for key in _FIELDS if key not in _OF_A_CLASS or has_prior is not False]
    concepts = [{_FIELDS[key]: entry[key] for key in keys if entry.get(key)} for entry in entries]
    return concepts, _remarks({key for entry in entries for key in entry}, has_prior)


def fields_of(concepts: Sequence[Concept]) -> list[tuple[str, Any]]:
    """Return the fields that hold these subjects, and their values."""
    first, *others = concepts
    of_first = [("prior" if name == "class_dir" else "subject", name, value) for name, value in first.items()]
    return [*((f"{section}.{name}", value) for section, name, value in of_first), ("subject.concepts", others)]


def _read_list(file: Path) -> list[Any]:
    try:
        entries = json.loads(read_text(file), object_pairs_hook=_without_repetition)
    except (OSError, ValueError, YamlError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"--concepts_list: {show_path(file)}: cannot be read as JSON: {reason}") from None
    if not isinstance(entries, list) or not entries:
        found = f"holds {type(entries).__name__}" if entries else "is empty"
        raise ConfigError(f"--concepts_list: {show_path(file)}: {found}; allowed: a list, such as {_ONE_CONCEPT}")
    return entries


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} appears twice in an entry; remove one")
    return dict(pairs)


def _remarks(keys: Collection[str], has_prior: bool | None) -> list[str]:
    of_classes = [key for key in _OF_A_CLASS if key in keys and has_prior is False]
    of_samples = [key for key in _OF_SAMPLES if key in keys]
    reasons = {
        "no effect without --with_prior_preservation": of_classes,
        "no effect; samples are those of the run: --validation_prompt": of_samples,
    }
    return [f"--concepts_list: {', '.join(named)}: {reason}" for reason, named in reasons.items() if named]


def _repetitions(earlier: Sequence[Any], entry: Any) -> list[str]:
    prompt = entry.get("instance_prompt") if isinstance(entry, dict) else None
    same = [
        n for n, other in enumerate(earlier, 1) if isinstance(other, dict) and other.get("instance_prompt") == prompt
    ]
    if not prompt or not same:
        return []
    return [
        f"instance_prompt: {prompt!r} is that of entry {same[0]} too, so the model could not tell them apart; give "
        "each subject an identifier of its own"
    ]


def _problems(entry: Any, *, needs_class: bool) -> list[str]:
    if not isinstance(entry, dict):
        return [f"holds {type(entry).__name__}; allowed: a mapping, such as {_ONE_CONCEPT[1:-1]}"]
    problems = [f"{key} is missing; add it" for key in _REQUIRED if entry.get(key) in (None, "")]
    if needs_class and not entry.get("class_prompt"):
        problems.append("class_prompt is missing; add it, or leave --with_prior_preservation out")
    for key, value in entry.items():
        if key in _REFUSED:
            problems.append(f"{key} is not supported; {_REFUSED[key]}")
        elif key not in _FIELDS and key not in _OF_SAMPLES:
            nearest = nearest_name(key, _FIELDS)
            hint = f"did you mean {nearest}?" if nearest else f"allowed: {', '.join(_FIELDS)}"
            problems.append(f"{key} is an unknown key; {hint}")
        elif key in _FIELDS and not (value is None or isinstance(value, str)):
            problems.append(f"{key}: {value!r} is not allowed: it must be a text")
    return problems
