"""How well a base model follows captions, and how diverse its samples of a noun are, beside real composed drawings.

    python benchmarks/quality/base_card.py --base lowmem_db/models/demo/base --drawings DRAWINGS \
        --out benchmarks/results/quality/base_card.json

Both are named by the classifier of ``--encoder captions``; what it finds in the drawings is the ceiling. It was
trained on six of the seven styles of the drawings, so its accuracy on the style that it has not seen stands beside.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from benchmarks.demo_base.captions import Attributes, article, background_phrase
from benchmarks.demo_base.contact_sheet import load_pipeline
from benchmarks.demo_base.nouns import NOUNS
from benchmarks.demo_base.render import HUES, SIZE, compose
from benchmarks.demo_base.scenes import PLAIN, SCENES
from benchmarks.quality.train_caption_classifier import Drawing, load_drawings
from lowmem_db.evaluation.captions import LABELS, Caption, caption_pairs, read_accuracy, read_caption
from lowmem_db.evaluation.encoders import Encoder, find_encoders, load_encoder
from lowmem_db.evaluation.metrics import cosine_distances, summarise
from lowmem_db.storage.run_folder import write_json

COLOURED = ("car", "flower", "cup")
PLACED = ("dog", "cat", "car")
DIVERSE = ("dog", "cat", "clock", "bird", "car", "flower")
BATCH = 16


def captioned(nouns: Sequence[str], rng: random.Random) -> list[tuple[str, Attributes]]:
    """Return captions of every noun on white, of colours, and of backgrounds and scenes, with what they say."""
    plain = [(article(noun), Attributes(noun)) for noun in nouns]
    coloured = [
        (article(f"{colour} {noun}"), Attributes(noun, colour=colour))
        for noun, colour in zip(_repeated(COLOURED, nouns), 2 * list(HUES), strict=False)
    ]
    placed = [
        (f"{article(noun)} {background_phrase(name, rng)}", Attributes(noun, background=name))
        for noun, name in zip(_repeated(PLACED, nouns), (*PLAIN, *SCENES), strict=True)
    ]
    return plain + coloured + placed


@torch.no_grad()
def sample(
    pipeline: StableDiffusionPipeline, captions: Sequence[str], steps: int, guidance: float
) -> list[Image.Image]:
    """Return one picture of each caption, the first from seed 0."""
    pictures: list[Image.Image] = []
    for start in range(0, len(captions), BATCH):
        batch = list(captions[start : start + BATCH])
        generators = [torch.Generator().manual_seed(start + index) for index in range(len(batch))]
        drawn: Any = pipeline(
            batch, height=SIZE, width=SIZE, num_inference_steps=steps, guidance_scale=guidance, generator=generators
        )
        pictures += drawn.images
        print(f"{len(pictures)} of {len(captions)} sampled", flush=True)
    return pictures


def draw(drawings: Sequence[Drawing], shown: Sequence[Attributes], rng: random.Random) -> list[Image.Image]:
    """Return one composed drawing of what each caption says."""
    by_noun: dict[str, list[Image.Image]] = {}
    for _, noun, cutout in drawings:
        by_noun.setdefault(noun, []).append(cutout)
    return [compose(rng.choice(by_noun[one.noun]), one, rng) for one in shown]


def follow(encoder: Encoder, captions: Sequence[str], pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """Return accuracies by attribute, and that of each noun; the pictures of a caption follow one another."""
    named = iter(encoder.name_images(pictures))
    groups = [(text, [next(named) for _ in group]) for text, group in groupby(captions)]
    said = [_read(text) for text, _ in groups]
    pairs = caption_pairs(said, [images for _, images in groups])
    scores = {attribute: summarise({"": pairs[attribute]}) for attribute in LABELS}
    alone = [(one.noun, right) for one, right in zip(said, pairs["noun"], strict=True) if one == Caption(noun=one.noun)]
    return {
        attribute: {"value": score.value, "interval": score.interval, "num_images": score.num_pairs}
        for attribute, score in scores.items()
    } | {"nouns_alone": {noun: float(right.mean()) for noun, right in alone}}


def diversity(encoder: Encoder, nouns: Sequence[str], groups: dict[str, list[Image.Image]]) -> dict[str, float]:
    """Return EN0-DIV of the pictures of each noun."""
    return {noun: float(cosine_distances(encoder.embed_images(groups[noun])).mean()) for noun in nouns}


def main() -> None:
    """Samples, composes, names, and writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="exported folder")
    parser.add_argument("--drawings", type=Path, required=True, help="folder with STYLE/SLUG.png cut-outs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--nouns", nargs="+", default=list(NOUNS), help="those that the base was trained on")
    parser.add_argument("--samples", type=int, default=2, help="of each caption")
    parser.add_argument("--diverse", type=int, default=4, help="further samples of each noun for EN0-DIV")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=2.5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    rng = random.Random(0)
    captions = [one for one in captioned(args.nouns, rng) for _ in range(args.samples)]
    diverse = [noun for noun in DIVERSE if noun in args.nouns]
    extra = [(article(noun), Attributes(noun)) for noun in diverse for _ in range(args.diverse)]
    wanted = captions + extra
    samples = sample(load_pipeline(args.base), [caption for caption, _ in wanted], args.steps, args.guidance)
    composed = draw(load_drawings(args.drawings), [shown for _, shown in wanted], rng)
    texts = [text for text, _ in captions]
    encoder = load_encoder(find_encoders(["captions"])[0], torch.device("cpu"))
    card = {
        "settings": {"sampler": "ddim", "steps": args.steps, "guidance": args.guidance, "resolution": SIZE},
        "num_captions": len(captions) // args.samples,
        "samples_per_caption": args.samples,
        "classifier_accuracy": {name: read_accuracy()[name] for name in LABELS},
        "samples": follow(encoder, texts, samples[: len(texts)]),
        "drawings": follow(encoder, texts, composed[: len(texts)]),
        "EN0-DIV": {
            name: diversity(encoder, diverse, _of_nouns(extra, pictures[len(texts) :]))
            for name, pictures in (("samples", samples), ("drawings", composed))
        },
        "seconds": round(time.perf_counter() - started),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, card)
    print(json.dumps(card))


def _repeated(chosen: Sequence[str], nouns: Sequence[str]) -> list[str]:
    allowed = [noun for noun in chosen if noun in nouns] or list(nouns)
    return [allowed[index % len(allowed)] for index in range(len(PLAIN) + len(SCENES))]


def _read(text: str) -> Caption:
    caption = read_caption(text)
    assert caption is not None, text
    return caption


def _of_nouns(extra: Sequence[tuple[str, Attributes]], pictures: Sequence[Image.Image]) -> dict[str, list[Image.Image]]:
    groups: dict[str, list[Image.Image]] = {}
    for (_, shown), picture in zip(extra, pictures, strict=True):
        groups.setdefault(shown.noun, []).append(picture)
    return groups


if __name__ == "__main__":
    main()
