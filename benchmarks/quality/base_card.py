"""How well a base model follows captions, and how diverse its samples of a noun are, beside real composed drawings.

    python benchmarks/quality/base_card.py --base lowmem_db/models/demo/base --drawings DRAWINGS \
        --out benchmarks/results/quality/base_card.json

Noun, colour and background are named by the classifier of ``--encoder captions``; what it finds in the drawings is the
ceiling, and its accuracy on a style that it has not seen stands beside. Position is where the centre of mass of the
foreground is. A caption's samples have the same seeds whatever else is sampled, so that ``--against`` an earlier card
compares two bases on the captions that both have; name what a base knows with ``--nouns`` and ``--backgrounds``.
"""

import argparse
import json
import random
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import cycle, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from benchmarks.demo_base.captions import POSITIONS, Attributes, article, background_phrase
from benchmarks.demo_base.contact_sheet import draw_sheet, load_pipeline
from benchmarks.demo_base.nouns import NOUNS
from benchmarks.demo_base.render import HUES, SIZE, compose
from benchmarks.demo_base.scenes import PLAIN, SCENES
from benchmarks.quality.train_caption_classifier import Drawing, load_drawings
from lowmem_db.evaluation.captions import LABELS, Caption, caption_pairs, foreground_centre, read_accuracy, read_caption
from lowmem_db.evaluation.encoders import Encoder, find_encoders, load_encoder
from lowmem_db.evaluation.metrics import cosine_distances, summarise
from lowmem_db.storage.run_folder import write_json

COLOURED = ("car", "flower", "cup")
PLACED = ("dog", "cat", "car")
DIVERSE = ("dog", "cat", "clock", "bird", "car", "flower")
MARGIN = 0.08
"""How far the centre of mass must be from the middle, as a share of the side."""
BATCH = 16

Followed = dict[str, dict[str, list[float]]]
"""By attribute and caption, one for each sample that shows what the caption says, else zero."""


def captioned(nouns: Sequence[str], backgrounds: Sequence[str], rng: random.Random) -> list[tuple[str, Attributes]]:
    """Return captions of every noun on white, of colours, backgrounds, scenes and positions, with what they say."""
    plain = [(article(noun), Attributes(noun)) for noun in nouns]
    coloured = [
        (article(f"{colour} {noun}"), Attributes(noun, colour=colour))
        for noun in _allowed(COLOURED, nouns)
        for colour in HUES
    ]
    on_background = [
        (f"{article(noun)} {background_phrase(name, rng)}", Attributes(noun, background=name))
        for noun, name in zip(cycle(_allowed(PLACED, nouns)), backgrounds, strict=False)
    ]
    at_position = [
        (
            f"{article(noun)} {'on' if side in ('left', 'right') else 'at'} the {side}",
            Attributes(noun, position=side, size="small"),
        )
        for noun in _allowed(PLACED, nouns)
        for side in POSITIONS
    ]
    return plain + coloured + on_background + at_position


def seeds_of(captions: Sequence[str]) -> list[int]:
    """Return a seed for each picture: that of its caption, and one more for each repetition."""
    times: Counter[str] = Counter()
    seeds = []
    for caption in captions:
        seeds.append(zlib.crc32(caption.encode()) + times[caption])
        times[caption] += 1
    return seeds


@torch.no_grad()
def sample(
    pipeline: StableDiffusionPipeline, captions: Sequence[str], steps: int, guidance: float
) -> list[Image.Image]:
    """Return one picture of each caption."""
    pictures: list[Image.Image] = []
    seeds = seeds_of(captions)
    for start in range(0, len(captions), BATCH):
        batch = list(captions[start : start + BATCH])
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + BATCH]]
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


def is_at(picture: Image.Image, position: str) -> bool:
    """Return whether the foreground's centre of mass is on that side of the middle."""
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float()
    x, y = (foreground_centre(pixels)[0] - 0.5).tolist()
    return {"left": -x, "right": x, "top": -y, "bottom": y}[position] > MARGIN


def follow(encoder: Encoder, captions: Sequence[tuple[str, Attributes]], pictures: Sequence[Image.Image]) -> Followed:
    """Return which pictures show what their captions say; the pictures of a caption follow one another."""
    named, drawn = iter(encoder.name_images(pictures)), iter(pictures)
    found: Followed = {attribute: {} for attribute in (*LABELS, "position")}
    for (text, shown), group in groupby(captions):
        size = len(list(group))
        answers = [next(named) for _ in range(size)]
        images = [next(drawn) for _ in range(size)]
        for attribute, pairs in caption_pairs([_read(text)], [answers]).items():
            if pairs:
                found[attribute][text] = pairs[0].tolist()
        if shown.position:
            found["position"][text] = [float(is_at(image, shown.position)) for image in images]
    return found


def summary(followed: Followed) -> dict[str, Any]:
    """Return the share of pictures that follow, by attribute, with its interval over captions."""
    scores = {name: summarise({"": [torch.tensor(x) for x in of.values()]}) for name, of in followed.items()}
    return {
        name: {"value": score.value, "interval": score.interval, "num_images": score.num_pairs}
        for name, score in scores.items()
    }


def difference(followed: Followed, earlier: Followed) -> dict[str, Any]:
    """Return how much larger the shares are than those of an earlier card, on the captions that both have."""
    shared = {name: sorted(of.keys() & earlier.get(name, {}).keys()) for name, of in followed.items()}
    return summary(
        {
            name: {text: [np.mean(followed[name][text]) - np.mean(earlier[name][text])] for text in texts}
            for name, texts in shared.items()
        }
    )


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
    parser.add_argument("--backgrounds", nargs="+", default=[*PLAIN, *SCENES], help="the same")
    parser.add_argument("--against", type=Path, help="card of another base, to compare with")
    parser.add_argument("--samples", type=int, default=2, help="of each caption")
    parser.add_argument("--diverse", type=int, default=4, help="samples of each noun for EN0-DIV")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--sheet", type=Path, help="picture of all samples to write, .png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    rng = random.Random(0)
    captions = [one for one in captioned(args.nouns, args.backgrounds, rng) for _ in range(args.samples)]
    diverse = [noun for noun in DIVERSE if noun in args.nouns]
    extra = [(article(noun), Attributes(noun)) for noun in diverse for _ in range(args.diverse)]
    wanted = captions + extra
    samples = sample(load_pipeline(args.base), [caption for caption, _ in wanted], args.steps, args.guidance)
    composed = draw(load_drawings(args.drawings), [shown for _, shown in wanted], rng)
    encoder = load_encoder(find_encoders(["captions"])[0], torch.device("cpu"))
    followed = follow(encoder, captions, samples[: len(captions)])
    card = {
        "settings": {"sampler": "ddim", "steps": args.steps, "guidance": args.guidance, "resolution": SIZE},
        "num_captions": len(captions) // args.samples,
        "samples_per_caption": args.samples,
        "classifier_accuracy": {name: read_accuracy()[name] for name in LABELS},
        "samples": summary(followed),
        "drawings": summary(follow(encoder, captions, composed[: len(captions)])),
        "EN0-DIV": {
            name: diversity(encoder, diverse, _of_nouns(extra, pictures[len(captions) :]))
            for name, pictures in (("samples", samples), ("drawings", composed))
        },
        "followed": followed,
        "seconds": round(time.perf_counter() - started),
    }
    if args.against:
        card["difference"] = difference(followed, json.loads(args.against.read_text())["followed"])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, card)
    if args.sheet:
        draw_pairs(captions, samples, args.samples).save(args.sheet)
    print(json.dumps({name: part for name, part in card.items() if name != "followed"}))


def draw_pairs(
    captions: Sequence[tuple[str, Attributes]], samples: Sequence[Image.Image], per_caption: int
) -> Image.Image:
    """Return a sheet of all samples, those of a caption in a row."""
    starts = range(0, len(captions), per_caption)
    rows = [list(samples[start : start + per_caption]) for start in starts]
    return draw_sheet(rows, [captions[start][0] for start in starts], halves=4, label=150)


def _allowed(chosen: Sequence[str], nouns: Sequence[str]) -> list[str]:
    return [noun for noun in chosen if noun in nouns] or list(nouns[:1])


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
