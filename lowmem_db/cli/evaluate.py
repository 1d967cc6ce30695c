"""``lowmem-db evaluate``."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lowmem_db.cli.modes import refuse_others
from lowmem_db.console import results
from lowmem_db.errors import DataError

_OF_PAIRS = {"num_pairs", "num_questionnaires", "kind"}
_LIMITS = {"real", "subjects", "prompts", "images"}


def evaluate(
    context: typer.Context,
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_OR_IMAGES",
            help="A run, a folder of runs, or a folder of images made by any tool. With --pairs: two folders of "
            "images. With --tally: files of answers.",
        ),
    ],
    real: Annotated[
        Path | None, typer.Option(help="Photos of the subject, or a folder with one folder of photos per subject.")
    ] = None,
    class_images: Annotated[Path | None, typer.Option(help="Images drawn for the class prompt, for PRES.")] = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            help="en0 and identity (no network), captions (no network, only for simple drawings), dino, clip, lpips, "
            "or paper for the last three; NAME=FOLDER_OR_HUB_ID chooses the model. Can be repeated.",
            show_default="en0",
        ),
    ] = None,
    subjects: Annotated[
        str | None, typer.Option(help="How many subjects to use, or their names separated by commas.")
    ] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Use only the first so many prompts.")] = None,
    images: Annotated[
        int | None,
        typer.Option(min=1, help="Images per prompt. Default: 4 are drawn for a run, all are read from a folder."),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="Prompt suite for a run. Default: the paper's suite for the class.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Prompts for a run instead of a suite, one per line.")
    ] = None,
    identifier: Annotated[str | None, typer.Option(help="Rare token of the subject. Default: that of the run.")] = None,
    class_noun: Annotated[str | None, typer.Option(help="Class of the subject. Default: that of the run.")] = None,
    num_class_images: Annotated[
        int | None, typer.Option(min=0, help="Images drawn for the class prompt of a run, for PRES. Default: 16.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of images, bootstrap and questionnaire.")] = 0,
    sampler: Annotated[
        Literal["ddim", "dpm_solver", "ddpm"] | None, typer.Option(help="Default: that of the run's samples.")
    ] = None,
    num_inference_steps: Annotated[int | None, typer.Option(min=1, help="Default: that of the run's samples.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(min=0.0, help="Default: that of the run's samples.")] = None,
    resolution: Annotated[
        int | None, typer.Option(min=8, help="Side length in pixels. Default: that of the run.")
    ] = None,
    precision: Annotated[
        Literal["fp32", "fp16", "bf16"] | None, typer.Option(help="Default: fp16 on CUDA devices, fp32 on the CPU.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    step: Annotated[
        str | None,
        typer.Option(metavar="N", help="Evaluate this checkpoint of a run. Default: the final model, or the newest."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Where the model is that a run was trained on, if it has moved.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(help="Draw one part of a run's images, such as 1/4, and score nothing.")
    ] = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder for images, contact sheets, evaluation.json or the questionnaire."),
    ] = Path("evaluation"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    pairs: Annotated[
        bool,
        typer.Option("--pairs", help="Write the paper's questionnaires about two folders of images as web pages."),
    ] = False,
    num_pairs: Annotated[int | None, typer.Option(min=1, help="Pairs in each questionnaire. Default: 25.")] = None,
    num_questionnaires: Annotated[
        int | None,
        typer.Option(min=1, help="Questionnaires of each study, with different pairs; 24 in the paper. Default: 1."),
    ] = None,
    kind: Annotated[
        Literal["subject", "prompt"] | None,
        typer.Option(
            help="Which of the paper's two studies: more like the subject, or like the prompt. Default: both."
        ),
    ] = None,
    tally: Annotated[bool, typer.Option("--tally", help="Count the answers to questionnaires.")] = False,
    correlate: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="IMAGES",
            help="With --tally: how metrics of the images go with the answers; give the two folders of --pairs, each "
            "with --correlate.",
        ),
    ] = None,
    failures: Annotated[
        bool,
        typer.Option(
            "--failures",
            help="For a run: also draw the subject without a context, and every prompt with the model before training, "
            "to tell lost contexts and entanglement (figure 9 of the paper) from what the model could never draw.",
        ),
    ] = False,
) -> None:
    """Measure how good a result is, with the metrics and the protocol of the DreamBooth paper.

    [bold]lowmem-db evaluate runs/dog[/bold] draws 4 images for each of 25 prompts and compares them with the photos of
    the run; an interrupted evaluation continues where it stopped. [bold]lowmem-db evaluate IMAGES --real PHOTOS[/bold]
    compares images made by any tool.
    """
    if not pairs:
        _refuse_without_pairs({"--num-pairs": num_pairs, "--num-questionnaires": num_questionnaires, "--kind": kind})
    if tally:
        of_correlation = {"correlate", "encoder", "device", *_LIMITS} if correlate else set()
        refuse_others(context, "--tally", {"paths", "tally", "as_json", *of_correlation})
        from lowmem_db.evaluation.tally import tally as count_answers

        result = count_answers(paths)
        if correlate:
            result["correlation"] = _correlation(paths, correlate, real, encoder, device, (subjects, prompts, images))
        _print_tally(result, as_json)
        return
    if correlate:
        raise DataError(
            "--correlate: belongs to answers of questionnaires; add --tally and their files, or leave it out"
        )

    from lowmem_db import api
    from lowmem_db.cli.steps import parse_step

    if pairs:
        refuse_others(context, "--pairs", {"paths", "pairs", "seed", "output", *_OF_PAIRS, *_LIMITS})
        from lowmem_db.evaluation.questionnaire import KINDS, NUM_PAIRS, StudyRequest

        request = StudyRequest(
            kinds=KINDS if kind is None else (kind,),
            num_questionnaires=num_questionnaires or 1,
            num_pairs=num_pairs or NUM_PAIRS,
            seed=seed,
        )
        _write_pages(paths, real, subjects, prompts, images, output, request)
        return
    if len(paths) != 1:
        raise DataError(f"RUN_OR_IMAGES: {len(paths)} given; allowed: one, or two with --pairs")
    report = api.evaluate(
        paths[0],
        real=real,
        class_images=class_images,
        encoders=encoder or ["en0"],
        subjects=subjects,
        num_prompts=prompts,
        num_images=images,
        suite=suite,
        prompt_file=prompt_file,
        identifier=identifier,
        class_noun=class_noun,
        num_class_images=num_class_images,
        seed=seed,
        sampler=sampler,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        resolution=resolution,
        precision=precision,
        device=device,
        shard=shard,
        failures=failures,
        output=output,
        step=None if step is None else parse_step(step),
        base=base,
    )
    if shard is not None:
        missing = report["num_missing"]
        typer.echo(
            f"shard {shard} is done; {missing} images of other shards are missing. When all are done, omit --shard"
        )
    elif as_json:
        _print_json(report)
    else:
        _print_report(report, output)


def _refuse_without_pairs(options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise DataError(f"{', '.join(given)}: belongs to questionnaires; add --pairs, or leave it out")


def _print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, indent=2))


def _print_report(report: dict[str, Any], output: Path) -> None:
    from rich.table import Table

    from lowmem_db.evaluation.report import comparison_rows, metric_rows, remarks, subject_rows

    out = results()

    def show(rows: list[list[str]], title: str | None = None) -> None:
        if len(rows) > 1:
            table = Table(*rows[0], title=title)
            for row in rows[1:]:
                table.add_row(*row)
            out.print(table)

    show(metric_rows(report))
    show(subject_rows(report))
    for remark in remarks(report):
        out.print(remark)
    show(comparison_rows(report), "compared with arXiv:2208.12242")
    typer.echo(output / "evaluation.json")


def _write_pages(
    paths: list[Path],
    real: Path | None,
    subjects: str | None,
    prompts: int | None,
    images: int | None,
    output: Path,
    request: Any,
) -> None:
    from lowmem_db.evaluation.folders import Limits, parse_subjects
    from lowmem_db.evaluation.questionnaire import write_studies

    limits = Limits(subjects=parse_subjects(subjects), num_prompts=prompts, num_images=images)
    for page, num_questions in write_studies(paths, real, limits, output, request):
        typer.echo(f"{page}: {num_questions} questions")


def _correlation(
    files: list[Path],
    folders: list[Path],
    real: Path | None,
    encoder: list[str] | None,
    device: str,
    limited: tuple[str | None, int | None, int | None],
) -> dict[str, Any]:
    from lowmem_db import environment
    from lowmem_db.evaluation.correlation import correlate
    from lowmem_db.evaluation.encoders import find_encoders
    from lowmem_db.evaluation.folders import Limits, parse_subjects

    subjects, prompts, images = limited
    limits = Limits(subjects=parse_subjects(subjects), num_prompts=prompts, num_images=images)
    where = environment.resolve_device(device)
    return correlate(files, folders, real, limits, find_encoders(encoder or ["en0"]), where)


def _print_tally(result: dict[str, Any], as_json: bool) -> None:
    from rich.table import Table

    from lowmem_db.evaluation.tally import paper_rows, tally_rows

    if as_json:
        _print_json(result)
        return
    out = results()
    tables = [
        (f"{result['num_raters']} people, majority vote", tally_rows(result)),
        ("Table 2 of arXiv:2208.12242", paper_rows()),
    ]
    if "correlation" in result:
        from lowmem_db.evaluation.correlation import correlation_rows

        tables.append(("metrics and people's preferences", correlation_rows(result["correlation"])))
    for title, (header, *rows) in tables:
        table = Table(*header, title=title)
        for row in rows:
            table.add_row(*row)
        out.print(table)
