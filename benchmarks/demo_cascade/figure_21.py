"""Figure 21 as a measurement: super-resolution that is not fine-tuned, and fine-tuned with noise of several variances.

    python -m benchmarks.demo_cascade.figure_21 demo_if_ii --out runs/figure_21

Of each subject in `benchmarks/quality/subjects` one photo is held out. Its low-resolution version is enlarged by the
stage as it is, and fine-tuned on the other photos with noise augmentation of 1e-2 (a positive control: that much must
blur), 1e-3 and 1e-5; all start from the same noise. Enlarging without a model stands beside them. Compared with the
photo itself: PSNR, and the energy above half of what the low-resolution picture can hold (below 1: blurred; above 1:
invented). Written to `rows.json`, and printed as a table of means and of paired differences to 1e-5, with 95 %
intervals over subjects.
"""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from benchmarks.quality.statistics import mean_of, paired_difference
from lowmem_db.config.loading import load_config
from lowmem_db.data.photos import read_photo
from lowmem_db.engine.enlarging import Stage, find_stages
from lowmem_db.evaluation.metrics import Score
from lowmem_db.objective.low_resolution import reduced
from lowmem_db.run.run import train
from lowmem_db.sampling.images import labelled_grid, to_images, to_pixels

SUBJECTS = Path(__file__).parents[1] / "quality" / "subjects"
VARIANCES = ("1e-2", "1e-3", "1e-5")
REFERENCE, UNTUNED, BILINEAR = "1e-5", "not fine-tuned", "bilinear"
METRICS = ("PSNR", "high band")
Rows = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Figures by subject, setting and metric."""


def psnr(image: Image.Image, truth: Image.Image) -> float:
    """Returns the peak signal-to-noise ratio in decibels."""
    error = np.square(np.asarray(image, np.float64) - np.asarray(truth, np.float64)).mean()
    return float(10 * math.log10(255**2 / max(error, 1e-9)))


def high_band(image: Image.Image, truth: Image.Image, low_side: int) -> float:
    """Returns the energy above half of the low-resolution picture's highest frequency, as a share of the truth's."""

    def energy(picture: Image.Image) -> float:
        values = np.asarray(picture.convert("L"), np.float64)
        spectrum = np.abs(np.fft.fft2(values - values.mean())) ** 2
        rows, columns = (np.abs(np.fft.fftfreq(side)) for side in values.shape)
        above = np.maximum(rows[:, None], columns[None, :]) > 0.25 * low_side / values.shape[0]
        return float(spectrum[above].sum())

    return energy(image) / max(energy(truth), 1e-9)


def noun_of(subject: Path) -> str:
    """Returns the last word of a folder's name, without its number."""
    return subject.name.split("_")[-1].rstrip("0123456789")


def fine_tuned(args: argparse.Namespace, subject: Path, photos: Path, variance: str) -> Stage:
    """Returns the stage, fine-tuned on a folder of photos."""
    fields = {
        "model.base": str(args.stage), "subject.instance_dir": str(photos), "prior.enabled": False,
        "subject.instance_prompt": f"a sks {noun_of(subject)}", "data.resolution": args.resolution,
        "super_resolution.noise_augmentation": float(variance), "training.max_train_steps": args.steps,
        "training.train_batch_size": 4, "training.learning_rate": args.lr, "device": "cpu",
        "logging.tensorboard": False, "output_dir": str(args.out / subject.name / variance),
        "cache_dir": str(args.out / "cache"),
    }  # fmt: skip
    run = train(load_config(None, list(fields.items())))
    (stage,) = find_stages([str(run.root)])
    return stage


def measure(args: argparse.Namespace, subject: Path) -> tuple[dict[str, dict[str, float]], list[Image.Image]]:
    """Returns the figures of one subject by setting, and the pictures: truth, enlarged low resolution, settings."""
    side = args.resolution
    truth, *others = (ImageOps.fit(read_photo(file), (side, side)) for file in sorted(subject.iterdir()))
    photos = args.out / subject.name / "photos"
    photos.mkdir(parents=True, exist_ok=True)
    for number, photo in enumerate(others):
        photo.save(photos / f"{number}.png")
    (untuned,) = find_stages([str(args.stage)])
    low_side = untuned.low_resolution.resolution
    (small,) = to_images(reduced(to_pixels([truth]), low_side))
    found, pictures = {}, [truth]

    def add(setting: str, image: Image.Image) -> None:
        found[setting] = {"PSNR": psnr(image, truth), "high band": high_band(image, truth, low_side)}
        pictures.append(image)

    add(BILINEAR, small.resize((side, side), Image.Resampling.BILINEAR))
    for setting in (UNTUNED, *VARIANCES):
        stage = untuned if setting == UNTUNED else fine_tuned(args, subject, photos, setting)
        prompt = f"a {noun_of(subject)}" if setting == UNTUNED else f"a sks {noun_of(subject)}"
        ((image,),) = stage.enlarge(
            [[small]], [prompt], seed=0, number=1, device=torch.device("cpu"), dtype=torch.float32
        )
        add(setting, image)
    return found, pictures


def table(rows: Rows) -> str:
    """Returns a table in Markdown: a row for each setting."""
    lines = [
        "| setting | " + " | ".join(f"{metric} | against {REFERENCE}" for metric in METRICS) + " |",
        "|---" * 5 + "|",
    ]
    for setting in (BILINEAR, UNTUNED, *VARIANCES):
        cells = []
        for metric in METRICS:
            values, reference = (
                {(name, 0): own[each][metric] for name, own in rows.items()} for each in (setting, REFERENCE)
            )
            difference = paired_difference(values, reference)
            cells += [in_words(mean_of(values)), "" if setting == REFERENCE else in_words(difference, sign="+")]
        lines.append(f"| {setting} | {' | '.join(cells)} |")
    return "\n".join(lines)


def in_words(score: Score, sign: str = "") -> str:
    """Returns a mean with its interval."""
    if score.value is None:
        return "-"
    interval = "" if score.interval is None else f" ({score.interval[0]:{sign}.2f} to {score.interval[1]:{sign}.2f})"
    return f"{score.value:{sign}.2f}{interval}"


def main() -> None:
    """Measures all subjects and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", type=Path, help="a super-resolution stage: demo_if_ii, or a folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--subjects", type=Path, default=SUBJECTS)
    parser.add_argument("--only", nargs="+", help="names of subjects; all by default")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=3e-4)
    args = parser.parse_args()
    rows, sheet = {}, []
    found = sorted(folder for folder in args.subjects.iterdir() if folder.is_dir())
    for subject in (folder for folder in found if args.only is None or folder.name in args.only):
        rows[subject.name], pictures = measure(args, subject)
        sheet.append((f"{subject.name}: photo, its low resolution, {UNTUNED}, {', '.join(VARIANCES)}", pictures))
        (args.out / "rows.json").write_text(json.dumps(rows, indent=1))
    labelled_grid(sheet).save(args.out / "sheet.png")
    print(table(rows))


if __name__ == "__main__":
    main()
