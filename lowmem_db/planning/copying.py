"""A quick copy of a model on the meta device; ``copy.deepcopy`` takes a quarter of the time that planning takes."""

from collections import OrderedDict
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from lowmem_db.engine.build import Prepared

_SHARED = (bool, int, float, str, type(None), type)


def copy_of(prepared: Prepared | None) -> Prepared | None:
    """Return what ``copy.deepcopy`` returns: no tensor, module or container is shared, and ties stay ties."""
    if prepared is None:
        return None
    memo: dict[int, Any] = {}
    return Prepared(
        modules={name: _copied(module, memo) for name, module in prepared.modules.items()},
        extra_bits={name: deepcopy(bits, memo) for name, bits in prepared.extra_bits.items()},
    )


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    if id(module) in memo:
        return memo[id(module)]
    if hasattr(type(module), "__deepcopy__"):
        return deepcopy(module, memo)
    copy = memo[id(module)] = object.__new__(type(module))
    for name, value in vars(module).items():
        copy.__dict__[name] = _copied_value(value, memo)
    return copy


def _copied_value(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, _SHARED):
        return value
    if isinstance(value, nn.Module):
        return _copied(value, memo)
    if type(value) in {dict, OrderedDict, set, list} and not value:  # most modules have a dozen empty lists of hooks
        return value.copy()
    if type(value) is dict and all(isinstance(item, nn.Module | Tensor | None) for item in value.values()):
        return {name: _copied_value(item, memo) for name, item in value.items()}
    return deepcopy(value, memo)
