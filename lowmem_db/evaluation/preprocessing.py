"""Preparing pictures for an encoder as the ``preprocessor_config.json`` in its folder says.

transformers' own image processors are not used: their default needs torchvision.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lowmem_db.errors import ModelError

_FILE = "preprocessor_config.json"
_FILE_OF_PROCESSOR = "processor_config.json"


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a picture is resized, cropped and normalised; sizes in pixels.

    Attributes:
        size: Height and width; or one number for the shorter side; or None to keep the size.
        crop: Height and width of the centre crop, or None.
        resample: Pillow's number of the filter.
        scale: Factor for values in [0, 255].
        mean: Mean of each channel, after scaling.
        std: Standard deviation of each channel, after scaling.
    """

    size: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    resample: Image.Resampling
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        """Return the pixels of one RGB picture."""
        resized = image if self.size is None else image.resize(self._target(image), self.resample)
        cut = resized if self.crop is None else _center(resized, *self.crop)
        pixels = torch.from_numpy(np.array(cut, dtype=np.float32)).permute(2, 0, 1) * self.scale
        return (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]

    def _target(self, image: Image.Image) -> tuple[int, int]:
        """Return the width and height to resize to."""
        if isinstance(self.size, tuple):
            return self.size[1], self.size[0]
        shorter, size = min(image.size), self.size or min(image.size)
        width, height = (size if side == shorter else int(size * side / shorter) for side in image.size)
        return width, height


def read_preprocessing(folder: Path) -> Preprocessing:
    """Read the preprocessing of the encoder in a folder.

    Raises:
        ModelError: The file is missing or damaged.
    """
    path = folder / _FILE
    try:
        if path.is_file():
            fields = json.loads(path.read_text(encoding="utf-8"))
        else:
            path = folder / _FILE_OF_PROCESSOR
            fields = json.loads(path.read_text(encoding="utf-8"))["image_processor"]
        return _parse(fields)
    except FileNotFoundError:
        raise ModelError(f"--encoder: {folder} has no {_FILE}; download the complete model folder") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: is damaged ({error!r}); download the model again") from error


def _parse(fields: Mapping[str, Any]) -> Preprocessing:
    crops = fields.get("do_center_crop", False)
    normalises = fields.get("do_normalize", True)
    return Preprocessing(
        size=_size(fields["size"], keeps_shape=crops) if fields.get("do_resize", True) else None,
        crop=_crop(fields["crop_size"]) if crops else None,
        resample=Image.Resampling(fields.get("resample", Image.Resampling.BICUBIC)),
        scale=float(fields.get("rescale_factor", 1 / 255)) if fields.get("do_rescale", True) else 1.0,
        mean=tuple(fields["image_mean"]) if normalises else (0.0,) * 3,
        std=tuple(fields["image_std"]) if normalises else (1.0,) * 3,
    )


def _size(size: Any, *, keeps_shape: bool) -> tuple[int, int] | int:
    """Read a size; a single number is the shorter side if a centre crop follows, otherwise both sides."""
    if isinstance(size, Mapping):
        return int(size["shortest_edge"]) if "shortest_edge" in size else (int(size["height"]), int(size["width"]))
    return int(size) if keeps_shape else (int(size), int(size))


def _crop(size: Any) -> tuple[int, int]:
    return (int(size["height"]), int(size["width"])) if isinstance(size, Mapping) else (int(size), int(size))


def _center(image: Image.Image, height: int, width: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
