"""LPIPS (arXiv:1801.03924, version 0.1): the distance of two pictures in the features of AlexNet or VGG16.

The weights are those of the package ``lpips``: its complete ``state_dict``, with backbone and linear heads, under the
published names.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowmem_db.errors import ModelError

_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPS = 1e-10
_VGG16_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_ALLOWED = 'allowed: the complete lpips.LPIPS(net="alex").state_dict(), or net="vgg"'


class Lpips(nn.Module):
    """The distance, with the backbone that the weights belong to.

    Args:
        weights: ``lpips.LPIPS(net=...).state_dict()`` of AlexNet (``alex``) or VGG16 (``vgg``).

    Raises:
        ModelError: They are incomplete, or those of another network.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        first = weights.get("net.slice1.0.weight")
        kernel = 0 if first is None else first.shape[-1]
        if kernel not in _BACKBONES:
            raise ModelError(f"these are not weights of LPIPS with AlexNet or VGG16; {_ALLOWED}")
        self.network, build = _BACKBONES[kernel]
        self.net = build()
        try:
            self.net.load_state_dict(_part(weights, "net."))
            heads = [
                weights[f"lin{index}.model.1.weight"].reshape(width) for index, width in enumerate(_widths(self.net))
            ]
        except (RuntimeError, KeyError) as error:
            raise ModelError(
                f"these LPIPS weights are incomplete ({' '.join(str(error).split())[:200]}); {_ALLOWED}"
            ) from error
        self.heads = nn.ParameterList(heads)
        self.requires_grad_(False).eval()

    def forward(self, pictures: Float[Tensor, "b 3 h w"], others: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
        """Return the distance of each picture to its partner (Equation 1); values in [-1, 1]."""
        slices = zip(self.heads, self.features(pictures), self.features(others), strict=True)
        distances = [
            torch.einsum("bchw,c->bhw", (left - right) ** 2, head).mean((1, 2)) for head, left, right in slices
        ]
        return torch.stack(distances).sum(dim=0)

    def features(self, pixels: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        """Return the output of each slice of the backbone, with unit length at each position."""
        shift, scale = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (_SHIFT, _SCALE))
        hidden = (pixels - shift) / scale
        found = []
        for part in self.net.children():
            hidden = part(hidden)
            found.append(hidden / (hidden.pow(2).sum(dim=1, keepdim=True).sqrt() + _EPS))
        return found


def _alexnet() -> nn.Sequential:
    layers = [
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    ]  # fmt: skip
    return _slices(layers, (2, 5, 8, 10, 12))


def _vgg16() -> nn.Sequential:
    layers: list[nn.Module] = []
    ends = []
    inputs = 3
    for block in _VGG16_BLOCKS:
        layers += [nn.MaxPool2d(2, 2)] if layers else []
        for outputs in block:
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            inputs = outputs
        ends.append(len(layers))
    return _slices(layers, ends)


_BACKBONES = {11: ("AlexNet", _alexnet), 3: ("VGG16", _vgg16)}
"""By the width of the first kernel."""


def _slices(layers: list[nn.Module], ends: "tuple[int, ...] | list[int]") -> nn.Sequential:
    """Split layers into named slices; each layer keeps its number."""
    backbone = nn.Sequential()
    for index, (start, end) in enumerate(pairwise([0, *ends])):
        part = nn.Sequential()
        for number in range(start, end):
            part.add_module(str(number), layers[number])
        backbone.add_module(f"slice{index + 1}", part)
    return backbone


def _widths(backbone: nn.Sequential) -> list[int]:
    """Return the number of channels of each slice."""
    convolutions = [[layer for layer in part.modules() if isinstance(layer, nn.Conv2d)] for part in backbone]
    return [found[-1].out_channels for found in convolutions]


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
