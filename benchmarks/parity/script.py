"""diffusers' script as a module, on machines without torchvision too, of which it needs a few transforms."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def load_script(path: Path) -> ModuleType:
    """Import the script; its check of diffusers' version is left out."""
    import diffusers  # noqa: F401  before anything stands in for torchvision
    import transformers  # noqa: F401

    specification = importlib.util.spec_from_file_location("train_dreambooth", path)
    if specification is None or specification.loader is None or not path.is_file():
        raise SystemExit(f"--diffusers: {path} is not the script; allowed: a clone of diffusers, or the script itself")
    module = importlib.util.module_from_spec(specification)
    with patch("diffusers.utils.check_min_version", lambda version: None), _torchvision():
        specification.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _torchvision() -> Iterator[None]:
    """Let a stand-in be found where there is none; what is imported meanwhile stays imported."""
    if importlib.util.find_spec("torchvision"):
        yield
        return
    sys.modules["torchvision"] = _stand_in()
    try:
        yield
    finally:
        del sys.modules["torchvision"]


def _stand_in() -> ModuleType:
    """Return what serves for square pictures that already have the right size."""
    module = ModuleType("torchvision")
    module.transforms = SimpleNamespace(  # type: ignore[attr-defined]
        Compose=_compose,
        Resize=_unchanged,
        CenterCrop=_unchanged,
        RandomCrop=_unchanged,
        ToTensor=lambda: _to_tensor,
        Normalize=lambda mean, std: lambda picture: (picture - mean[0]) / std[0],
        InterpolationMode=SimpleNamespace(BILINEAR="bilinear"),
    )
    return module


def _compose(steps: list[Callable]) -> Callable:
    def apply(picture: Image.Image | Tensor) -> Image.Image | Tensor:
        for step in steps:
            picture = step(picture)
        return picture

    return apply


def _unchanged(size: int, **options: object) -> Callable[[Image.Image], Image.Image]:
    del options

    def check(picture: Image.Image) -> Image.Image:
        if picture.size != (size, size):
            raise SystemExit(f"pictures of {picture.size} pixels need torchvision: pip install torchvision")
        return picture

    return check


def _to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
