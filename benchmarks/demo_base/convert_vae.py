"""Turns the published TAEF2 checkpoints into an AutoencoderTAEF2 folder with standardised latents."""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.demo_base.render import SIZE, load_drawings
from lowmem_db.models.autoencoder_taef2 import AutoencoderTAEF2


@torch.no_grad()
def latent_statistics(vae: AutoencoderTAEF2, drawings: list[Image.Image]) -> tuple[list[float], list[float]]:
    """Returns the mean and the standard deviation of each latent channel over drawings on white and blue."""
    pictures = []
    for index, cutout in enumerate(drawings):
        canvas = Image.new("RGB", (SIZE, SIZE), (255, 255, 255) if index % 2 else (120, 150, 200))
        canvas.paste(cutout, (0, 0), cutout)
        pictures.append(np.asarray(canvas))
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = vae.encode(pixels).latents
    return latents.mean((0, 2, 3)).tolist(), latents.std((0, 2, 3)).tolist()


def main() -> None:
    """Converts and saves in half precision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="folder with taef2_encoder.pth, taef2_decoder.pth")
    parser.add_argument("--drawings", type=Path, required=True, help="folder with STYLE/SLUG.png cut-outs")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    vae = AutoencoderTAEF2()
    vae.encoder.load_state_dict(torch.load(args.weights / "taef2_encoder.pth"))
    vae.decoder.load_state_dict(torch.load(args.weights / "taef2_decoder.pth"))
    cutouts = [cutout for _, _, cutout in load_drawings(args.drawings)]
    mean, std = latent_statistics(vae.float(), cutouts[:: max(1, len(cutouts) // 96)])
    vae.register_to_config(latents_mean=[round(x, 5) for x in mean], latents_std=[round(x, 5) for x in std])
    vae.half().save_pretrained(args.out)


if __name__ == "__main__":
    main()
