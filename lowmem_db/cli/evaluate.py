"""``lowmem-db evaluate``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from lowmem_db.evaluation.folders import Limits


def evaluate(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_OR_IMAGES",
            help="A run, a folder of runs, or a folder of images by any tool. With --pairs: two folders of images. "
            "With --tally: files of answers.",
        ),
    ],
    real: Annotated[
        Path | None, typer.Option(help="Photos of the subject, or a folder with a folder of photos for each subject.")
    ] = None,
    class_images: Annotated[
        Path | None, typer.Option(help="Images that were drawn for the prompt of the class, for PRES.")
    ] = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            help="en0 (no network), captions (no network, simple drawings alone), dino, clip, lpips, or paper for the "
            "last three; NAME=FOLDER_OR_HUB_ID chooses the model. May be given again.",
            show_default="en0",
        ),
    ] = None,
    subjects: Annotated[
        str | None, typer.Option(help="So many subjects, or their names with commas between them.")
    ] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="So many prompts, the first ones.")] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Images of each prompt: drawn of a run (4), read of a folder (all).")
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="Suite of prompts for a run; the paper's for its class by default.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Prompts for a run instead of a suite, one a line.")] = None,
    identifier: Annotated[str | None, typer.Option(help="Rare token of the subject; read from a run.")] = None,
    class_noun: Annotated[str | None, typer.Option(help="Class of the subject; read from a run.")] = None,
    num_class_images: Annotated[
        int | None, typer.Option(min=0, help="Images drawn of a run for the prompt of the class, for PRES (16).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of images, bootstrap and questionnaire.")] = 0,
    sampler: Annotated[
        Literal["ddim", "dpm_solver", "ddpm"] | None, typer.Option(help="That of the run's samples by default.")
    ] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option(min=1, help="Those of the run's samples by default.")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(min=0.0, help="That of the run's samples by default.")] = None,
    resolution: Annotated[
        int | None, typer.Option(min=8, help="Pixels of a side; those of the run by default.")
    ] = None,
    precision: Annotated[
        Literal["fp32", "fp16", "bf16"] | None, typer.Option(help="fp16 on CUDA devices by default.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    shard: Annotated[
        str | None, typer.Option(help="Draw one part of a run's images, such as 1/4, and score nothing.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for images, contact sheets, evaluation.json or the page.")
    ] = Path("evaluation"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Write the paper's questionnaire about two folders of images, as a page.")
    ] = False,
    num_pairs: Annotated[int, typer.Option(min=1, help="Comparisons of the questionnaire.")] = 25,
    tally: Annotated[bool, typer.Option("--tally", help="Count answers to a questionnaire.")] = False,
) -> None:
    """Say how good a result is, with the metrics and the protocol of the DreamBooth paper.

    [bold]lowmem-db evaluate runs/dog[/bold] draws 4 images of each of 25 prompts and compares them with the photos of
    the run; a stopped evaluation goes on where it was. [bold]lowmem-db evaluate IMAGES --real PHOTOS[/bold] compares
    images that any tool has drawn.
    """
    if tally:
        _print_tally(paths, as_json)
        return

    from lowmem_db import environment
    from lowmem_db.errors import DataError
    from lowmem_db.evaluation.folders import Limits, find_subjects, parse_subjects
    from lowmem_db.sampling.images import make_folder

    limits = Limits(subjects=parse_subjects(subjects), num_prompts=prompts, num_images=images)
    if pairs:
        _write_page(paths, real, limits, output, num_pairs, seed)
        return

    from lowmem_db.evaluation.encoders import find_encoders
    from lowmem_db.evaluation.protocol import (
        NUM_CLASS_IMAGES,
        NUM_IMAGES,
        Drawing,
        PromptChoice,
        find_runs,
        holds_runs,
        parse_shard,
        refuse_unused,
    )
    from lowmem_db.models.saving import DTYPES

    if len(paths) != 1:
        raise DataError(f"RUN_OR_IMAGES: {len(paths)} are given; allowed: one, or two with --pairs")
    where = environment.resolve_device(device)
    parse_shard(shard)
    encoders = encoder or ["en0"]
    if not holds_runs(paths[0]):
        of_runs = {
            "--shard": shard, "--suite": suite, "--prompt-file": prompt_file, "--identifier": identifier,
            "--class-noun": class_noun, "--num-class-images": num_class_images, "--sampler": sampler,
            "--num-inference-steps": num_inference_steps, "--guidance-scale": guidance_scale,
            "--resolution": resolution, "--precision": precision,
        }  # fmt: skip
        refuse_unused(of_runs, f"{paths[0]} holds no run, and nothing is drawn")
        found = find_encoders(encoders)
        compared = find_subjects(paths[0], real, class_images, limits)
        make_folder(output)
        _score(compared, found, where, output, seed=seed, as_json=as_json)
        return
    refuse_unused({"--class-images": class_images}, f"{paths[0]} is a run, whose class images are drawn")
    found = find_encoders(encoders)
    choice = PromptChoice(suite=suite, prompt_file=prompt_file, identifier=identifier, class_noun=class_noun)
    runs = find_runs(paths[0], choice, limits, real)
    make_folder(output)
    drawing = Drawing(
        sampler=sampler,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        num_prompts=prompts,
        num_images=images or NUM_IMAGES,
        num_class_images=NUM_CLASS_IMAGES if num_class_images is None else num_class_images,
        resolution=resolution,
        seed=seed,
        device=where,
        dtype=DTYPES[precision or ("fp16" if where.type == "cuda" else "fp32")],
    )
    if _draw(runs, drawing, output, shard):
        compared = [run.drawn(output, drawing) for run in runs]
        _score(compared, found, where, output, seed=seed, as_json=as_json)


def _draw(runs: list[Any], drawing: Any, output: Path, shard: str | None) -> bool:
    """Draw what is missing; return whether it is to be scored."""
    from lowmem_db.evaluation.protocol import draw_runs, parse_shard

    num_missing = draw_runs(runs, output, drawing, parse_shard(shard))
    if shard is None:
        return True
    typer.echo(f"shard {shard} is done, {num_missing} images of other shards are missing; then leave out --shard")
    return False


def _score(compared: list[Any], encoders: Any, device: Any, output: Path, *, seed: int, as_json: bool) -> None:
    from lowmem_db.evaluation.report import evaluate as score
    from lowmem_db.evaluation.report import write_report

    report = score(compared, encoders, device, seed=seed)
    write_report(output, report, compared)
    if as_json:
        _print_json(report)
    else:
        _print_report(report, output)


def _print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, indent=2))


def _print_report(report: dict[str, Any], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from lowmem_db.evaluation.report import comparison_rows, metric_rows, remarks

    out = Console(highlight=False)
    header, *rows = metric_rows(report)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    out.print(table)
    for remark in remarks(report):
        out.print(remark, markup=False)
    header, *rows = comparison_rows(report)
    if rows:
        table = Table(*header, title="beside Table 1 of arXiv:2208.12242")
        for row in rows:
            table.add_row(*row)
        out.print(table)
    typer.echo(output / "evaluation.json")


def _write_page(
    paths: list[Path], real: Path | None, limits: "Limits", output: Path, num_pairs: int, seed: int
) -> None:
    from lowmem_db.evaluation.folders import find_subjects
    from lowmem_db.evaluation.questionnaire import check_methods, find_pairs, write_questionnaire
    from lowmem_db.sampling.images import make_folder

    names = check_methods(paths)
    one, other = (find_subjects(path, real, None, limits) for path in paths)
    chosen = find_pairs(one, other, num_pairs=num_pairs, seed=seed)
    make_folder(output)
    num_questions = write_questionnaire(output / "questionnaire.html", names, chosen, seed=seed)
    typer.echo(f"{output / 'questionnaire.html'}: {num_questions} questions about {len(chosen)} pairs of images")


def _print_tally(files: list[Path], as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from lowmem_db.evaluation.tally import tally, tally_rows

    result = tally(files)
    if as_json:
        _print_json(result)
        return
    header, *rows = tally_rows(result)
    table = Table(*header, title=f"{result['num_raters']} people, decided by majority")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)
