"""Caches the results of operators on the meta device, because a model repeats the same shapes hundreds of times.

Most of the time of a trace is spent on computing shapes. On the meta device a result depends only on the shapes,
strides and types of the arguments, so that repeated calls are answered from the cache, in every trace.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, no_type_check

import torch
from torch import Tensor

from lowmem_db.planning.costs import Row, row_of

_CANNOT = -1
_PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout}


class _New(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class _UnknownError(Exception):
    """Arguments for which results cannot be cached."""


_Result = _New | int | None  # a new tensor, the index of a returned argument, or nothing


@dataclass(slots=True)
class _Known:
    is_single: bool
    results: list[_Result]
    row: Row | None


_known: dict[tuple[Any, ...], _Known | None] = {}  # None: must run every time
_EXCLUDED = {torch.ops.aten.set_, torch.ops.aten.resize_}


@no_type_check
def run(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Row | None]:
    """Run an operator that is not a view, or take its result from the cache; also return its costs."""
    key = _key(func, args, kwargs)
    known = _known.get(key) if key is not None else None
    if known is None:
        made = func(*args, **kwargs)
        row = row_of(func, args, kwargs, made)
        if key is not None and key not in _known:
            _known[key] = _remember(args, made, row)
        return made, row
    made = [_make(result, args) for result in known.results]
    return made[0] if known.is_single else tuple(made), known.row


@no_type_check
def _key(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
    if torch.Tag.inplace_view in func.tags or func._overloadpacket in _EXCLUDED:
        return None
    try:
        return (func, _describe(args), _describe(tuple(kwargs.items())) if kwargs else None)
    except _UnknownError:
        return None


@no_type_check
def _describe(value: Any) -> Any:
    """Return what a result depends on.

    Raises:
        _UnknownError: The result depends on data.
    """
    kind = value.__class__
    if kind in _PLAIN:  # most arguments are numbers
        return (kind, value)
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise _UnknownError
        return (value.shape, value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        return tuple(map(_describe, value))
    if isinstance(value, torch.Generator):
        raise _UnknownError
    return (kind, value)


def _remember(args: tuple[Any, ...], made: Any, row: Row | None) -> _Known | None:
    is_single = isinstance(made, Tensor)
    if not is_single and not isinstance(made, tuple):
        return None
    results = [_result(value, args) for value in ((made,) if is_single else made)]
    return None if _CANNOT in results else _Known(is_single, results, row)


def _result(made: Any, args: tuple[Any, ...]) -> _Result:
    """Return a description of a result, or ``_CANNOT`` if it cannot be made again."""
    if made is None:
        return None
    if not isinstance(made, Tensor) or not made.is_meta:
        return _CANNOT
    for number, arg in enumerate(args):
        if made is arg:
            return number
    storage = made.untyped_storage()
    shared = {arg.untyped_storage()._cdata for arg in args if isinstance(arg, Tensor)}
    again = torch.empty_strided(made.shape, made.stride(), dtype=made.dtype, device="meta")
    if storage._cdata in shared or storage.nbytes() != again.untyped_storage().nbytes():
        return _CANNOT
    return _New(made.shape, made.stride(), made.dtype)


@no_type_check
def _make(result: _Result, args: tuple[Any, ...]) -> Tensor | None:
    if isinstance(result, _New):
        return torch.empty_strided(result.shape, result.stride, dtype=result.dtype, device="meta")
    return None if result is None else args[result]
