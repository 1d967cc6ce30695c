"""LPIPS against the formula written out, and its weights."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lowmem_db.errors import ModelError
from lowmem_db.evaluation.encoders import find_encoders, load_encoder
from lowmem_db.evaluation.lpips import Lpips
from tests.evaluation.conftest import CPU, alexnet_weights, random_picture


@pytest.fixture(scope="module")
def network() -> Lpips:
    return Lpips(alexnet_weights())


def pictures(*seeds: int) -> Tensor:
    return torch.stack([torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in seeds])


def written_out(weights: dict[str, Tensor], one: Tensor, other: Tensor) -> Tensor:
    """Equation 1 of arXiv:1801.03924 for AlexNet, step by step."""

    def convolve(hidden: Tensor, name: str, **options: int) -> Tensor:
        return functional.conv2d(hidden, weights[f"net.{name}.weight"], weights[f"net.{name}.bias"], **options).relu()

    def features(pixels: Tensor) -> list[Tensor]:
        shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        first = convolve(
            (pixels - shift) / torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), "slice1.0", stride=4, padding=2
        )
        second = convolve(functional.max_pool2d(first, 3, 2), "slice2.3", padding=2)
        third = convolve(functional.max_pool2d(second, 3, 2), "slice3.6", padding=1)
        fourth = convolve(third, "slice4.8", padding=1)
        return [first, second, third, fourth, convolve(fourth, "slice5.10", padding=1)]

    total = torch.zeros(len(one))
    for index, (left, right) in enumerate(zip(features(one), features(other), strict=True)):
        unit_left, unit_right = (part / (part.norm(dim=1, keepdim=True) + 1e-10) for part in (left, right))
        difference = functional.conv2d((unit_left - unit_right) ** 2, weights[f"lin{index}.model.1.weight"])
        total += difference.mean(dim=(1, 2, 3))
    return total


def test_distance_is_the_formula(network: Lpips) -> None:
    one, other = pictures(0, 1), pictures(2, 3)
    torch.testing.assert_close(network(one, other), written_out(alexnet_weights(), one, other))


def test_distance_is_symmetric_and_zero_for_the_same(network: Lpips) -> None:
    one, other = pictures(0), pictures(1)
    torch.testing.assert_close(network(one, other), network(other, one))
    assert network(one, one).item() == 0
    assert network(one, other).item() > 0.01


def test_vgg16_is_recognised() -> None:
    channels = [
        (3, 64),
        (64, 64),
        (64, 128),
        (128, 128),
        (128, 256),
        (256, 256),
        (256, 256),
        (256, 512),
        *[(512, 512)] * 5,
    ]
    names = ["1.0", "1.2", "2.5", "2.7", "3.10", "3.12", "3.14", "4.17", "4.19", "4.21", "5.24", "5.26", "5.28"]
    weights = {f"lin{i}.model.1.weight": torch.ones(1, width, 1, 1) for i, width in enumerate((64, 128, 256, 512, 512))}
    for name, (inputs, outputs) in zip(names, channels, strict=True):
        weights[f"net.slice{name}.weight"] = torch.full((outputs, inputs, 3, 3), 0.01)
        weights[f"net.slice{name}.bias"] = torch.arange(outputs) / 100
    network = Lpips(weights)
    assert network.network == "VGG16"
    assert [part.shape[1:] for part in network.features(torch.zeros(1, 3, 32, 32))] == [
        (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)
    ]  # fmt: skip


@pytest.mark.parametrize("lost", ["net.slice1.0.weight", "net.slice3.6.bias", "lin4.model.1.weight"])
def test_weights_that_are_not_whole_are_refused(lost: str) -> None:
    weights = alexnet_weights()
    del weights[lost]
    with pytest.raises(ModelError, match=r"LPIPS .*allowed: the complete lpips\.LPIPS"):
        Lpips(weights)


def test_every_two_pictures_are_compared(lpips_file: Path, network: Lpips) -> None:
    encoder = load_encoder(find_encoders([f"lpips={lpips_file}"])[0], CPU)
    small, large = random_picture(0, 64), random_picture(1, 96)
    found = encoder.distances([small, small, large])
    assert found.shape == (3,)
    assert found[0].item() == 0
    assert found[1].item() == found[2].item() > 0
    assert encoder.distances([small]).shape == (0,)
