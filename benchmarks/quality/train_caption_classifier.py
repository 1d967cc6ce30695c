"""Trains the classifier behind ``--encoder captions`` on composed drawings, and judges it on a style it never saw.

    python benchmarks/quality/train_caption_classifier.py --drawings DRAWINGS \
        --out lowmem_db/evaluation/caption_classifier

DRAWINGS is what ``benchmarks.demo_base.fetch`` leaves. It is trained on six of the base's seven styles and on one that
the base never sees. The style ``noto-v1``, with the designs held out from the base, is kept out of training; accuracies
are those on its drawings, half of them softened as samples are.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.demo_base.captions import Attributes
from benchmarks.demo_base.finish import vary_colours
from benchmarks.demo_base.nouns import CLASSIFIER_STYLE, HELD_OUT, HELD_OUT_STYLE, noun_of, noun_of_slug
from benchmarks.demo_base.render import HUES, SIZE, compose, draw_attributes
from benchmarks.demo_base.scenes import PLAIN, SCENES
from lowmem_db.evaluation.captions import (
    ACCURACY_FILE,
    LABELS,
    PIXELS,
    WEIGHTS_FILE,
    CaptionClassifier,
    load_classifier,
    noun_inputs,
    pixel_statistics,
)
from lowmem_db.evaluation.efficientnet_lite import EfficientNetLite0, normalise
from lowmem_db.evaluation.encoders import EfficientNetEncoder, find_encoders

NO_LABEL = -100
"""Colour of a drawing that was not tinted: nothing is learnt from it, as its own colours may be any."""
RIDGE = 1000.0
"""Weight of the penalty, in variances of the features; between 500 and 2000 it hardly matters."""

Drawing = tuple[str, str, Image.Image]


@dataclass(frozen=True)
class Pictures:
    """What heads are trained on: inputs, and for each attribute the number of its label or NO_LABEL."""

    features: Tensor
    statistics: Tensor
    labels: dict[str, Tensor]


def noun_of_design(key: str) -> str | None:
    """Return the noun of a drawing, also of those that the demo base never sees."""
    style, slug = key.split("/")
    return noun_of_slug(slug) if style == CLASSIFIER_STYLE or key in HELD_OUT else noun_of(key)


def load_drawings(folder: Path) -> list[Drawing]:
    """Return (key, noun, RGBA cut-out) of every drawing with a noun."""
    found = []
    for path in sorted(folder.glob("*/*.png")):
        key = f"{path.parent.name}/{path.stem}"
        if noun := noun_of_design(key):
            found.append((key, noun, Image.open(path).convert("RGBA").resize((SIZE, SIZE))))
    return found


def choose_attributes(noun: str, rng: random.Random) -> Attributes:
    """Choose what a picture shows, with colours and backgrounds more evenly than the demo base sees them."""
    colour = rng.choice(list(HUES)) if rng.random() < 0.6 else None
    names = ["white", "white", *(name for name in (*PLAIN, *SCENES) if name != colour)]
    return replace(draw_attributes(noun, False, rng), colour=colour, background=rng.choice(names))


def soften(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Return every second picture blurred as samples of the demo base are."""
    if rng.random() < 0.5:
        return picture
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 2.2)))


def disguise(cutout: Image.Image, rng: random.Random) -> Image.Image:
    """Return the cut-out warped and in other colours, so that its noun and not its design is learnt."""
    side, most = cutout.width, cutout.width * 0.12
    corners = [at + rng.uniform(-most, most) for at in (0, 0, 0, side, side, side, side, 0)]
    warped = cutout.transform(cutout.size, Image.Transform.QUAD, corners, Image.Resampling.BICUBIC)
    warped = warped.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        warped = warped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return vary_colours(warped, rng, hue=16)


def compose_pictures(
    drawings: Sequence[Drawing], number: int, rng: random.Random, is_disguised: bool = False
) -> tuple[list[Image.Image], list[Attributes]]:
    """Return pictures and what they show, every noun as often as the others."""
    by_noun: dict[str, list[Image.Image]] = {}
    for _, noun, cutout in drawings:
        by_noun.setdefault(noun, []).append(cutout)
    nouns = sorted(by_noun)
    shown = [choose_attributes(nouns[index % len(nouns)], rng) for index in range(number)]
    pictures = []
    for one in shown:
        cutout = rng.choice(by_noun[one.noun])
        cutout = disguise(cutout, rng) if is_disguised else cutout
        pictures.append(soften(compose(cutout, one, rng), rng))
    return pictures, shown


@torch.no_grad()
def read_pictures(
    network: EfficientNetLite0, pictures: Sequence[Image.Image], shown: Sequence[Attributes], glare: float = 0.0
) -> Pictures:
    """Return inputs and labels of composed pictures; statistics with up to `glare` more or less saturation."""
    generator = torch.Generator().manual_seed(0)
    features, statistics = [], []
    for start in range(0, len(pictures), 32):
        batch = np.stack([np.asarray(picture.resize((PIXELS, PIXELS))) for picture in pictures[start : start + 32]])
        pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).float()
        features.append(network(normalise(pixels)))
        saturation = 1 + glare * (1.5 * torch.rand(len(pixels), 1, 1, 1, generator=generator) - 0.5)
        grey = pixels.mean(1, keepdim=True)
        statistics.append(pixel_statistics((grey + saturation * (pixels - grey)).clamp(0, 255)))
    labels = {
        "noun": [one.noun for one in shown],
        "colour": [one.colour for one in shown],
        "background": [one.background for one in shown],
    }
    numbers = {
        name: torch.tensor([LABELS[name].index(value) if value else NO_LABEL for value in values])
        for name, values in labels.items()
    }
    return Pictures(torch.cat(features), torch.cat(statistics), numbers)


def fit_noun(data: Pictures) -> nn.Linear:
    """Return ridge regression onto the nouns: with few designs of each it names unseen ones better than a network."""
    inputs, wanted = noun_inputs(data.features), functional.one_hot(data.labels["noun"], len(LABELS["noun"])).float()
    middle, share = inputs.mean(0), wanted.mean(0)
    centred = inputs - middle
    penalty = RIDGE * centred.var() * torch.eye(centred.shape[1])
    layer = nn.Linear(centred.shape[1], len(share))
    layer.weight.data = torch.linalg.solve(centred.T @ centred + penalty, centred.T @ (wanted - share)).T
    layer.bias.data = -layer.weight.data @ middle
    return layer


def train(data: Pictures, *, epochs: int, seed: int) -> CaptionClassifier:
    """Return the noun's head by regression, the others trained with AdamW, cosine decay and label smoothing."""
    torch.manual_seed(seed)
    classifier = CaptionClassifier().train()
    heads = {"colour": classifier.colour, "background": classifier.background}
    parameters = [parameter for head in heads.values() for parameter in head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)
    size, batch = len(data.features), 128
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (-(-size // batch)))
    for _ in range(epochs):
        for chosen in torch.randperm(size).split(batch):
            losses = [
                functional.cross_entropy(
                    head(data.statistics[chosen]),
                    data.labels[name][chosen],
                    ignore_index=NO_LABEL,
                    label_smoothing=0.05,
                )
                for name, head in heads.items()
            ]
            optimizer.zero_grad()
            sum(losses, torch.zeros(())).backward()
            optimizer.step()
            schedule.step()
    classifier.noun.load_state_dict(fit_noun(data).state_dict())
    return classifier.eval()


@torch.no_grad()
def measure(classifier: CaptionClassifier, data: Pictures) -> dict[str, object]:
    """Return accuracies by attribute; those of the colour are of tinted drawings."""
    logits = classifier(data.features, data.statistics)
    is_right = {name: (logits[name].argmax(1) == data.labels[name]).float() for name in LABELS}
    tinted = data.labels["colour"] != NO_LABEL
    of_labels = {
        name: {
            label: round(float(is_right[name][data.labels[name] == number].mean()), 3)
            for number, label in enumerate(labels)
            if bool((data.labels[name] == number).any())
        }
        for name, labels in LABELS.items()
    }
    return {
        "noun": round(float(is_right["noun"].mean()), 3),
        "colour": round(float(is_right["colour"][tinted].mean()), 3),
        "background": round(float(is_right["background"].mean()), 3),
        "num_images": {"noun": len(tinted), "colour": int(tinted.sum()), "background": len(tinted)},
        "labels": of_labels,
    }


def main() -> None:
    """Composes pictures, trains, writes weights and accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drawings", type=Path, required=True, help="folder with STYLE/SLUG.png cut-outs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=4900, help="for training")
    parser.add_argument("--test-pictures", type=int, default=840)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    network = EfficientNetEncoder(find_encoders(["en0"])[0], torch.device("cpu")).network
    drawings = load_drawings(args.drawings)
    seen = [drawing for drawing in drawings if not drawing[0].startswith(f"{HELD_OUT_STYLE}/")]
    unseen = [drawing for drawing in drawings if drawing[0].startswith(f"{HELD_OUT_STYLE}/")]
    rng = random.Random(args.seed)
    fitted = read_pictures(network, *compose_pictures(seen, args.pictures, rng, is_disguised=True), glare=0.6)
    print(f"{args.pictures} pictures read in {time.perf_counter() - started:.0f} s", flush=True)
    judged = read_pictures(network, *compose_pictures(unseen, args.test_pictures, rng))
    classifier = train(fitted, epochs=args.epochs, seed=args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in classifier.state_dict().items()}
    save_file(weights, args.out / WEIGHTS_FILE)
    accuracy = measure(load_classifier(args.out), judged) | {
        "judged_on": f"composed drawings in the style {HELD_OUT_STYLE}, which was not trained on, half of them blurred",
        "num_designs": {"trained_on": len(seen), "judged_on": len(unseen)},
        "on_training_pictures": {name: measure(classifier, fitted)[name] for name in LABELS},
    }
    (args.out / ACCURACY_FILE).write_text(json.dumps(accuracy, indent=2) + "\n")
    print(json.dumps(accuracy))
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
