from pathlib import Path
from typing import cast

import torch
from PIL import Image

from benchmarks.quality.make_subjects import SLUGS, STYLE
from benchmarks.quality.metric_ceiling import NUM_COMPOSED, ceiling_of, composed
from benchmarks.quality.subjects import BY_NAME
from benchmarks.quality.ten_subjects import CONTEXTS
from lowmem_db.evaluation.encoders import Encoder
from lowmem_db.models.loading import Autoencoder


def test_a_drawing_is_put_into_every_context(tmp_path: Path) -> None:
    file = tmp_path / STYLE / f"{SLUGS['drawn_cup']}.png"
    file.parent.mkdir()
    Image.new("RGBA", (128, 128), "lime").save(file)
    pictures = composed(BY_NAME["drawn_cup"], tmp_path)
    assert len(pictures) == len(CONTEXTS) * NUM_COMPOSED
    assert all(picture.getpixel((64, 80)) == (0, 255, 0) for picture in pictures)
    corners = [picture.getpixel((2, 2)) for picture in pictures[::NUM_COMPOSED]]
    assert len(set(corners)) == len(CONTEXTS)


class _MeanColour:
    def embed_images(self, images: list[Image.Image]) -> torch.Tensor:
        return torch.tensor([[float(value) for value in image.resize((1, 1)).getpixel((0, 0))] for image in images])  # type: ignore[union-attr]


class _Darkens:
    device = torch.device("cpu")

    def encode(self, pixels: torch.Tensor) -> "_Darkens":
        self.latents = pixels
        return self

    def decode(self, latents: torch.Tensor) -> "_Darkens":
        self.sample = latents - 0.5
        return self


def test_pictures_are_compared_with_the_other_pictures() -> None:
    pictures = [Image.new("RGB", (8, 8), (value, 100, 0)) for value in (100, 0)]
    found = ceiling_of(pictures, pictures[:1], cast("Encoder", _MeanColour()), cast("Autoencoder", _Darkens()))
    assert found["pictures"] == found["blurred"] == 0.707
    assert found["composed into the contexts"] == round((1 + 0.7071) / 2, 3)
    assert "composed into the contexts" not in ceiling_of(
        pictures, [], cast("Encoder", _MeanColour()), cast("Autoencoder", _Darkens())
    )
