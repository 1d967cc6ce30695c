"""Writes into rows what the pictures of their runs say by the metrics of today; what both have must be equal.

    python -m benchmarks.quality.rescore --work runs/quality

Rows whose pictures are not in ``WORK/pictures`` stay as they are.
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image

from benchmarks.quality.contact_sheet import read_strip
from benchmarks.quality.lists import VARIANTS
from benchmarks.quality.results import RUNS_FILE, Row, read_rows
from benchmarks.quality.runs import Drawn, base_key, recipe_of, scores_of
from benchmarks.quality.subjects import BY_NAME
from benchmarks.quality.variants import NUM_IMAGES, Variant
from lowmem_db.models.finding import find_model
from lowmem_db.storage.atomic import write_text


def drawn_from(images: list[Image.Image], variant: Variant) -> Drawn:
    """Return the images of a strip by what they show."""
    plain, *contexts, of_class = (images[first : first + NUM_IMAGES] for first in range(0, len(images), NUM_IMAGES))
    return Drawn(plain=plain, contexts=dict(zip(variant.contexts, contexts, strict=True)), of_class=of_class)


def rescored(row: Row, work: Path) -> Row:
    """Return a row with its metrics, and none that are no longer measured.

    Raises:
        SystemExit: The pictures give another figure than the row has.
    """
    variant = VARIANTS[row["variant"]]
    strip = work / "pictures" / f"{row['variant']}-{row['subject']}-{row['seed']}.png"
    if not strip.is_file() or row["recipe"] != recipe_of(variant):
        return row
    scores = scores_of(drawn_from(read_strip(strip), variant), BY_NAME[row["subject"]], variant, work)
    for metric in scores.keys() & row.keys():
        if abs(scores[metric] - row[metric]) > 1e-4:
            raise SystemExit(f"{strip}: {metric} is {scores[metric]}, and {row[metric]} in the row: not its pictures")
    kept = {name: row[name] for name in ("variant", "subject", "seed", "base")}
    losses = {name: loss for name, loss in row.items() if name.startswith("loss_")}
    return kept | scores | losses | {name: row[name] for name in ("seconds", "recipe")}


def main() -> None:
    """Go through all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality"))
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="folder of the runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base = base_key(find_model("demo"))
    rows = [rescored(row, arguments.work) if row["base"] == base else row for row in read_rows(arguments.out)]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text(arguments.out / RUNS_FILE, "".join(lines))


if __name__ == "__main__":
    main()
