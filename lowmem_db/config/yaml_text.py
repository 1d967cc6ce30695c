"""YAML for configurations: limited in size, depth and aliases, with words as keys and without ambiguous numbers.

YAML 1.1 reads ``010`` as 8 and ``1:30`` as 90, which nobody who writes them means. Keys are taken literally, so that
``on`` and ``3`` are words too.
"""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 18
MAX_DEPTH = 20
MAX_VALUES = 10_000

_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


class YamlError(Exception):
    """What is wrong with a YAML text, in one line."""


class AmbiguousNumber(YamlError):
    """A number that YAML and people read differently."""


def read_text(path: Path) -> str:
    """Read a text file that is small enough to be a configuration.

    Raises:
        YamlError: It is not a regular file, too large, or not UTF-8.
        OSError: It cannot be read.
    """
    if (path / "config.yaml").is_file():
        raise YamlError(f"it is a folder; allowed: a YAML file, such as {path / 'config.yaml'}")
    if path.is_dir():
        raise YamlError("it is a folder; allowed: a YAML file")
    if path.exists() and not path.is_file():
        raise YamlError("it is neither a file nor a folder; write the configuration to a file")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise YamlError(f"it has more than {MAX_BYTES} bytes; a configuration has a few thousand")
    if encoding := _BYTE_ORDER_MARKS.get(content[:2]):
        raise YamlError(f"it is {encoding}; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise YamlError(f"byte {error.start} is not UTF-8; save it as UTF-8") from error


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        YamlError: It is not YAML, too large or too deep, has a key twice, or has a key that is not a word.
        AmbiguousNumber: It has a number that YAML misreads.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, set())
        return loader.construct_document(node)
    except RecursionError:
        raise YamlError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    except (yaml.YAMLError, ValueError) as error:
        raise YamlError(_in_a_line(error, text)) from error


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = self._values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._level, self._values = self._level + 1, self._values + 1
        if self._level > MAX_DEPTH:
            raise YamlError(f"it is nested deeper than {MAX_DEPTH} levels")
        if self._values > MAX_VALUES:
            raise YamlError(f"it holds more than {MAX_VALUES} values")
        node = super().compose_node(parent, index)
        self._level -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise YamlError(f"line {line} has a {key.id} as a key; allowed: a word")
            if key.value in seen:
                raise YamlError(f"{key.value} appears twice, in line {seen[key.value]} and in line {line}")
            seen[key.value] = line
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return _unambiguous(node, super().construct_yaml_int(node))

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        return _unambiguous(node, super().construct_yaml_float(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def _unambiguous(node: yaml.ScalarNode, value: Any) -> Any:
    if ":" not in node.value and not _OCTAL.fullmatch(node.value):
        return value
    raise AmbiguousNumber(
        f"YAML reads {node.value} in line {node.start_mark.line + 1} as {value}; write that number, or quote it if it "
        f"is a text: '{node.value}'"
    )


def _count(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """Return how many values a node expands to, including its aliases.

    Raises:
        YamlError: There are too many, or infinitely many.
    """
    if id(node) in above:
        raise YamlError(f"line {node.start_mark.line + 1} contains an alias of itself")
    if id(node) not in known:
        below = above | {id(node)}
        children = _children(node)
        known[id(node)] = 1 + sum(_count(child, known, below) for child in children)
    if known[id(node)] > MAX_VALUES:
        raise YamlError(f"its aliases expand to more than {MAX_VALUES} values")
    return known[id(node)]


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _in_a_line(error: Exception, text: str) -> str:
    said = " ".join(str(error).split())
    hint = "escape" in said and "\\" in text
    return said + "; in double quotes \\ starts an escape: use single quotes, or / in paths" * hint
