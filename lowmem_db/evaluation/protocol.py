"""The paper's protocol (arXiv:2208.12242, section 4.1): images of every prompt from a run, drawn resumably.

A manifest next to the images records their settings. Each image depends only on its subject, prompt and number, so that
an interrupted evaluation continues with the missing images, and several processes can share the work.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lowmem_db import fingerprint
from lowmem_db.config.schema import Config
from lowmem_db.console import quoted, say
from lowmem_db.data.folder import MANIFEST
from lowmem_db.engine.draw import Artist, Job, draw, kept
from lowmem_db.engine.generate import check_size
from lowmem_db.engine.manifest import differences, write_manifest
from lowmem_db.engine.source import ImageSource, Step, find_source
from lowmem_db.errors import DataError
from lowmem_db.evaluation.folders import PROMPTS_FILE, Limits, SubjectFiles, choose, scan_pictures
from lowmem_db.models.text_encoders import read_otherwise
from lowmem_db.randomness import generator
from lowmem_db.sampling.latents import SamplingSettings
from lowmem_db.sampling.prompts import read_prompt_file, read_suite, subject_names
from lowmem_db.storage.atomic import write_file, write_text
from lowmem_db.storage.run_folder import RunFolder

CLASS_DIR, PLAIN_DIR, UNTUNED_DIR = "class", "plain", "untuned"
_Kind = Literal["prompt", "class", "plain", "untuned"]
_KINDS: tuple[_Kind, ...] = ("prompt", "class", "plain", "untuned")
NUM_IMAGES = 4
"""Number of images of each prompt in the paper."""
NUM_CLASS_IMAGES = 16
_FORMAT_VERSION = 1
_BATCH_SIZE = 4
_LIVE = frozenset(
    ("dog", "cat", "puppy", "kitten", "corgi", "poodle", "terrier", "horse", "pony", "donkey", "cow", "sheep", "goat",
     "pig", "rabbit", "bunny", "hamster", "mouse", "rat", "ferret", "squirrel", "hedgehog", "fox", "wolf", "bear",
     "lion", "tiger", "leopard", "elephant", "giraffe", "monkey", "bird", "parrot", "owl", "chicken", "duck", "goose",
     "turtle", "tortoise", "lizard", "snake", "frog", "fish", "goldfish", "animal", "pet", "person", "man", "woman",
     "boy", "girl", "child", "baby", "face")
)  # fmt: skip
_ONLY_LOOKS_ALIVE = frozenset(
    ("stuffed", "plush", "plushie", "toy", "teddy", "doll", "rubber", "wooden", "plastic", "ceramic", "porcelain",
     "glass", "stone", "bronze", "paper", "lego", "knitted", "crochet", "computer", "statue", "figurine", "sculpture",
     "cartoon")
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One of ``count`` parts of the work, numbered from 1."""

    number: int = 1
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How images are drawn.

    Attributes:
        sampler: Sampler. Default: that of the run's samples.
        num_inference_steps: Sampling steps. Default: those of the run's samples.
        guidance_scale: Classifier-free guidance. Default: that of the run's samples.
        num_prompts: Number of prompts, from the first. Default: all.
        num_images: Number of images of each prompt.
        num_class_images: Number of images of the class prompt, for PRES.
        resolution: Height and width in pixels. Default: those of the run.
        seed: Seed of all random draws.
        failures: Also draw the subject without a context, and each prompt with the model before training.
        device: Device to compute on.
        dtype: Type to compute in.
    """

    sampler: Any = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    num_prompts: int | None = None
    num_images: int = NUM_IMAGES
    num_class_images: int = NUM_CLASS_IMAGES
    resolution: int | None = None
    seed: int = 0
    failures: bool = False
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run to evaluate.

    Attributes:
        name: Name of its folder, which is the subject's name in reports.
        source: The model.
        config: Its configuration.
        prompts: The prompts to draw.
        captions: The same prompts without the identifier, which means nothing to an encoder.
        class_prompt: The class prompt.
        class_caption: What the captions say without their context.
        photos: Real photos of the subject.
        base: Where the model is that it was trained on. Default: where the configuration says.
    """

    name: str
    source: ImageSource
    config: Config
    prompts: tuple[str, ...]
    captions: tuple[str, ...]
    class_prompt: str
    class_caption: str
    photos: tuple[Path, ...]
    base: str | None = None

    def drawn(self, output: Path, drawing: Drawing) -> SubjectFiles:
        """Return the files of the run, once all its images are in ``output``."""
        by_prompt: dict[_Kind, dict[str, list[Path]]] = {kind: {} for kind in _KINDS}
        for job in _jobs(self, output / self.name, drawing):
            by_prompt[job.kind].setdefault(job.caption, []).extend(job.files)
        prompts, class_images, plain, untuned = (
            tuple((caption, tuple(files)) for caption, files in by_prompt[kind].items()) for kind in _KINDS
        )
        return SubjectFiles(
            name=self.name,
            photos=self.photos,
            prompts=prompts,
            class_images=tuple(file for _, files in class_images for file in files),
            plain=tuple(file for _, files in plain for file in files),
            untuned=untuned,
            class_caption=self.class_caption,
        )


@dataclass(frozen=True, kw_only=True)
class PromptChoice:
    """Which prompts are drawn.

    Attributes:
        suite: Name of a suite. Default: the paper's for live subjects or for objects, depending on the class noun.
        prompt_file: A file of prompts to use instead.
        identifier: Rare token. Default: read from the run's prompts.
        class_noun: Class. Default: read from the run's prompts.
    """

    suite: str | None = None
    prompt_file: Path | None = None
    identifier: str | None = None
    class_noun: str | None = None


@dataclass(frozen=True, kw_only=True)
class Whereabouts:
    """Which model of a run is drawn.

    Attributes:
        step: A checkpoint, or ``final``. Default: the final model, or else the newest checkpoint.
        base: Where the model is that it was trained on. Default: where the run says.
    """

    step: Step | None = None
    base: str | None = None


def parse_shard(text: str | None) -> Shard:
    """Parse the option ``--shard``, such as ``1/4``.

    Raises:
        DataError: It does not have this form.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", "1/1" if text is None else text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise DataError(f"--shard: {text!r}; allowed: NUMBER/COUNT with NUMBER from 1 to COUNT, such as 1/4")
    return Shard(number=int(match[1]), count=int(match[2]))


def refuse_unused(options: Mapping[str, Any], reason: str) -> None:
    """Refuse options that would have no effect.

    Raises:
        DataError: One of them is given; the message says why it cannot be used.
    """
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise DataError(f"{', '.join(given)}: cannot be used here, because {reason}; leave it out")


def holds_runs(folder: Path) -> bool:
    """Return whether a folder is a run, or contains runs.

    Raises:
        DataError: There is no such folder.
    """
    if not folder.is_dir():
        raise DataError(
            f"RUN_OR_IMAGES: {folder} {'is a file' if folder.exists() else 'does not exist'}; allowed: a folder"
        )
    return bool(_run_folders(folder))


def find_runs(
    folder: Path, choice: PromptChoice, limits: Limits, photos: Path | None = None, at: Whereabouts | None = None
) -> list[Run]:
    """Find the runs in a folder: the folder itself, or every run folder in it.

    Args:
        folder: The folder.
        choice: Which prompts are drawn.
        limits: Which runs are evaluated.
        photos: Photos of the subject, if those of a single run are no longer where its configuration says.
        at: Which of their models is drawn.

    Raises:
        DataError: A run has no model yet, its photos do not exist, or identifier and class noun are not known.
    """
    folders = {run.resolve().name: run for run in _run_folders(folder)}
    at = at or Whereabouts()
    return [_read_run(name, folders[name], choice, photos, at) for name in choose(sorted(folders), limits)]


def draw_runs(runs: Sequence[Run], output: Path, drawing: Drawing, shard: Shard) -> int:
    """Draw the missing images of every run into ``output/RUN``; return how many images of other shards are missing.

    Raises:
        DataError: The folder has images that were drawn with other settings.
        StorageError: The disk is full.
    """
    manifests = {run.name: _manifest(run, drawing) for run in runs}
    for name, wanted in manifests.items():
        _check_manifest(output / name, wanted)
    jobs = [job for run in runs for job in _jobs(run, output / run.name, drawing)]
    own = jobs[shard.number - 1 :: shard.count]
    for run in runs:
        missing = [job for job in own if job.run is run and job.missing()]
        if missing:
            write_manifest(output / run.name, manifests[run.name])
            write_text(output / run.name / PROMPTS_FILE, "".join(f"{caption}\n" for caption in run.captions))
            say(f"{run.name}: drawing {sum(len(job.missing()) for job in missing)} images into {output / run.name}")
            _draw(run, run.source, [job for job in missing if job.kind != "untuned"], drawing)
            if untuned := [job for job in missing if job.kind == "untuned"]:
                _draw(run, find_source(run.base or run.config.model.base), untuned, drawing)
    return sum(len(job.missing()) for job in jobs)


def suite_for(class_noun: str) -> str:
    """Return the paper's suite for a class: the one for live subjects, such as dogs, or the one for objects.

    A stuffed animal is an object, as it is among the paper's 21 objects and 9 live subjects.
    """
    words = re.split(r"[\s-]+", class_noun.strip().lower())
    return "live_subjects" if words[-1] in _LIVE and _ONLY_LOOKS_ALIVE.isdisjoint(words) else "objects"


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Images of one prompt that are drawn together.

    Attributes:
        run: The run.
        prompt: The prompt.
        caption: The prompt without the identifier.
        kind: What it is drawn for.
        stream: Random stream, and the number of the prompt in it.
        first: Number of the first image.
        files: Paths of the images.
    """

    run: Run
    prompt: str
    caption: str
    kind: _Kind
    stream: tuple[str, int]
    first: int
    files: tuple[Path, ...]

    def missing(self) -> list[Path]:
        return [file for file in self.files if not file.is_file()]

    def as_drawn(self, seed: int, resolution: int) -> Job:
        stream, number = self.stream
        generators = [generator(seed, stream, number, self.first + index) for index in range(len(self.files))]
        return Job(prompts=[self.prompt], size=(resolution, resolution), generators=generators)


def _jobs(run: Run, folder: Path, drawing: Drawing) -> list[_Job]:
    photos = run.config.subject.instance_dir.resolve().name  # runs on the same photos start from the same noise
    jobs = []
    for number, (prompt, caption) in enumerate(zip(run.prompts, run.captions, strict=True)):
        if drawing.num_prompts is not None and number >= drawing.num_prompts:
            break
        names = [f"{number:02d}-{index:02d}.png" for index in range(drawing.num_images)]
        stream = (f"evaluation/{photos}", number)
        jobs += _batches(run, "prompt", prompt, caption, stream, [folder / name for name in names])
        if drawing.failures:  # from the same noise
            jobs += _batches(run, "untuned", caption, caption, stream, [folder / UNTUNED_DIR / name for name in names])
    own, class_prompt = run.config.subject.instance_prompt, run.class_prompt
    further: list[tuple[_Kind, str, str, int]] = [("class", class_prompt, CLASS_DIR, drawing.num_class_images)]
    if drawing.failures:
        further.append(("plain", own, PLAIN_DIR, drawing.num_images))
    for kind, prompt, name, count in further:
        files = [folder / name / f"{index:02d}.png" for index in range(count)]
        jobs += _batches(run, kind, prompt, class_prompt, (f"evaluation/{photos}/{kind}", 0), files)
    return jobs


def _batches(
    run: Run, kind: _Kind, prompt: str, caption: str, stream: tuple[str, int], files: Sequence[Path]
) -> list[_Job]:
    return [
        _Job(
            run=run,
            prompt=prompt,
            caption=caption,
            kind=kind,
            stream=stream,
            first=first,
            files=tuple(files[first : first + _BATCH_SIZE]),
        )
        for first in range(0, len(files), _BATCH_SIZE)
    ]


def _draw(run: Run, source: ImageSource, jobs: Sequence[_Job], drawing: Drawing) -> None:
    if not jobs:
        return
    prompts = sorted({job.prompt for job in jobs})
    device, dtype = drawing.device, drawing.dtype
    table = source.embed([*prompts, ""], device, dtype)
    artist = Artist(model=source.model, settings=_settings(run, drawing), objective=source.objective)
    drawn = draw(
        artist,
        table,
        [job.as_drawn(drawing.seed, _resolution(run, drawing)) for job in jobs],
        kept(source.load_denoiser(device, dtype)),
        kept(source.model.space.load(device)),
        jobs_at_once=1,
        progress=f"drawing {run.name}",
    )
    for job, images in zip(jobs, drawn, strict=True):
        missing = job.missing()
        for file, image in zip(job.files, images, strict=True):
            if file in missing:
                write_file(file, lambda path, image=image: image.save(path, format="PNG"))


def _settings(run: Run, drawing: Drawing) -> SamplingSettings:
    own = run.config.sampling
    return SamplingSettings(
        sampler=drawing.sampler or own.sampler,
        num_inference_steps=drawing.num_inference_steps or own.num_inference_steps,
        guidance_scale=own.guidance_scale if drawing.guidance_scale is None else drawing.guidance_scale,
    )


def _resolution(run: Run, drawing: Drawing) -> int:
    return drawing.resolution or run.config.data.resolution


def _manifest(run: Run, drawing: Drawing) -> dict[str, Any]:
    trained, read = run.source.trained_files, read_otherwise(run.source.model)
    side = _resolution(run, drawing)
    check_size(run.source, (side, side), ("--resolution", "--resolution"))
    return {
        "format_version": _FORMAT_VERSION,
        "model": run.source.model.whole_key,
        "checkpoint": fingerprint.of_files(trained) if trained else None,
        "prompts": list(run.prompts),
        "class_prompt": run.class_prompt,
        **asdict(_settings(run, drawing)),
        "resolution": _resolution(run, drawing),
        "precision": str(drawing.dtype).removeprefix("torch."),
        "seed": drawing.seed,
        **({"clip_skip_and_chunks": read} if read else {}),
    }


def _check_manifest(folder: Path, wanted: dict[str, Any]) -> None:
    if not (folder / MANIFEST).is_file():
        if folder.is_dir() and any(folder.glob("*.png")):
            raise DataError(f"--output: {folder} has images that this command did not draw; choose another folder")
        return
    if differing := differences(folder, wanted):
        raise DataError(
            f"--output: {folder} has images drawn with other settings ({', '.join(differing)}); choose another "
            "folder, or delete this one"
        )


def _run_folders(folder: Path) -> list[Path]:
    if RunFolder(folder).config_file.is_file():
        return [folder]
    inner = sorted(folder.iterdir()) if folder.is_dir() else []
    return [entry for entry in inner if entry.is_dir() and RunFolder(entry).config_file.is_file()]


def _read_run(name: str, folder: Path, choice: PromptChoice, photos: Path | None, at: Whereabouts) -> Run:
    source = find_source(str(folder), step=at.step, base=at.base)
    config = source.run_config
    if config is None:
        raise DataError(f"{folder}: is not a run folder; allowed: a folder that lowmem-db train has written")
    if source.model.family.enlarges:
        raise DataError(
            f"RUN_OR_IMAGES: {folder} enlarges pictures and draws none itself; draw them (lowmem-db generate "
            f"FIRST_STAGE --suite objects --upscale {quoted(folder)}), and evaluate their folder with --real PHOTOS"
        )
    identifier, class_noun = _names(folder, config, choice)
    if choice.prompt_file is not None:
        prompts = read_prompt_file(choice.prompt_file)
    else:
        suite = choice.suite or suite_for(class_noun)
        say(f"{name}: prompts of the suite {suite} with {identifier!r} and {class_noun!r}")
        word_alone = config.textual_inversion.enabled
        prompts = read_suite(suite, identifier=identifier, class_noun="" if word_alone else class_noun)
    return Run(
        name=name,
        source=source,
        config=config,
        prompts=tuple(prompts),
        captions=tuple(_caption(prompt, identifier, class_noun, config) for prompt in prompts),
        class_prompt=config.subject.class_prompt or f"a {class_noun}",
        class_caption=f"a {class_noun}",
        photos=scan_pictures(photos or config.subject.instance_dir, "subject.instance_dir"),
        base=at.base,
    )


def _names(folder: Path, config: Config, choice: PromptChoice) -> tuple[str, str]:
    if choice.identifier and choice.class_noun:
        return choice.identifier, choice.class_noun
    if config.textual_inversion.enabled:
        return choice.identifier or config.textual_inversion.token, choice.class_noun or str(config.initializer)
    if config.subject.class_prompt is None:
        raise DataError(
            f"{folder}: its config.yaml has no subject.class_prompt, so the class is not known; add --identifier sks "
            "--class-noun dog"
        )
    identifier, class_noun = subject_names(config.subject.instance_prompt, config.subject.class_prompt)
    return choice.identifier or identifier, choice.class_noun or class_noun


def _caption(prompt: str, identifier: str, class_noun: str, config: Config) -> str:
    """Return a prompt as an encoder understands it: a learned word stands for the class, an identifier for nothing."""
    if config.textual_inversion.enabled:
        return prompt.replace(identifier, class_noun)
    return without_identifier(prompt, identifier)


def without_identifier(prompt: str, identifier: str) -> str:
    """Return a prompt without the rare token: ``a sks dog`` becomes ``a dog``."""
    return " ".join(re.sub(rf"(?<!\S){re.escape(identifier)}(?!\S)", "", prompt).split())
