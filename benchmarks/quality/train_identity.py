"""Fits the projection behind ``--encoder identity`` on composed drawings, and judges it on nouns it never saw.

    python -m benchmarks.quality.train_identity --drawings DRAWINGS --photos PHOTOS \
        --out lowmem_db/evaluation/identity_projection

DRAWINGS is what ``benchmarks.demo_base.fetch`` leaves, PHOTOS ``dataset/`` of github.com/google/dreambooth. Every
drawing is shown on several backgrounds, in several sizes, some blurred. Linear discriminant analysis of the features of
EfficientNet-Lite0 keeps the directions in which drawings differ more than views of one of them do. Drawings of the
nouns of the ablations' subjects are left out; how well it tells these apart is judged, beside the features as they are.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.demo_base.captions import Attributes
from benchmarks.demo_base.nouns import CLASSIFIER_STYLE, HELD_OUT_STYLE, noun_of_slug
from benchmarks.demo_base.render import SIZE, compose
from benchmarks.demo_base.scenes import PLAIN, SCENES
from benchmarks.quality.make_subjects import SLUGS, VIEWS
from benchmarks.quality.subject_separation import separation
from benchmarks.quality.subjects import SUBJECTS
from benchmarks.quality.train_caption_classifier import soften
from lowmem_db.data.photos import read_photo
from lowmem_db.evaluation.encoders import EfficientNetEncoder, find_encoders
from lowmem_db.evaluation.folders import scan_pictures
from lowmem_db.evaluation.identity import ACCURACY_FILE, NUM_DIRECTIONS, WEIGHTS_FILE
from lowmem_db.evaluation.metrics import cosine_similarities

SHRINKAGE = 1.0
"""How much of the mean variance is added to the spread of views in every direction."""
JUDGED_STYLES = (HELD_OUT_STYLE, "noto", "fxemoji", "twemoji")
ONE_CLASS = {
    "photographed dogs": ("dog", "dog2", "dog3", "dog5", "dog7", "dog8"),
    "photographed toys": ("rc_car", "robot_toy", "duck_toy", "monster_toy", "bear_plushie", "grey_sloth_plushie"),
}
Embed = Callable[[Sequence[Image.Image]], Float[Tensor, "n d"]]


def judged_nouns() -> list[str]:
    """Return the nouns of all drawn subjects."""
    return [subject.noun for subject in SUBJECTS if subject.kind == "drawn"]


def find_drawings(folder: Path) -> tuple[list[Path], dict[str, list[Path]]]:
    """Return the drawings that are learned from, and those of each noun that is judged."""
    learned, judged = [], {noun: [] for noun in judged_nouns()}
    subjects = {f"{HELD_OUT_STYLE}/{slug}" for slug in SLUGS.values()}
    for path in sorted(folder.glob("*/*.png")):
        noun, style = noun_of_slug(path.stem), path.parent.name
        if noun in judged:
            judged[noun] += [path] if style in JUDGED_STYLES else []
        elif noun is not None and style != CLASSIFIER_STYLE and f"{style}/{path.stem}" not in subjects:
            learned.append(path)
    return learned, judged


def read_drawing(path: Path) -> Image.Image:
    """Return an RGBA cut-out."""
    return Image.open(path).convert("RGBA").resize((SIZE, SIZE))


def views_of(drawing: Image.Image, count: int, rng: random.Random) -> list[Image.Image]:
    """Return pictures of one drawing that differ in all but the drawing."""
    backgrounds = [*PLAIN, *SCENES]
    shown = [
        Attributes("drawing", background=rng.choice(backgrounds), size=rng.choice(("small", None, None, "large")))
        for _ in range(count)
    ]
    return [soften(compose(drawing, one, rng), rng) for one in shown]


def discriminant_directions(
    features: Float[Tensor, "drawings views d"], count: int, shrinkage: float = SHRINKAGE
) -> Float[Tensor, "d directions"]:
    """Return linear discriminant analysis: columns in which drawings differ most, views of one having unit variance."""
    num_drawings, num_views, size = features.shape
    of_drawings = features.mean(dim=1)
    spread = (features - of_drawings[:, None]).reshape(-1, size)
    within = spread.T @ spread / (num_drawings * (num_views - 1))
    within += shrinkage * within.trace() / size * torch.eye(size, dtype=features.dtype)
    centred = of_drawings - of_drawings.mean(dim=0)
    values, vectors = torch.linalg.eigh(within)
    whitening = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    _, directions = torch.linalg.eigh(whitening @ (centred.T @ centred / num_drawings) @ whitening)
    return whitening @ directions[:, -count:]


def judge(sets: dict[str, tuple[Tensor, np.ndarray]], projection: Tensor) -> dict[str, dict[str, float]]:
    """Return for each set of one class the AUC of the features as they are, and projected."""
    found = {}
    for name, (features, labels) in sets.items():
        before, after = (
            separation(cosine_similarities(each, each).numpy(), labels) for each in (features, features @ projection)
        )
        found[name] = {
            "auc_pooled": round(before["auc"], 3),
            "auc": round(after["auc"], 3),
            "nearest_is_same_pooled": round(before["nearest_is_same"], 3),
            "nearest_is_same": round(after["nearest_is_same"], 3),
            "pictures": len(labels),
        }
    return found


def read_sets(judged: dict[str, list[Path]], photos: Path, embed: Embed) -> dict[str, tuple[Tensor, np.ndarray]]:
    """Return features and subjects of each set of one class."""
    sets = {}
    for noun, paths in judged.items():
        pictures = [
            compose(read_drawing(path), Attributes(noun, **view), random.Random(number))
            for path in paths
            for number, view in enumerate(VIEWS)
        ]
        labels = [f"{path.parent.name}/{path.stem}" for path in paths for _ in VIEWS]
        sets[f"drawn: {noun}"] = (embed(pictures).double(), np.array(labels))
    for name, subjects in ONE_CLASS.items():
        files = [(subject, file) for subject in subjects for file in scan_pictures(photos / subject, "PHOTOS")]
        pictures = [read_photo(file) for _, file in files]
        sets[name] = (embed(pictures).double(), np.array([subject for subject, _ in files]))
    return sets


def main() -> None:
    """Composes views, fits, writes the projection and how well it tells subjects apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drawings", type=Path, required=True, help="folder with STYLE/SLUG.png cut-outs")
    parser.add_argument("--photos", type=Path, required=True, help="folder with a folder of photos for each subject")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--views", type=int, default=6, help="of each drawing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    embed = EfficientNetEncoder(find_encoders(["en0"])[0], torch.device("cpu")).embed_images
    learned, judged = find_drawings(arguments.drawings)
    views = [
        embed(views_of(read_drawing(path), arguments.views, random.Random(number)))
        for number, path in enumerate(learned)
    ]
    print(f"{len(learned)} drawings read in {time.perf_counter() - started:.0f} s", flush=True)
    projection = discriminant_directions(torch.stack(views).double(), NUM_DIRECTIONS)
    projection = (projection / projection.norm(dim=0).mean()).half()
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file({"projection": projection.contiguous()}, arguments.out / WEIGHTS_FILE)
    found = judge(read_sets(judged, arguments.photos, embed), projection.double())
    accuracy = {"drawings": len(learned), "views": arguments.views, "judged": found}
    (arguments.out / ACCURACY_FILE).write_text(json.dumps(accuracy, indent=2) + "\n")
    print(json.dumps(accuracy))
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
