"""One evaluation request of any kind: a run is drawn and scored, a folder of images is scored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_db.evaluation.encoders import EncoderFiles, find_encoders
from lowmem_db.evaluation.folders import Limits, SubjectFiles, find_subjects
from lowmem_db.evaluation.protocol import (
    Drawing,
    PromptChoice,
    Whereabouts,
    draw_runs,
    find_runs,
    holds_runs,
    parse_shard,
    refuse_unused,
)
from lowmem_db.evaluation.report import evaluate, write_report
from lowmem_db.sampling.images import make_folder


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of ``lowmem-db evaluate``.

    Attributes:
        source: A run, a folder of runs, or a folder of images.
        real: Photos of the subject, or a folder of them for each subject. Default: those of the run.
        class_images: Images of the class prompt; for a run they are drawn.
        encoders: The encoders, as options.
        limits: Limits that make it smaller.
        choice: Which prompts are drawn for a run.
        drawing: How they are drawn.
        only_for_runs: Values, by name, of options that only apply to runs; None for those that are not given.
        shard: Which part of the images is drawn. Default: all, and then they are scored.
        output: Folder for all output.
        at: Which checkpoint of a run is drawn, and where its base model is.
    """

    source: Path
    real: Path | None
    class_images: Path | None
    encoders: tuple[str, ...]
    limits: Limits
    choice: PromptChoice
    drawing: Drawing
    only_for_runs: Mapping[str, Any]
    shard: str | None
    output: Path
    at: Whereabouts


def evaluate_request(request: Request) -> dict[str, Any]:
    """Draw the missing images and score them.

    Returns:
        The content of ``evaluation.json``; for a shard, ``{"num_missing": N}``, the missing images of other shards.

    Raises:
        DataError: Pictures cannot be found or read, or an option cannot be used.
        ModelError: An encoder cannot be found.
        StorageError: The disk is full.
    """
    shard = parse_shard(request.shard)
    if not holds_runs(request.source):
        refuse_unused(request.only_for_runs, f"{request.source} is not a run, so nothing is drawn")
        encoders = find_encoders(list(request.encoders))
        compared = find_subjects(request.source, request.real, request.class_images, request.limits)
        make_folder(request.output)
        return _score(request, compared, encoders)
    refuse_unused({"--class-images": request.class_images}, f"{request.source} is a run, whose class images are drawn")
    encoders = find_encoders(list(request.encoders))
    runs = find_runs(request.source, request.choice, request.limits, request.real, request.at)
    make_folder(request.output)
    num_missing = draw_runs(runs, request.output, request.drawing, shard)
    if request.shard is not None:
        return {"num_missing": num_missing}
    return _score(request, [run.drawn(request.output, request.drawing) for run in runs], encoders)


def _score(request: Request, compared: Sequence[SubjectFiles], encoders: Sequence[EncoderFiles]) -> dict[str, Any]:
    report = evaluate(compared, encoders, request.drawing.device, seed=request.drawing.seed)
    write_report(request.output, report, compared)
    return report
