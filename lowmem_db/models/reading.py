"""Weights from safetensors into a module, one tensor at a time: the host holds one tensor more than the result.

``from_pretrained`` holds the file beside the module, and a conversion afterwards would hold the module twice.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lowmem_db.models.names import current_name

Convert = Callable[[str, Tensor], Tensor]
"""Takes the ``component.name`` of a parameter and its value, and returns what the module holds instead."""
_WITHOUT_VALUES = {torch.empty, torch.rand, torch.randn, torch.normal}
_TEXT_MODEL = "text_model."
_converting: list[Convert] = []


@contextmanager
def converted(convert: Convert) -> Iterator[None]:
    """Convert each parameter as it is read, inside the block; loaders that read in another way do not convert."""
    _converting.append(convert)
    try:
        yield
    finally:
        _converting.pop()


def read_module(
    make: Callable[[], Any], files: list[Path], component: str, device: torch.device, dtype: torch.dtype
) -> tuple[Any, dict[str, list[str]]]:
    """Build a module and fill it from files.

    Args:
        make: Builds the module.
        files: Its safetensors.
        component: Name of the component, for conversions.
        device: Where its tensors go.
        dtype: Type of its floating-point tensors.

    Returns:
        The module, and the names under ``missing_keys`` and ``unexpected_keys``, as ``from_pretrained`` returns them;
        under ``mismatched_keys`` are names and shapes in words. Tensors that are missing stay on the meta device.
    """
    with _WithoutValues():
        module = make()
    places = _places(module)
    missing, unexpected, mismatched = set(module.state_dict()), [], []
    for file in files:
        with ExitStack() as opened:
            names = list(opened.enter_context(safe_open(file, framework="pt")).keys())
        for stored in names:
            name = next((each for each in _possible_names(stored) if each in places), None)
            if name is None:
                unexpected.append(stored)
                continue
            value = _read(file, stored)
            parent, key = places[name]
            missing.discard(name)
            expected = getattr(parent, key).shape
            if math.prod(expected) != value.numel() or not same_shape(value.shape, expected):
                shapes = f"{list(value.shape)}, but config.json needs {list(expected)}"
                mismatched.append(f"{stored} is {shapes}")
                continue
            _put(parent, key, _as_asked(f"{component}.{name}", parent, key, value.reshape(expected), dtype), device)
    for parent, key in places.values():
        if key in parent._buffers and not getattr(parent, key).is_meta:
            _put(parent, key, getattr(parent, key), device)
    return module, {
        "missing_keys": sorted(missing),
        "unexpected_keys": unexpected,
        "mismatched_keys": mismatched,
    }


def _read(file: Path, name: str) -> Tensor:
    """Return a tensor that is mapped from its file; the mapping ends with the tensor."""
    with safe_open(file, framework="pt") as weights:
        return weights.get_tensor(name)


def _as_asked(path: str, parent: nn.Module, key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in the asked type and form, in memory of its own."""
    if not value.is_floating_point():
        return value.clone()
    if _converting and key in parent._parameters:
        return _converting[-1](path, value.to(dtype))
    return value.to(dtype, copy=True)


def _put(parent: nn.Module, key: str, value: Tensor, device: torch.device) -> None:
    if key in parent._parameters:
        parent._parameters[key] = nn.Parameter(value.to(device), requires_grad=False)
    else:
        parent._buffers[key] = value.to(device)


def _places(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return where each parameter and buffer of a module is kept, by its name."""
    return {
        f"{path}.{key}" if path else key: (parent, key)
        for path, parent in module.named_modules()
        for key in (*parent._parameters, *parent._buffers)
        if getattr(parent, key) is not None
    }


def _possible_names(stored: str) -> Iterator[str]:
    """Yield the names that a stored tensor may have in memory: libraries renamed some over the years."""
    for name in (stored, current_name(stored)):
        yield name
        yield name.removeprefix(_TEXT_MODEL)
        yield _TEXT_MODEL + name


def same_shape(one: Sequence[int], other: Sequence[int]) -> bool:
    """Return whether shapes are the same; 1x1 convolutions count as matrices, which they are in old autoencoders."""
    return _matrix(one) == _matrix(other)


def _matrix(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)


class _WithoutValues(TorchFunctionMode):
    """Builds modules whose parameters have no values; buffers, which files may lack, have theirs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _WITHOUT_VALUES:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
