"""What EN0-I and ID-I can reach on the subjects: pictures against pictures, in new places, blurred, and so on.

    python -m benchmarks.quality.metric_ceiling benchmarks/results/quality/metric_ceiling.json --drawings DRAWINGS

Each picture is compared with the other pictures of its subject. A model cannot do better than its autoencoder; the blur
tells how much of the metric is sharpness. Drawn subjects are also composed into the contexts of the runs, as a perfect
model would draw them. DRAWINGS is what ``benchmarks.demo_base.fetch`` leaves.
"""

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from benchmarks.demo_base.captions import Attributes
from benchmarks.demo_base.render import compose
from benchmarks.quality.make_subjects import SLUGS, STYLE
from benchmarks.quality.runs import background_of
from benchmarks.quality.subjects import SUBJECTS, Subject
from benchmarks.quality.ten_subjects import CONTEXTS
from lowmem_db.data.photos import read_photo
from lowmem_db.evaluation.encoders import Encoder, find_encoders, load_encoder
from lowmem_db.evaluation.metrics import cosine_similarities
from lowmem_db.models.finding import find_model
from lowmem_db.models.loading import Autoencoder
from lowmem_db.sampling.images import to_images

SIZE = 128
BLUR_PIXELS = 2
NUM_COMPOSED = 4
METRICS = {"EN0-I": "en0", "ID-I": "identity"}


@torch.no_grad()
def through_autoencoder(autoencoder: Autoencoder, images: Sequence[Image.Image]) -> list[Image.Image]:
    """Encode and decode pictures of one size."""
    pixels = torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2)
    latents = autoencoder.encode(pixels.to(autoencoder.device).float() / 127.5 - 1).latents
    return to_images(autoencoder.decode(latents).sample)


def composed(subject: Subject, drawings: Path) -> list[Image.Image]:
    """Return pictures of a drawn subject in the contexts of the runs."""
    cutout = Image.open(drawings / STYLE / f"{SLUGS[subject.name]}.png").convert("RGBA").resize((SIZE, SIZE))
    return [
        compose(cutout, Attributes(subject.noun, background=background_of(context)), random.Random(number))
        for context in CONTEXTS
        for number in range(NUM_COMPOSED)
    ]


def ceiling_of(
    pictures: Sequence[Image.Image], in_contexts: Sequence[Image.Image], encoder: Encoder, autoencoder: Autoencoder
) -> dict[str, float]:
    """Return the mean cosine of pictures with the other pictures, as they are and worsened, and of contexts."""
    small = [picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC) for picture in pictures]
    real = encoder.embed_images(pictures)
    others = ~torch.eye(len(pictures), dtype=torch.bool)

    def against_others(images: Sequence[Image.Image]) -> float:
        return round(float(cosine_similarities(encoder.embed_images(images), real)[others].mean()), 3)

    found = {
        "pictures": against_others(pictures),
        "through the autoencoder": against_others(through_autoencoder(autoencoder, small)),
        "blurred": against_others([picture.filter(ImageFilter.GaussianBlur(BLUR_PIXELS)) for picture in small]),
    }
    if in_contexts:
        embedded = encoder.embed_images(in_contexts)
        found["composed into the contexts"] = round(float(cosine_similarities(embedded, real).mean()), 3)
    return found


def main() -> None:
    """Measure all subjects."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--drawings", type=Path, required=True, help="folder with STYLE/SLUG.png cut-outs")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--tiny", action="store_true", help="one subject, to try the script")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    autoencoder = find_model("demo").load("vae", device=arguments.device)
    encoders = {metric: load_encoder(find_encoders([kind])[0], arguments.device) for metric, kind in METRICS.items()}
    found: dict[str, Mapping[str, dict[str, float]]] = {}
    for subject in SUBJECTS[: 1 if arguments.tiny else None]:
        pictures = [read_photo(path).convert("RGB") for path in subject.pictures]
        in_contexts = composed(subject, arguments.drawings) if subject.kind == "drawn" else []
        found[subject.name] = {
            metric: ceiling_of(pictures, in_contexts, encoder, autoencoder) for metric, encoder in encoders.items()
        }
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
