"""The demo's picture: what was given, the subject in new places, and the class as it still is.

    lowmem-db train configs/demo.yaml
    python -m benchmarks.demo.picture runs/demo --output runs/demo/demo.png

Prompts and seeds were fixed before they were drawn, and every image of the list is shown. A column has one noise: what
differs in it is the prompt.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from lowmem_db.config.schema import Config
from lowmem_db.data.photos import read_photo, scan_photos
from lowmem_db.engine.generate import generate_images
from lowmem_db.engine.source import ImageSource, find_source
from lowmem_db.sampling.latents import SamplingSettings

CPU = torch.device("cpu")
FIRST_SEED = 100
"""Of the first column; each further column has the next."""
OF_SUBJECT = (
    "a sks dog on the beach", "a sks dog in the snow", "a sks dog at night", "a sks dog in the forest",
    "a sks dog in the city", "a red sks dog", "a blue sks dog",
)  # fmt: skip
OF_CLASS = (
    "a dog", "a dog on the beach", "a dog in the snow", "a dog in the city", "a blue dog", "a cat",
    "a cat on the beach",
)  # fmt: skip
SIDE, GAP, LABEL, HEADING = 124, 4, 17, 22
WIDTH = len(OF_SUBJECT) * (SIDE + GAP) + GAP

Row = tuple[str, list[tuple[str, Image.Image]]]
"""Heading, and each picture with its label."""


def given(config: Config) -> list[tuple[str, Image.Image]]:
    """Return the pictures that the run was trained on."""
    records = scan_photos(
        config.subject.instance_dir, prompt="", resolution=config.data.resolution, field="subject.instance_dir"
    )
    return [("", ImageOps.fit(read_photo(record.path), (SIDE, SIDE))) for record in records][: len(OF_SUBJECT)]


def compose(rows: list[Row]) -> Image.Image:
    """Return the rows below each other, WIDTH pixels wide."""
    heights = [HEADING + SIDE + (LABEL if any(label for label, _ in cells) else 0) + GAP for _, cells in rows]
    sheet = Image.new("RGB", (WIDTH, sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    heading_font, font = ImageFont.load_default(size=14), ImageFont.load_default(size=11)
    top = 0
    for (heading, cells), height in zip(rows, heights, strict=True):
        pen.text((GAP, top + 3), heading, fill="black", font=heading_font)
        for column, (label, picture) in enumerate(cells):
            left = GAP + column * (SIDE + GAP)
            sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, top + HEADING))
            pen.text((left, top + HEADING + SIDE + 1), label, fill="black", font=font)
        top += height
    return sheet


def settings_of(config: Config, *, tiny: bool) -> SamplingSettings:
    """Return how the samples of a run are drawn, in one step if ``tiny``."""
    return SamplingSettings(
        sampler=config.sampling.sampler,
        num_inference_steps=1 if tiny else config.sampling.num_inference_steps,
        guidance_scale=config.sampling.guidance_scale,
    )


def draw(
    source: ImageSource,
    columns: Iterable[Sequence[str]],
    settings: SamplingSettings,
    *,
    resolution: int,
    device: torch.device = CPU,
) -> list[list[Image.Image]]:
    """Return rows of images: one for each prompt of a column, whose images start from the same noise."""
    drawn = [
        generate_images(
            source,
            prompts,
            settings,
            num_images=1,
            resolution=resolution,
            seed=FIRST_SEED + column,
            device=device,
            dtype=torch.float32,
        )
        for column, prompts in enumerate(columns)
    ]
    return [[images[0] for _, images in row] for row in zip(*drawn, strict=True)]


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run of configs/demo.yaml")
    parser.add_argument("--output", type=Path, required=True, help="picture to write, .png")
    parser.add_argument("--device", type=torch.device, default=CPU)
    parser.add_argument("--tiny", action="store_true", help="every image in one step, to try the script")
    options = parser.parse_args()
    source = find_source(options.run)
    config = source.run_config
    if config is None:
        parser.error(f"{options.run} is no run; train one with: lowmem-db train demo")
    of_subject, of_class = draw(
        source,
        zip(OF_SUBJECT, OF_CLASS, strict=True),
        settings_of(config, tiny=options.tiny),
        resolution=config.data.resolution,
        device=options.device,
    )
    photos = given(config)
    rows = [
        (f"the {len(photos)} pictures that it was trained on, as “{config.subject.instance_prompt}”", photos),
        ("what it draws now: this dog in new places and colours", list(zip(OF_SUBJECT, of_subject, strict=True))),
        ("and without “sks”: dogs are still other dogs, cats still cats", list(zip(OF_CLASS, of_class, strict=True))),
    ]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    compose(rows).save(options.output, optimize=True)
    print(options.output)


if __name__ == "__main__":
    main()
