"""From a YAML file, ``section.key=value`` arguments and known flags to one checked configuration.

All problems are reported together, and each names its field.
"""

import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from lowmem_db.config import shipped
from lowmem_db.config.rules import refusals
from lowmem_db.config.schema import ConceptConfig, Config
from lowmem_db.config.spelling import nearest_name
from lowmem_db.config.values import problems_of_values, show
from lowmem_db.config.yaml_text import AmbiguousNumber, YamlError, parse_yaml, read_text
from lowmem_db.errors import ConfigError

Tree = dict[str, Any]
_SHOWN_CHARACTERS = 300


def load_config(path: Path | None, overrides: Sequence[tuple[str, Any]] = ()) -> Config:
    """Read, override and check a configuration.

    Args:
        path: YAML file, the name of a configuration in this package, or None if the overrides hold everything.
        overrides: Dotted field paths and their values; later ones win.

    Raises:
        ConfigError: With every problem of the configuration, one per line.
    """
    tree = _without_empty_sections(read_yaml(path)) if path is not None else {}
    problems = [problem for field, value in overrides if (problem := _set(tree, field, value))]
    config, found = _validate(tree)
    problems += found
    if config is not None:
        problems += refusals(config)
    if problems or config is None:
        raise ConfigError("\n".join(problems))
    return config


def read_yaml(path: Path) -> Tree:
    """Read a YAML file that holds a mapping.

    Raises:
        ConfigError: The file is missing, is not YAML, has a key twice, or is not a mapping.
    """
    path = shipped.find(path)
    if path.suffix.lower() in {".toml", ".ini"} and path.is_file():
        raise ConfigError(
            f"{show_path(path)}: is {path.suffix[1:].upper()}, as other programs use it; allowed: YAML. "
            "`lowmem-db configs` lists configurations, and `lowmem-db configs sd15` writes one to fill in"
        )
    try:
        tree = parse_yaml(read_text(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: the configuration file does not exist{_nearby(path)}") from None
    except (OSError, ValueError, YamlError) as error:
        raise ConfigError(f"{show_path(path)}: cannot be read as YAML: {_reason(error)}") from None
    if not isinstance(tree, dict):
        found = "is empty" if tree is None else f"holds {type(tree).__name__}"
        raise ConfigError(
            f"{path}: {found}; allowed: a mapping of sections; `lowmem-db configs demo` writes an example"
        )
    return shipped.with_photos(path, tree)


def write_yaml(config: Config, path: Path) -> None:
    """Write all fields of a resolved configuration."""
    path.write_text(to_yaml(config), encoding="utf-8")


def to_yaml(config: Config) -> str:
    """Return a resolved configuration as YAML."""
    tree = config.model_dump(mode="json")
    readable = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    if yaml.safe_load(readable) == tree:
        return readable
    return yaml.safe_dump(tree, sort_keys=False)  # an unusual line separator in a text has to be escaped


def parse_override(argument: str) -> tuple[str, Any]:
    """Split ``section.key=value``; the value is read as YAML, unless the field holds text, which is taken literally.

    YAML would cut ``a dog #1`` at its comment, and read ``yes`` as true and ``2024-11-23`` as a date.

    Raises:
        ConfigError: There is no ``=``, or a number that YAML misreads.
    """
    field, separator, text = argument.partition("=")
    if not separator or not field:
        raise ConfigError(
            f"{argument}: is not an override; allowed: section.key=value, such as training.learning_rate=2e-6"
        )
    is_text = field in {path for path, kind in _fields(Config) if _holds_text(kind)}
    if is_text and text not in {"", "null"} and text[:1] not in {'"', "'"}:
        return field, text
    try:
        value = parse_yaml(text)
    except AmbiguousNumber as error:
        if is_text:
            return field, text
        raise ConfigError(f"{field}: {error}") from error
    except YamlError:
        return field, text
    return field, text if is_text and text not in {"", "null"} and not isinstance(value, str) else value


def field_paths() -> Iterable[str]:
    """Yield the dotted path of every field of the tree."""
    return (path for path, _ in _fields(Config))


def is_section(kind: Any) -> TypeGuard[type[BaseModel]]:
    """Return whether the type of a field is a section of the tree; Python 3.10 takes ``list[str]`` for a class too."""
    return get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, BaseModel)


def _fields(section: type[BaseModel], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield the dotted path and the type of every field of the tree."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if is_section(kind):
            yield from _fields(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def _holds_text(kind: Any) -> bool:
    return kind in (str, Path) or (get_origin(kind) not in {tuple, dict} and any(map(_holds_text, get_args(kind))))


def _set(tree: Tree, field: str, value: Any) -> str | None:
    """Set a dotted path in the tree; return what is wrong, or None."""
    *sections, name = field.split(".")
    if len(sections) > 1 and sections != ["memory", "techniques"]:  # no other section is nested
        return _unknown(field)
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            return _unknown(field)
        tree = child
    tree[name] = value
    return None


def _without_empty_sections(tree: Tree) -> Tree:
    """Drop sections whose fields are all commented out; YAML reads them as null."""
    sections = {path.partition(".")[0] for path in field_paths() if "." in path}
    return {name: value for name, value in tree.items() if value is not None or name not in sections}


def _validate(tree: Tree) -> tuple[Config | None, list[str]]:
    if impossible := problems_of_values(tree, dict(_fields(Config)).get):
        return None, impossible
    empty_sections: Tree = {"model": {}, "subject": {}}
    try:
        return Config.model_validate(empty_sections | tree), []
    except ValidationError as error:
        problems: dict[str, list[dict[str, Any]]] = {}
        for problem in error.errors():
            problems.setdefault(_field_of(problem["loc"]), []).append(dict(problem))
        return None, [_describe(field, found) for field, found in problems.items()]


def _field_of(location: tuple[int | str, ...]) -> str:
    """Return the field of a problem, without the alternative types that were tried for it."""
    path = ".".join(map(str, location))
    known = set(field_paths())
    prefixes = [".".join(map(str, location[:length])) for length in range(1, len(location) + 1)]
    return next((prefix for prefix in prefixes if prefix in known), path)


def _describe(field: str, problems: list[dict[str, Any]]) -> str:
    """Say what is wrong with a field; if it has alternative types, what each of them allows."""
    problem = problems[0]
    if problem["type"] == "extra_forbidden" and field in set(field_paths()):
        allowed = ", ".join(ConceptConfig.model_fields)
        return f"{field}: {'.'.join(map(str, problem['loc']))} is an unknown field; allowed: {allowed}"
    if problem["type"] == "extra_forbidden":
        return _unknown(field)
    inner = ".".join(map(str, problem["loc"])).removeprefix(f"{field}.")
    if problem["type"] == "missing" and inner != ".".join(map(str, problem["loc"])):
        return f"{field}: {inner} is missing; add it"
    if problem["type"] == "missing":
        return f"{field}: is missing; set {field}=VALUE"
    if problem["input"] is None:
        return f"{field}: null is not allowed: it must have a value; set {field}=VALUE"
    if problem["type"] == "tuple_type":
        return (
            f"{field}: {show(problem['input'])} is not allowed: it must be a list, such as {field}=[{problem['input']}]"
        )
    said = [found["msg"].removeprefix("Value error, ") for found in problems]
    messages = dict.fromkeys(message[0].lower() + message[1:] for message in said)
    return f"{field}: {show(problem['input'])} is not allowed: {', or '.join(messages)}"


def _unknown(field: str) -> str:
    field = field if len(field) <= _SHOWN_CHARACTERS else f"{field[:_SHOWN_CHARACTERS]}..."
    known = list(field_paths())
    name = field.rpartition(".")[2]
    same_name = next((path for path in known if path.rpartition(".")[2] == name), None)
    nearest = same_name or nearest_name(field, [*Config.model_fields, *known])
    hint = f"; did you mean {nearest}?" if nearest else f"; allowed sections: {', '.join(Config.model_fields)}"
    return f"{field}: unknown field{hint}"


def show_path(path: Path) -> str:
    """Return a path for a message, shortened if it is very long."""
    text = str(path)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}... ({len(text)} characters)"


def _reason(error: OSError | ValueError | YamlError) -> str:
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split())


def _nearby(path: Path) -> str:
    """Say which configuration may be meant by a file that does not exist."""
    folder, ours = path.parent, difflib.get_close_matches(path.stem, shipped.names(), n=1)
    is_readable = folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)
    names = sorted(file.name for file in folder.iterdir() if file.suffix in {".yaml", ".yml"}) if is_readable else []
    if nearest := difflib.get_close_matches(path.name, names, n=1):
        return f"; did you mean {folder / nearest[0]}?"
    if ours and str(folder) in {".", "configs"}:
        return f"; did you mean {ours[0]}, a configuration of this package? `lowmem-db configs` lists them"
    if not folder.is_dir():
        return f"; the folder {folder} does not exist either"
    return f" in {folder.absolute()}" if is_readable else f"; the folder {folder} is not readable"
