"""The ablations of DreamBooth (arXiv:2208.12242) on the demo base.

    python -m benchmarks.quality.ablations table_3_places --out benchmarks/results/quality
    python -m benchmarks.quality.ablations --list

Runs that several ablations share are done once: a row that exists is not computed again. Rows of another base or recipe
are refused. ``write_quality`` makes tables of the rows.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.contact_sheet import save_strip
from benchmarks.quality.lists import ABLATIONS, TODAY, VARIANTS
from benchmarks.quality.results import RUNS_FILE, Row, append_row, find_row, read_rows
from benchmarks.quality.runs import Drawn, base_key, recipe_of, run
from benchmarks.quality.subjects import BY_NAME, Subject
from benchmarks.quality.variants import Ablation, Variant, runs_of
from lowmem_db.models.finding import find_model

Run = Callable[[Variant, Subject, int, Path], tuple[dict[str, Any], Drawn]]


def run_ablation(
    ablation: Ablation,
    out: Path,
    work: Path,
    *,
    base: str,
    num_subjects: int | None = None,
    num_seeds: int | None = None,
    until: float = float("inf"),
    run: Run = run,
) -> int:
    """Do the runs of an ablation that have no row yet; return how many were done.

    Args:
        ablation: The ablation.
        out: Result folder.
        work: Folder for class images, latents and pictures.
        base: Key of the base.
        num_subjects: How many of its subjects, in order. None: all.
        num_seeds: How many of its seeds, in order. None: all.
        until: No run is begun after this time, in seconds since the epoch.
        run: Does one run.

    Raises:
        SystemExit: A row was measured on another base or with another recipe.
    """
    done = 0
    for name, subject, seed in runs_of(ablation, VARIANTS):
        if subject not in ablation.subjects[:num_subjects] or seed not in ablation.seeds[:num_seeds]:
            continue
        if time.time() > until:
            break
        recipe = recipe_of(VARIANTS[name])
        row: Row = {"variant": name, "subject": subject, "seed": seed, "base": base}
        if (found := find_row(read_rows(out), variant=name, subject=subject, seed=seed)) is not None:
            _check(found, base, recipe, out)
            continue
        measured, drawn = run(VARIANTS[name], BY_NAME[subject], seed, work)
        save_strip(drawn, work / "pictures" / f"{name}-{subject}-{seed}.png")
        append_row(out, {**row, **measured, "recipe": recipe})
        print(f"{name} {subject} {seed}: {measured}", flush=True)
        done += 1
    return done


def _check(row: Row, base: str, recipe: dict[str, Any], out: Path) -> None:
    for name, found, wanted in (("base", row["base"], base), ("recipe", row["recipe"], recipe)):
        if found != wanted:
            raise SystemExit(
                f"{out / RUNS_FILE}: {row['variant']} {row['subject']} {row['seed']} was measured with {name} {found}, "
                f"not {wanted}; choose another --out, or delete the row"
            )


def main() -> None:
    """Run ablations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ablations", nargs="*", choices=[*ABLATIONS, []], help="by default those of today's base")
    parser.add_argument("--list", action="store_true", help="print the ablations and stop")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality"))
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="class images, latents and pictures")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after this time")
    parser.add_argument("--num-subjects", type=int, help="only the first subjects of each ablation")
    parser.add_argument("--num-seeds", type=int, help="only the first seeds of each ablation")
    arguments = parser.parse_args()
    if arguments.list:
        for name, ablation in ABLATIONS.items():
            print(f"{name}: {ablation.title} ({len(runs_of(ablation, VARIANTS))} runs)")
        return
    until = time.time() + 60 * arguments.minutes
    torch.set_num_threads(1)
    base = base_key(find_model("demo"))
    for name in arguments.ablations or TODAY:
        run_ablation(
            ABLATIONS[name],
            arguments.out,
            arguments.work,
            base=base,
            num_subjects=arguments.num_subjects,
            num_seeds=arguments.num_seeds,
            until=until,
        )


if __name__ == "__main__":
    main()
