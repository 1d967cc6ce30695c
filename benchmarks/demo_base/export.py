"""Writes the averaged weights of a training state as a diffusers folder in half precision."""

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from benchmarks.demo_base.tokenizer import write_vocabulary
from benchmarks.demo_base.train import build_scheduler, build_text_encoder, build_unet
from lowmem_db.models.autoencoder_taef2 import AutoencoderTAEF2

LOCAL_ENTRIES = ("_name_or_path", "is_local", "local_files_only")


def load_pipeline(state_file: Path, base: Path, raw: bool = False) -> StableDiffusionPipeline:
    """Returns a pipeline of the state's averaged (or raw) weights with the folder's tokenizer and VAE."""
    arguments = json.loads(state_file.with_name("args.json").read_text())
    state = torch.load(state_file, map_location="cpu")["model" if raw else "ema"]
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    unet = build_unet(tuple(arguments["channels"]))
    text_encoder = build_text_encoder(tokenizer, arguments["text_layers"])
    for name, module in (("unet", unet), ("text_encoder", text_encoder)):
        prefix = f"{name}."
        module.load_state_dict({key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)})
    return StableDiffusionPipeline(
        vae=AutoencoderTAEF2.from_pretrained(base / "vae"),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=build_scheduler(arguments.get("zero_snr", False)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def clean_config(path: Path) -> None:
    """Drops what only this machine knows from a JSON file, and names the module that holds the VAE's class."""
    entries = json.loads(path.read_text())
    entries = {key: value for key, value in entries.items() if key not in LOCAL_ENTRIES}
    if "vae" in entries:
        entries["vae"] = ["lowmem_db.models.autoencoder_taef2", "AutoencoderTAEF2"]
    path.write_text(json.dumps(entries, indent=2) + "\n")


def main() -> None:
    """Exports into the folder that already holds the tokenizer and the VAE."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="state.pt of train.py")
    parser.add_argument("--base", type=Path, required=True, help="folder with tokenizer/ and vae/; written to")
    parser.add_argument("--out", type=Path, help="other folder to write to")
    parser.add_argument("--raw", action="store_true", help="the last weights instead of their moving average")
    args = parser.parse_args()
    pipeline = load_pipeline(args.state, args.base, args.raw).to(torch.float16)
    out = args.out or args.base
    pipeline.save_pretrained(out)
    write_vocabulary(pipeline.tokenizer, out / "tokenizer")
    for config in [*out.glob("*.json"), *out.glob("*/*config.json")]:
        clean_config(config)


if __name__ == "__main__":
    main()
