"""Prompts to draw: the paper's suites, prompt files, and the identifier and class noun in them."""

import re
from collections.abc import Sequence
from pathlib import Path

from lowmem_db.config.schema import Config
from lowmem_db.errors import DataError

SUITES_DIR = Path(__file__).parent / "suites"


def collect_prompts(
    prompts: Sequence[str],
    prompt_file: Path | None,
    suites: Sequence[str],
    *,
    identifier: str | None,
    class_noun: str | None,
    run_config: Config | None,
) -> list[str]:
    """Return prompts given one by one, those of a file, and those of suites; there may be none.

    Args:
        prompts: Prompts given one by one.
        prompt_file: A file with one prompt per line, or None.
        suites: Names of suites.
        identifier: Rare token of the subject, or None to read it from the run's prompts.
        class_noun: Class of the subject, or None to read it from the run's prompts.
        run_config: Configuration of the run, or None.

    Raises:
        DataError: A file cannot be read, or a suite needs an identifier and a class noun that are not known.
    """
    collected = list(prompts) + (read_prompt_file(prompt_file) if prompt_file is not None else [])
    if suites:
        identifier, class_noun = names_of_subject("--suite", identifier, class_noun, run_config)
        for suite in suites:
            collected += read_suite(suite, identifier=identifier, class_noun=class_noun)
    return collected


def fill_in(
    field: str, templates: Sequence[str], *, identifier: str | None, class_noun: str | None, run_config: Config | None
) -> list[str]:
    """Return templates with the identifier and the class noun in their places; without places they stay as they are.

    Args:
        field: Where the templates come from, for messages.
        templates: Prompts with ``{identifier}`` and ``{class_noun}``.
        identifier: As in :func:`collect_prompts`, as the next two.
        class_noun: Class of the subject.
        run_config: Configuration of the run.

    Raises:
        DataError: They need an identifier and a class noun that are not known, or have another name in braces.
    """
    for template in templates:
        if unknown := set(re.findall(r"\{\w*\}", template)) - {"{identifier}", "{class_noun}"}:
            raise DataError(
                f"{field}: {template!r}: {min(unknown)} stands for nothing; allowed: {{identifier}}, {{class_noun}}"
            )
    if not any(place in template for template in templates for place in ("{identifier}", "{class_noun}")):
        return list(templates)
    identifier, class_noun = names_of_subject(field, identifier, class_noun, run_config)
    filled = (each.replace("{identifier}", identifier).replace("{class_noun}", class_noun) for each in templates)
    return [" ".join(each.split()) for each in filled]


def names_of_subject(
    field: str, identifier: str | None, class_noun: str | None, run_config: Config | None
) -> tuple[str, str]:
    """Return identifier and class noun: those given, or those of the run; a learned word needs no noun.

    Raises:
        DataError: They are not known.
    """
    if run_config is not None and run_config.textual_inversion.enabled:
        identifier, class_noun = identifier or run_config.textual_inversion.token, class_noun or ""
    elif (identifier is None or class_noun is None) and run_config is not None and run_config.subject.class_prompt:
        names = subject_names(run_config.subject.instance_prompt, run_config.subject.class_prompt)
        identifier, class_noun = identifier or names[0], class_noun or names[1]
    if identifier is None or class_noun is None:
        raise DataError(f"{field}: needs the identifier and the class noun; add --identifier sks --class-noun dog")
    return identifier, class_noun


def suite_names() -> list[str]:
    """Return the names of the prompt suites."""
    return sorted(file.stem for file in SUITES_DIR.glob("*.txt"))


def read_suite(name: str, *, identifier: str, class_noun: str) -> list[str]:
    """Return the prompts of a suite for one subject.

    Args:
        name: One of :func:`suite_names`.
        identifier: The rare token, such as ``sks``.
        class_noun: The class, such as ``dog``; empty for a learned embedding, which says it all.

    Raises:
        DataError: There is no such suite.
    """
    if name not in suite_names():
        raise DataError(f"--suite: {name!r} does not exist; allowed: {', '.join(suite_names())}")
    templates = read_prompt_file(SUITES_DIR / f"{name}.txt")
    subject = f"{identifier} {class_noun}".strip()
    return [template.replace("{identifier} {class_noun}", subject) for template in templates]


def read_prompt_file(path: Path) -> list[str]:
    """Return the lines of a prompt file, except empty lines and lines that begin with ``#``.

    Raises:
        DataError: The file cannot be read or has no prompt.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error}); allowed: UTF-8, one prompt per line") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise DataError(f"{path}: has no prompt; allowed: one prompt per line")
    return prompts


def subject_names(instance_prompt: str, class_prompt: str) -> tuple[str, str]:
    """Find identifier and class noun by comparing two prompts.

    ``a photo of sks dog`` and ``a photo of dog`` give ``sks`` and ``dog``.

    Raises:
        DataError: The prompts do not differ only by words before a class noun.
    """
    instance, base = instance_prompt.split(), class_prompt.split()
    start = 0
    while start < min(len(instance), len(base)) and instance[start] == base[start]:
        start += 1
    end = 0
    while end < min(len(instance), len(base)) - start and instance[-1 - end] == base[-1 - end]:
        end += 1
    identifier, noun = instance[start : len(instance) - end], instance[len(instance) - end :]
    if start + end != len(base) or not identifier or not noun:
        raise DataError(
            f"the identifier cannot be read from {instance_prompt!r} and {class_prompt!r}; "
            "set --identifier and --class-noun"
        )
    return " ".join(identifier), " ".join(noun)
