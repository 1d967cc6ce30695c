"""Checks that apply to the value of every field, made before the checks of the fields; each gives one line."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

MAX_CHARACTERS = 1 << 16
_MAX_BITS = 4096
_MAX_NAME_BYTES = 255
_MAX_PATH_BYTES = 4095
_SHOWN_CHARACTERS = 200


def problems_of_values(tree: dict[str, Any], kind_of: Callable[[str], Any]) -> list[str]:
    """Return a line for every impossible value.

    Args:
        tree: Nested sections of values.
        kind_of: Returns the type of a field by its dotted path, or None if the field does not exist.
    """
    return [
        f"{field}: {show(value)} {problem}"
        for field, value in _leaves(tree, "")
        if (problem := _problem(value, kind_of(field)))
    ]


def show(value: object) -> str:
    """Return a value for a message, on one line of limited length."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print numbers with more than 4300 digits
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}... ({len(text)} characters)"


def _leaves(value: Any, field: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, f"{field}.{name}" if field else str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item, field)
    else:
        yield field, value


def _problem(value: Any, kind: Any) -> str | None:
    if isinstance(value, bool):
        refused = kind is not None and _holds(kind, (int, float)) and not _holds(kind, (bool, str))
        return "is not allowed: it must be a number, not true or false" if refused else None
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        return f"is not allowed: numbers can have at most {_MAX_BITS} bits"
    if not isinstance(value, str):
        return None
    return _problem_of_text(value) or (_problem_of_path(value) if kind is not None and _holds(kind, (Path,)) else None)


def _problem_of_text(text: str) -> str | None:
    if len(text) > MAX_CHARACTERS:
        return f"is not allowed: texts can have at most {MAX_CHARACTERS} characters"
    if "\0" in text:
        return "is not allowed: it contains a NUL character"
    if any("\ud800" <= sign <= "\udfff" for sign in text):
        return "is not allowed: it is not UTF-8; save or type it as UTF-8"
    return None


def _problem_of_path(text: str) -> str | None:
    too_long = len(os.fsencode(text)) > _MAX_PATH_BYTES
    if too_long or any(len(os.fsencode(name)) > _MAX_NAME_BYTES for name in Path(text).parts):
        return f"is not allowed: names can have at most {_MAX_NAME_BYTES} bytes, and whole paths {_MAX_PATH_BYTES}"
    return None


def _holds(kind: Any, types: tuple[type, ...]) -> bool:
    """Return whether a field's type, or one of its alternatives or items, is one of these."""
    if get_origin(kind) is dict:
        return False
    return kind in types or any(_holds(part, types) for part in get_args(kind))
