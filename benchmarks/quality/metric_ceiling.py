"""What EN0-I can reach on the subjects: pictures against pictures, through the autoencoder, and blurred.

    python -m benchmarks.quality.metric_ceiling benchmarks/results/quality/metric_ceiling.json

Each picture is compared with the other pictures of its subject. A model cannot do better than its autoencoder; the blur
tells how much of the metric is sharpness.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from benchmarks.quality.subjects import SUBJECTS, Subject
from lowmem_db.data.photos import read_photo
from lowmem_db.evaluation.encoders import Encoder, find_encoders, load_encoder
from lowmem_db.evaluation.metrics import cosine_similarities
from lowmem_db.models.finding import find_model
from lowmem_db.models.loading import Autoencoder
from lowmem_db.sampling.images import to_images

SIZE = 128
BLUR_PIXELS = 2


@torch.no_grad()
def through_autoencoder(autoencoder: Autoencoder, images: Sequence[Image.Image]) -> list[Image.Image]:
    """Encode and decode pictures of one size."""
    pixels = torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2)
    latents = autoencoder.encode(pixels.to(autoencoder.device).float() / 127.5 - 1).latents
    return to_images(autoencoder.decode(latents).sample)


def ceiling_of(subject: Subject, encoder: Encoder, autoencoder: Autoencoder) -> dict[str, float]:
    """Return the mean cosine of the pictures with the other pictures, as they are and worsened."""
    pictures = [read_photo(path).convert("RGB") for path in subject.pictures]
    small = [picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC) for picture in pictures]
    real = encoder.embed_images(pictures)
    others = ~torch.eye(len(pictures), dtype=torch.bool)

    def against_others(images: Sequence[Image.Image]) -> float:
        return round(float(cosine_similarities(encoder.embed_images(images), real)[others].mean()), 3)

    return {
        "pictures": against_others(pictures),
        "through the autoencoder": against_others(through_autoencoder(autoencoder, small)),
        "blurred": against_others([picture.filter(ImageFilter.GaussianBlur(BLUR_PIXELS)) for picture in small]),
    }


def main() -> None:
    """Measure all subjects."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--tiny", action="store_true", help="one subject, to try the script")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    encoder = load_encoder(find_encoders(["en0"])[0], arguments.device)
    autoencoder = find_model("demo").load("vae", device=arguments.device)
    subjects = SUBJECTS[: 1 if arguments.tiny else None]
    found = {subject.name: ceiling_of(subject, encoder, autoencoder) for subject in subjects}
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
