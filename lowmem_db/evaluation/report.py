"""Evaluation reports as JSON and tables, the paper's figures, and contact sheets of subjects."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from lowmem_db.console import say, track, warn
from lowmem_db.errors import DependencyError
from lowmem_db.evaluation.captions import accuracy_on, read_accuracy, read_caption
from lowmem_db.evaluation.duplicates import near_duplicates
from lowmem_db.evaluation.encoders import EncoderFiles, find_encoders, load_encoder
from lowmem_db.evaluation.failures import Nearest, failure_lines, failures_of
from lowmem_db.evaluation.folders import CONTACT_SHEET, SubjectFiles
from lowmem_db.evaluation.metrics import summarise
from lowmem_db.evaluation.scoring import LOWER_IS_BETTER, METRICS, Role, SubjectPairs, score_pictures
from lowmem_db.sampling.images import labelled_grid
from lowmem_db.storage.atomic import write_file
from lowmem_db.storage.run_folder import write_json

PAPER_ROWS: dict[str, dict[str, float]] = {
    "Real images": {"DINO": 0.774, "CLIP-I": 0.885},
    "DreamBooth (Imagen)": {"DINO": 0.696, "CLIP-I": 0.812, "CLIP-T": 0.306},
    "DreamBooth (Stable Diffusion)": {"DINO": 0.668, "CLIP-I": 0.803, "CLIP-T": 0.305},
    "Textual Inversion (Stable Diffusion)": {"DINO": 0.569, "CLIP-I": 0.780, "CLIP-T": 0.255},
    "Table 3, Imagen with prior preservation": {
        "PRES": 0.493, "DIV": 0.391, "DINO": 0.684, "CLIP-I": 0.815, "CLIP-T": 0.308,
    },
    "Table 3, Imagen without it": {"PRES": 0.664, "DIV": 0.371, "DINO": 0.712, "CLIP-I": 0.828, "CLIP-T": 0.306},
    "Table 4, Imagen, correct class noun": {"DINO": 0.744, "CLIP-I": 0.853},
    "Table 4, Imagen, no class noun": {"DINO": 0.303, "CLIP-I": 0.607},
    "Table 4, Imagen, wrong class noun": {"DINO": 0.454, "CLIP-I": 0.728},
}  # fmt: skip
"""Tables of arXiv:2208.12242: 25 prompts, 4 images; 30 subjects in Table 1 (the rows that name no table), 15 in
Table 3, 5 in Table 4. The paper calls DIV an LPIPS "cosine similarity" that is higher for more diverse images; here it
is the LPIPS distance."""
_MISSING: dict[Role, str] = {
    "fidelity": "there are no images",
    "prompt": "the prompts of the images are not known: add prompts.txt, or a text file next to each image",
    "preservation": "there are no class images: add --class-images",
    "diversity": "no prompt has two images",
    "noun": "no prompt is a caption that the classifier can read",
    "colour": "no prompt that the classifier can read names a colour",
    "background": "no prompt that the classifier can read names a background",
}
_THUMBNAIL = 128
REPORT_FILE = "evaluation.json"


def evaluate(
    subjects: Sequence[SubjectFiles], encoders: Sequence[EncoderFiles], device: torch.device, *, seed: int = 0
) -> dict[str, Any]:
    """Score subjects with each encoder; one encoder and the pictures of one subject are in memory at a time.

    Args:
        subjects: The subjects.
        encoders: Encoders from :func:`lowmem_db.evaluation.encoders.find_encoders`.
        device: Device of the encoders.
        seed: Seed of the bootstrap.

    Returns:
        JSON values: ``metrics``, ``real_images``, ``encoders``, ``subjects``, ``paper``.
    """
    scored: dict[str, dict[str, SubjectPairs]] = {}
    for files in encoders:
        encoder = load_encoder(files, device)
        scored[files.kind] = {
            subject.name: score_pictures(encoder, subject.read())
            for subject in track(subjects, f"encoding with {files.kind}", len(subjects))
        }
        del encoder
    duplicates = _find_duplicates(subjects, device)
    return {
        "metrics": _summaries(encoders, scored, subjects, seed),
        "real_images": _real(encoders, scored, seed),
        "encoders": {files.kind: files.name for files in encoders},
        "subjects": {
            subject.name: {
                "num_photos": len(subject.photos),
                "num_prompts": sum(prompt is not None for prompt, _ in subject.prompts),
                "num_images": subject.num_images,
                "num_class_images": len(subject.class_images),
                "near_duplicates": duplicates.get(subject.name),
                "metrics": _summaries(encoders, _only(scored, subject.name), [subject], seed),
                **_prompt_by_prompt([found[subject.name] for found in scored.values()]),
                "real_images": _real(encoders, _only(scored, subject.name), seed),
            }
            for subject in subjects
        },
        "paper": paper_rows(encoders),
    }


def paper_rows(encoders: Sequence[EncoderFiles]) -> dict[str, dict[str, float]]:
    """Return the paper's figures for metrics whose encoder is the same as the paper's."""
    comparable = {name for files in encoders if files.is_papers for name in METRICS[files.kind].values()}
    rows = {
        row: {name: value for name, value in values.items() if name in comparable} for row, values in PAPER_ROWS.items()
    }
    return {row: values for row, values in rows.items() if values}


def write_report(output: Path, report: Mapping[str, Any], subjects: Sequence[SubjectFiles]) -> None:
    """Write ``evaluation.json``, and a contact sheet in a folder for each subject.

    Raises:
        StorageError: The disk is full.
    """
    for subject in subjects:
        write_contact_sheet(output / subject.name, subject)
    write_json(output / REPORT_FILE, report)


def metric_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Return a table of the metrics, header first."""
    header = ["metric", "better", "value", "95 % interval", "pairs", "real images"]
    rows = [
        [
            name,
            "lower" if name in LOWER_IS_BETTER else "higher",
            _number(found["value"]),
            _interval(found["interval"]),
            str(found["num_pairs"]),
            _number(report["real_images"].get(name, {}).get("value")),
        ]
        for name, found in report["metrics"].items()
    ]
    return [header, *rows]


def subject_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Return a table with a row for each of several subjects or runs, header first; nothing for one."""
    if len(report["subjects"]) < 2:
        return []
    names = [name for name, found in report["metrics"].items() if found["value"] is not None]
    return [
        ["", *names],
        *(
            [subject, *(_number(found["metrics"].get(name, {}).get("value")) for name in names)]
            for subject, found in report["subjects"].items()
        ),
    ]


def remarks(report: Mapping[str, Any]) -> list[str]:
    """Return remarks to the table: the encoders, why metrics are missing, and the failures of figure 9."""
    metrics = report["metrics"].items()
    encoders = [f"{', '.join(METRICS[kind].values())}: {name}" for kind, name in report["encoders"].items()]
    accuracies = [
        f"{name}: on drawings in an unseen style the classifier itself reaches {found['classifier_accuracy']:.3f}, "
        f"and {_number(found['classifier_accuracy_on_named'])} on what these prompts name"
        for name, found in metrics
        if "classifier_accuracy" in found
    ]
    missing = [f"{name}: {found['missing']}" for name, found in metrics if "missing" in found]
    failures = [line for name, found in report["subjects"].items() for line in failure_lines(name, found["failures"])]
    return encoders + accuracies + missing + failures


def comparison_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Return a table with the paper's figures, header first; only the header if nothing is comparable."""
    names = sorted({name for values in report["paper"].values() for name in values}, key=list(report["metrics"]).index)
    own = {
        "real images, here": {name: report["real_images"].get(name, {}).get("value") for name in names},
        "here": {name: report["metrics"][name]["value"] for name in names},
    }
    rows = (own | report["paper"]).items() if names else ()
    return [["", *names], *([row, *(_number(values.get(name)) for name in names)] for row, values in rows)]


def write_contact_sheet(folder: Path, subject: SubjectFiles) -> Path:
    """Write one picture with the photos and a row for each prompt; return its path."""
    pictures = subject.read()
    rows: list[tuple[str, list[Image.Image]]] = [(f"{subject.name}: photos", [_thumbnail(p) for p in pictures.photos])]
    rows += [(prompt, [_thumbnail(image) for image in images]) for prompt, images in pictures.prompts if prompt]
    rows += _in_rows("images", [image for prompt, images in pictures.prompts if not prompt for image in images])
    rows += _in_rows("class images", list(pictures.class_images))
    path = folder / CONTACT_SHEET
    write_file(path, lambda temporary: labelled_grid(rows).save(temporary, format="PNG"))
    return path


def _summaries(
    encoders: Sequence[EncoderFiles],
    scored: Mapping[str, Mapping[str, SubjectPairs]],
    subjects: Sequence[SubjectFiles],
    seed: int,
) -> dict[str, Any]:
    found = {}
    for files in encoders:
        for role, name in METRICS[files.kind].items():
            score = summarise(
                {subject: pairs.metrics[name] for subject, pairs in scored[files.kind].items()}, seed=seed
            )
            reason = {} if score.num_pairs else {"missing": _MISSING[role]}
            accuracy = _accuracy(role, subjects) if files.kind == "captions" else {}
            found[name] = score.as_json() | {"encoder": files.name} | accuracy | reason
    return found


def _accuracy(role: Role, subjects: Sequence[SubjectFiles]) -> dict[str, float | None]:
    """Return the accuracy of the caption classifier itself: on everything, and on what the prompts name."""
    prompts = [prompt for subject in subjects for prompt, _ in subject.prompts if prompt]
    captions = [caption for caption in map(read_caption, prompts) if caption is not None]
    return {"classifier_accuracy": read_accuracy()[role], "classifier_accuracy_on_named": accuracy_on(captions, role)}


def _real(
    encoders: Sequence[EncoderFiles], scored: Mapping[str, Mapping[str, SubjectPairs]], seed: int
) -> dict[str, Any]:
    names = {files.kind: METRICS[files.kind].get("fidelity") for files in encoders}
    return {
        name: summarise({subject: pairs.real[name] for subject, pairs in scored[kind].items()}, seed=seed).as_json()
        for kind, name in names.items()
        if name is not None
    }


def _of_prompts(scored: Sequence[SubjectPairs]) -> dict[str, dict[str, float]]:
    """Return the means of each prompt, of all encoders together."""
    found: dict[str, dict[str, float]] = {}
    for pairs in scored:
        for prompt, values in pairs.of_prompts.items():
            found.setdefault(prompt, {}).update(values)
    return found


def _prompt_by_prompt(scored: Sequence[SubjectPairs]) -> dict[str, Any]:
    rows = _of_prompts(scored)
    return {"prompts": rows, "failures": failures_of(rows, _nearest(scored))}


def _nearest(scored: Sequence[SubjectPairs]) -> Nearest | None:
    return next((pairs.nearest for pairs in scored if pairs.nearest is not None), None)


def _only(scored: Mapping[str, Mapping[str, SubjectPairs]], subject: str) -> dict[str, dict[str, SubjectPairs]]:
    return {kind: {subject: of_subjects[subject]} for kind, of_subjects in scored.items()}


def _find_duplicates(subjects: Sequence[SubjectFiles], device: torch.device) -> dict[str, list[Any]]:
    """Find near-duplicates among photos, always with EfficientNet-Lite0, for which a threshold is known."""
    try:
        encoder = load_encoder(find_encoders(["en0"])[0], device)
    except DependencyError as error:
        say(f"near-duplicate photos are not reported: {error}")
        return {}
    found = {}
    for subject in subjects:
        names = [file.name for file in subject.photos]
        found[subject.name] = [
            {"photos": [one, other], "cosine": cosine}
            for one, other, cosine in near_duplicates(names, encoder.embed_images(subject.read().photos))
        ]
        for pair in found[subject.name]:
            warn(
                f"{subject.name}: {' and '.join(pair['photos'])} are near-duplicates (cosine {pair['cosine']:.2f}), "
                "which inflates fidelity; keep one of them"
            )
    return found


def _in_rows(label: str, images: Sequence[Image.Image], columns: int = 8) -> list[tuple[str, list[Image.Image]]]:
    return [
        (label, [_thumbnail(image) for image in images[start : start + columns]])
        for start in range(0, len(images), columns)
    ]


def _thumbnail(image: Image.Image) -> Image.Image:
    return ImageOps.fit(image, (_THUMBNAIL, _THUMBNAIL))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
