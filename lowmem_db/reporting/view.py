"""What the page shows of one run."""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lowmem_db.config.sharing import is_path, public_name, shareable
from lowmem_db.reporting.charts import Curve, bar_chart, line_chart, smoothed
from lowmem_db.reporting.pictures import thumbnail
from lowmem_db.reporting.records import RunRecord, look_up, mappings, pictures_in

ShowPicture = Callable[[Path, int], str | None]
_GIB = 1 << 30
_PHOTO_PIXELS, _SAMPLE_PIXELS = 160, 256
_MAX_PHOTOS, _MAX_SAMPLES, _MAX_STEPS = 24, 16, 12
_PHASES = {
    "class_images": "class images",
    "encode_images": "encode images",
    "encode_text": "encode text",
    "train": "train",
    "sample": "samples",
}
_PARTS = ("weights", "optimizer_state", "gradients", "activations", "other")


@dataclass(frozen=True)
class SampleStep:
    """The samples of one step: each prompt with its pictures, as data addresses."""

    step: int
    prompts: list[tuple[str, list[str]]]


def view_of(run: RunRecord, name: str, *, share: bool, show: ShowPicture = thumbnail) -> dict[str, Any]:
    """Return what the template shows of one run.

    Args:
        run: The run.
        name: What it is called.
        share: Leave out what is private.
        show: Returns the address of a small copy of a picture, or None if it cannot be read.
    """
    total = run.field("training.max_train_steps")
    return {
        "name": name,
        "prompt": run.field("subject.instance_prompt", ""),
        "base": base_of(run, share=share),
        "status": "finished" if run.is_finished else f"step {run.last_step:,} of {total}",
        "facts": facts_of(run),
        "warnings": find_warnings(run),
        "photos": [] if share else _photos(run, show),
        "samples": samples_of(run, show),
        "charts": [chart for chart in _charts(run) if chart],
        "memory": _memory(run),
        "memory_in_words": _memory_in_words(run),
        "checkpoints": [(step, f"{_command('generate', run, share=share)} --step {step}") for step in run.checkpoints],
        "commands": [
            ("Repeat this run", f"{_command('train', run, file='config.yaml', share=share)} output_dir=NEW_FOLDER"),
            ("Continue it", f"{_command('train', run, file='config.yaml', share=share)} --resume"),
            ("Draw from it", f"{_command('generate', run, share=share)} --prompt {shlex.quote(_prompt(run))}"),
        ],
        "settings": sorted(settings_of(run.config, share=share)),
        "versions": settings_of(look_up(run.environment, "versions", {}), share=share),
        "devices": [str(device.get("name", "")) for device in mappings(run.environment.get("devices"))],
    }


def base_of(run: RunRecord, *, share: bool) -> str:
    """Return the base model; to share, only the last part of a path."""
    base = str(run.field("model.base", ""))
    return public_name(base) if share else base


def find_warnings(run: RunRecord) -> list[str]:
    """Return what looks wrong in the numbers of a run."""
    found = []
    losses = [row["loss"] for row in run.rows if isinstance(row.get("loss"), int | float)]
    if bad := sum(not math.isfinite(loss) for loss in losses):
        found.append(
            f"The loss was not finite in {bad} {'step' if bad == 1 else 'steps'}; lower training.learning_rate."
        )
    pace = _paces(run)
    if len(pace) >= 50 and pace[int(0.95 * len(pace))] > 3 * pace[len(pace) // 2]:
        found.append("One step in twenty took more than three times as long as usual: was something else running?")
    predicted, measured = run.plan.get("process_bytes"), _largest(run.rows, "peak_bytes")
    budget = run.plan.get("budget_bytes")
    if isinstance(budget, int) and measured is not None and measured > budget:
        found.append(f"The run needed {measured / _GIB:.2f} GiB, more than its budget of {budget / _GIB:.2f} GiB.")
    elif isinstance(predicted, int) and measured is not None and measured > 1.1 * predicted:
        found.append(f"The run needed {measured / _GIB:.2f} GiB where {predicted / _GIB:.2f} GiB were predicted.")
    if not run.field("prior.enabled", True):
        found.append("Without prior preservation: the class may have come to look like the subject.")
    return found


def facts_of(run: RunRecord) -> list[tuple[str, str]]:
    """Return the main numbers of a run, each with its name."""
    pace = _paces(run)
    measured, predicted = _largest(run.rows, "peak_bytes"), run.plan.get("peak_bytes")
    trained = look_up(run.plan, "trained_parameters.total")
    best = max(points_of(run.scores, "score"), key=lambda point: point[1], default=None)
    facts = [
        ("steps", f"{run.last_step:,}"),
        ("per step", f"{pace[len(pace) // 2]:.2f} s" if pace else None),
        ("training", duration(sum(pace)) if pace else None),
        ("memory, predicted", f"{predicted / _GIB:.2f} GiB" if isinstance(predicted, int) else None),
        ("memory, measured", f"{measured / _GIB:.2f} GiB" if measured is not None else None),
        ("trained parameters", f"{trained / 1e6:,.1f} M" if isinstance(trained, int) else None),
        ("best score", f"{best[1]:.3f} at step {best[0]:.0f}" if best else None),
    ]
    return [(name, value) for name, value in facts if value is not None]


def _charts(run: RunRecord) -> list[Markup]:
    curves = []
    for number, (key, label) in enumerate((("loss_instance", "instance"), ("loss_prior", "prior")), start=1):
        points = points_of(run.rows, key)
        curves += [Curve(label, points, is_raw=True, colour=number), Curve(label, smoothed(points), colour=number)]
    rates = [
        Curve(label, points_of(run.rows, key), colour=number)
        for number, (key, label) in enumerate((("lr", "UNet"), ("lr_text_encoder", "text encoder")), start=1)
    ]
    metrics = [key for key in dict.fromkeys(key for row in run.scores for key in row) if key != "step"]
    scores = [Curve(key, points_of(run.scores, key), colour=number) for number, key in enumerate(metrics[:6], start=1)]
    pace, sorted_paces = points_of(run.rows, "seconds"), _paces(run)
    ceiling = 5 * sorted_paces[len(pace) // 2] if pace else 0.0
    gradients = points_of(run.rows, "grad_norm")
    return [
        line_chart("Loss", curves),
        line_chart("Scores", scores),
        line_chart("Learning rate", rates),
        line_chart("Gradient norm", [Curve("", gradients, is_raw=True), Curve("smoothed", smoothed(gradients))]),
        line_chart("Seconds per step", [Curve("", [p for p in pace if p[1] <= ceiling])], unit="s"),
    ]


def _memory(run: RunRecord) -> Markup:
    bars = []
    for phase in mappings(run.plan.get("phases")):
        parts = ((part, look_up(phase, f"parts.{part}", 0)) for part in _PARTS)
        values = [(part.replace("_", " "), size / _GIB) for part, size in parts if isinstance(size, int)]
        name = str(phase.get("name"))
        bars.append((_PHASES.get(name, name), values))
    return bar_chart("Predicted memory of each phase, bytes of tensors", bars, unit="GiB") if bars else Markup("")


def _memory_in_words(run: RunRecord) -> str:
    """Return what was predicted, measured and allowed for the run as a whole."""
    values = (
        ("predicted", run.plan.get("peak_bytes")),
        ("measured", _largest(run.rows, "peak_bytes")),
        ("budget", run.plan.get("budget_bytes")),
    )
    words = [f"{name} {value / _GIB:.2f} GiB" for name, value in values if isinstance(value, int)]
    return (
        f"The run as a whole, with the context and what the allocator sets aside: {', '.join(words)}." if words else ""
    )


def _photos(run: RunRecord, show: ShowPicture) -> list[str]:
    folder = Path(str(run.field("subject.instance_dir", "")))
    shown = (show(path, _PHOTO_PIXELS) for path in pictures_in(folder)[:_MAX_PHOTOS])
    return [picture for picture in shown if picture]


def samples_of(run: RunRecord, show: ShowPicture = thumbnail) -> list[SampleStep]:
    """Return the samples, of at most so many steps, spread evenly from the first to the last."""
    prompts = run.field("sampling.prompts")
    prompts = prompts if isinstance(prompts, list) else []
    steps = sorted(run.samples)
    if len(steps) > _MAX_STEPS:
        steps = [steps[round(index * (len(steps) - 1) / (_MAX_STEPS - 1))] for index in range(_MAX_STEPS)]
    return [SampleStep(step, _by_prompt(run.samples[step][:_MAX_SAMPLES], prompts, show)) for step in steps]


def _by_prompt(files: Sequence[Path], prompts: Sequence[str], show: ShowPicture) -> list[tuple[str, list[str]]]:
    rows: dict[str, list[str]] = {}
    for file in files:
        number = file.stem.split("-")[0]
        prompt = prompts[int(number)] if number.isdecimal() and int(number) < len(prompts) else file.stem
        if (picture := show(file, _SAMPLE_PIXELS)) is not None:
            rows.setdefault(str(prompt), []).append(picture)
    return list(rows.items())


def settings_of(values: Any, prefix: str = "", *, share: bool) -> list[tuple[str, str]]:
    """Return the fields of a configuration by dotted path; to share, without private ones and without paths."""
    if share and not prefix:
        values = shareable(values)
    if isinstance(values, Mapping):
        return [entry for key, value in values.items() for entry in settings_of(value, f"{prefix}{key}.", share=share)]
    items = values if isinstance(values, list) else [] if values is None else [values]
    if share and any(is_path(str(item)) for item in items):
        return []
    text = ", ".join(map(str, items))
    return [(prefix[:-1], text)]


def _prompt(run: RunRecord) -> str:
    return str(run.field("subject.instance_prompt", "a photo"))


def _command(command: str, run: RunRecord, *, file: str | None = None, share: bool) -> str:
    root = Path("RUN") if share else run.run.root.absolute()
    return f"lowmem-db {command} {shlex.quote(str(root / file if file else root))}"


def points_of(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return the values of one key over the steps; rows without it are left out."""
    return [(float(row["step"]), float(row[key])) for row in rows if isinstance(row.get(key), int | float)]


def _paces(run: RunRecord) -> list[float]:
    """Return the seconds of all steps, in ascending order."""
    return sorted(seconds for _, seconds in points_of(run.rows, "seconds"))


def _largest(rows: Sequence[Mapping[str, Any]], key: str) -> int | None:
    return max((row[key] for row in rows if isinstance(row.get(key), int)), default=None)


def duration(seconds: float) -> str:
    """Return a time for people."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
