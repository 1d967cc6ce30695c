"""From a YAML file, ``section.key=value`` arguments and known flags to one checked configuration.

Every problem is found before the first one is reported, and each names its field.
"""

import difflib
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from lowmem_db.config.rules import refusals
from lowmem_db.config.schema import Config
from lowmem_db.errors import ConfigError

Tree = dict[str, Any]


def load_config(path: Path | None, overrides: Sequence[tuple[str, Any]] = ()) -> Config:
    """Read, override and check a configuration.

    Args:
        path: YAML file, or None where the overrides say everything.
        overrides: Dotted field paths and their values, the later ones winning.

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


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping; YAML would let the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return the mapping of a node."""
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise yaml.YAMLError(f"{key.value} stands twice, in line {seen[key.value]} and in line {line}")
            seen[key.value] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Tree:
    """Read a YAML file that holds a mapping.

    Raises:
        ConfigError: The file is missing, is no YAML, names a key twice, or is no mapping.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such configuration file{_nearby(path)}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: holds {type(tree).__name__}; allowed: a mapping of sections, as in configs/demo.yaml"
        )
    return {str(name): value for name, value in tree.items()}


def write_yaml(config: Config, path: Path) -> None:
    """Write a resolved configuration, every field of it."""
    path.write_text(to_yaml(config), encoding="utf-8")


def to_yaml(config: Config) -> str:
    """Return a resolved configuration as YAML."""
    tree = config.model_dump(mode="json")
    readable = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    if yaml.safe_load(readable) == tree:
        return readable
    return yaml.safe_dump(tree, sort_keys=False)  # a rare line separator in a text has to be escaped


def parse_override(argument: str) -> tuple[str, Any]:
    """Split ``section.key=value``; the value is read as YAML, but for a text, which is taken as it is.

    YAML would cut ``a dog #1`` at its comment, and read ``yes`` as true and ``2024-11-23`` as a date.

    Raises:
        ConfigError: There is no ``=``.
    """
    field, separator, text = argument.partition("=")
    if not separator or not field:
        raise ConfigError(
            f"{argument}: is no override; allowed: section.key=value, for instance training.learning_rate=2e-6"
        )
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: a date that does not exist
        return field, text
    is_quoted = text[:1] in {'"', "'"} and isinstance(value, str)
    is_text = field in {path for path, kind in _fields(Config) if _holds_text(kind)}
    return field, text if is_text and text not in {"", "null"} and not is_quoted else value


def field_paths() -> Iterable[str]:
    """Yield the dotted path of every field of the tree."""
    return (path for path, _ in _fields(Config))


def _fields(section: type[BaseModel], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield the dotted path and the type of every field of the tree."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _fields(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def _holds_text(kind: Any) -> bool:
    return kind in (str, Path) or (get_origin(kind) not in {tuple, dict} and any(map(_holds_text, get_args(kind))))


def _set(tree: Tree, field: str, value: Any) -> str | None:
    """Set a dotted path in the tree; return what is wrong, or None."""
    *sections, name = field.split(".")
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            return _unknown(field)
        tree = child
    tree[name] = value
    return None


def _without_empty_sections(tree: Tree) -> Tree:
    """Leave out sections whose fields are all commented out: YAML reads them as null."""
    sections = {path.partition(".")[0] for path in field_paths() if "." in path}
    return {name: value for name, value in tree.items() if value is not None or name not in sections}


def _validate(tree: Tree) -> tuple[Config | None, list[str]]:
    empty_sections: Tree = {"model": {}, "subject": {}}
    try:
        return Config.model_validate(empty_sections | tree), []
    except ValidationError as error:
        problems: dict[str, list[dict[str, Any]]] = {}
        for problem in error.errors():
            problems.setdefault(_field_of(problem["loc"]), []).append(dict(problem))
        return None, [_describe(field, found) for field, found in problems.items()]


def _field_of(location: tuple[int | str, ...]) -> str:
    """Return the field of a problem, without the kinds of value that were tried for it."""
    path = ".".join(map(str, location))
    known = set(field_paths())
    prefixes = [".".join(map(str, location[:length])) for length in range(1, len(location) + 1)]
    return next((prefix for prefix in prefixes if prefix in known), path)


def _describe(field: str, problems: list[dict[str, Any]]) -> str:
    """Say what is wrong with a field; where it takes several kinds of value, what each of them allows."""
    problem = problems[0]
    if problem["type"] == "extra_forbidden":
        return _unknown(field)
    if problem["type"] == "missing":
        return f"{field}: is missing; set {field}=VALUE"
    said = [each["msg"].removeprefix("Value error, ") for each in problems]
    messages = dict.fromkeys(message[0].lower() + message[1:] for message in said)
    return f"{field}: {problem['input']!r} is not allowed: {', or '.join(messages)}"


def _unknown(field: str) -> str:
    known = list(field_paths())
    name = field.rpartition(".")[2]
    same_name = [path for path in known if path.rpartition(".")[2] == name]
    nearest = same_name or difflib.get_close_matches(field, [*Config.model_fields, *known], n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else f"; allowed sections: {', '.join(Config.model_fields)}"
    return f"{field}: there is no such field{hint}"


def _nearby(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; the folder {path.parent} is missing too"
    names = sorted(file.name for file in path.parent.iterdir() if file.suffix in {".yaml", ".yml"})
    nearest = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / nearest[0]}?" if nearest else f" in {path.parent.absolute()}"
