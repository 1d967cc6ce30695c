"""The README's picture: the photos, and what is drawn with and without prior preservation (figure 19 of the paper).

    lowmem-db train configs/demo.yaml
    lowmem-db train configs/demo.yaml prior.enabled=false output_dir=runs/demo_without_prior
    python benchmarks/quality/prior_figure.py runs/demo runs/demo_without_prior docs/images/demo.png

Both runs start from the same model and draw from the same noise; the middle rows are that model before training.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageOps

from lowmem_db.engine.generate import generate_images
from lowmem_db.engine.source import ImageSource, find_source
from lowmem_db.sampling.images import labelled_grid
from lowmem_db.sampling.latents import SamplingSettings

PROMPTS = ("a sks dog", "a dog", "a cat")
SETTINGS = SamplingSettings(sampler="ddim", num_inference_steps=40, guidance_scale=1.0)
NUM_IMAGES = 6


def photo_row(folder: Path, size: int) -> tuple[str, list[Image.Image]]:
    """Return the photos of the subject as a row."""
    photos = [ImageOps.fit(Image.open(path).convert("RGB"), (size, size)) for path in sorted(folder.glob("*.jpg"))]
    return f"the {len(photos)} photos", photos[:NUM_IMAGES]


def drawn_rows(
    source: ImageSource, label: str, prompts: tuple[str, ...], options: argparse.Namespace
) -> list[tuple[str, list[Image.Image]]]:
    """Return a row of images for each prompt."""
    rows = generate_images(
        source,
        prompts,
        replace(SETTINGS, num_inference_steps=1) if options.tiny else SETTINGS,
        num_images=1 if options.tiny else NUM_IMAGES,
        resolution=128,
        seed=0,
        device=options.device,
        dtype=torch.float32,
    )
    return [(f"{label}: “{prompt}”", images) for prompt, images in rows]


def main() -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("with_prior")
    parser.add_argument("without_prior")
    parser.add_argument("figure", type=Path)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--tiny", action="store_true", help="one image in one step, to try the script")
    options = parser.parse_args()
    run = find_source(options.with_prior)
    assert run.run_config is not None, f"{options.with_prior} is no run"
    rows = [
        photo_row(run.run_config.subject.instance_dir, 128),
        *drawn_rows(find_source(run.run_config.model.base), "before training", PROMPTS[1:], options),
        *drawn_rows(run, "after training with prior preservation", PROMPTS, options),
        *drawn_rows(find_source(options.without_prior), "after training without it", PROMPTS, options),
    ]
    labelled_grid(rows).quantize(256).save(options.figure, optimize=True)


if __name__ == "__main__":
    main()
