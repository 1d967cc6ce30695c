"""Samples the demo base: one row per caption, one column per seed."""

import argparse
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw

from benchmarks.demo_base.captions import article
from benchmarks.demo_base.nouns import NOUNS
from lowmem_db.models.autoencoder_taef2 import AutoencoderTAEF2

SIZE = 128
COMPOSED = (
    "a dog on a blue background", "a red dog on a yellow background", "a dog on the beach",
    "a blue cat in the snow", "a drawing of a purple car in the city", "a yellow flower on the grass",
    "a small clock on the left on a green background", "a pink bird at night", "a photo of a dog", "a sks dog",
    "a sks dog on the beach", "a green house in the forest", "",
)  # fmt: skip


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """Returns the pipeline of an exported folder with DDIM sampling, in single precision."""
    vae = AutoencoderTAEF2.from_pretrained(folder / "vae")
    pipeline = StableDiffusionPipeline.from_pretrained(folder, vae=vae, torch_dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_rows(
    pipeline: StableDiffusionPipeline, captions: list[str], seeds: int, steps: int, guidance: float
) -> list[list[Image.Image]]:
    """Returns one row of `seeds` pictures per caption; a column shares its initial noise."""
    rows = []
    for caption in captions:
        generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
        result = pipeline(
            [caption] * seeds, height=SIZE, width=SIZE, num_inference_steps=steps, guidance_scale=guidance,
            generator=generators,
        )  # fmt: skip
        rows.append(result.images)
    return rows


def draw_sheet(rows: list[list[Image.Image]], captions: list[str], halves: int = 2, label: int = 200) -> Image.Image:
    """Returns a sheet with the caption left of each row, the rows split over `halves` columns of rows."""
    per_half, cell = -(-len(rows) // halves), rows[0][0].width
    block = label + cell * len(rows[0])
    sheet = Image.new("RGB", (block * halves, cell * per_half), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        left, top = block * (index // per_half), cell * (index % per_half)
        words = caption.replace(" on a ", "\non a ").replace(" on the ", "\non the ").replace(" in ", "\nin ")
        pen.text((left + 6, top + cell // 2 - 14), words or "(empty)", fill="black", font_size=14)
        for column, picture in enumerate(row):
            sheet.paste(picture, (left + label + cell * column, top))
    return sheet


def main() -> None:
    """Samples every noun and a few composed captions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="exported folder")
    parser.add_argument("--out", type=Path, required=True, help=".png (256 colours) or .jpg")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--captions", nargs="*", help="instead of all nouns and the composed captions")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    captions = args.captions or [*map(article, NOUNS), *COMPOSED]
    rows = sample_rows(load_pipeline(args.base), captions, args.seeds, args.steps, args.guidance)
    sheet = draw_sheet(rows, captions, halves=1 if len(captions) < 8 else 2)
    if args.out.suffix == ".png":
        sheet = sheet.quantize(256)
    sheet.save(args.out, optimize=True)


if __name__ == "__main__":
    main()
