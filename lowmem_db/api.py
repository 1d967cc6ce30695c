"""The public functions: what ``import lowmem_db`` offers, and everything the command line calls.

Importing this module loads neither torch nor diffusers; each function loads what it needs. Environment
variables that CUDA's libraries read only once are set here. Every error that a caller can fix is a
:class:`lowmem_db.errors.LowmemDbError`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowmem_db import nvidia, out_of_memory
from lowmem_db.config.loading import load_config as _load_config
from lowmem_db.config.recipes import IDENTIFIER
from lowmem_db.config.schema import Config, Precision, Sampler
from lowmem_db.config.sizes import parse_bytes
from lowmem_db.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

    from lowmem_db.data.inspection import Inspection
    from lowmem_db.engine.source import Step
    from lowmem_db.evaluation.class_noun import ClassNoun
    from lowmem_db.planning.plan import Plan
    from lowmem_db.storage.asking import Request
    from lowmem_db.storage.run_folder import RunFolder
    from lowmem_db.training.observers import Observer

nvidia.set_variables()
PathLike = str | Path
ExportLayout = Literal["single-file", "diffusers", "lora-diffusers", "lora-kohya"]


def load_config(path: PathLike | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read and check a configuration.

    Args:
        path: A YAML file, or None if the overrides hold everything.
        overrides: Values of fields, keyed by dotted path, such as ``{"training.learning_rate": 2e-6}``.

    Raises:
        ConfigError: With every problem of the configuration, one per line.
    """
    return _load_config(None if path is None else Path(path), list((overrides or {}).items()))


@out_of_memory.told()
def plan(config: Config, *, gpu: str | None = None, budget: str | int | None = None, here: bool = False) -> "Plan":
    """Predict how much memory a run needs, and choose the fastest strategy that fits. Needs neither weights nor a GPU.

    Args:
        config: The configuration; the planner fills in what it leaves open.
        gpu: A card to plan for, such as ``"rtx 3060"``. Default: the device in the configuration.
        budget: Memory that the run may use: bytes, or ``"8GiB"``. Default: ``memory.budget``, or the card's memory.
        here: Refuse to plan for a card that this machine does not have.

    Raises:
        BudgetError: Nothing fits; the message names the smallest budget that would be enough.
        ConfigError: The card is unknown, or no strategy is allowed.
        ModelError: The model's configuration files cannot be found.
    """
    from lowmem_db.planning.plan import plan as plan_run
    from lowmem_db.planning.target import find_target

    return plan_run(config, find_target(config, gpu=gpu, budget_bytes=_read_budget(budget), here=here))


def inspect_photos(
    source: PathLike, overrides: Sequence[str] = (), *, output: PathLike | None = None
) -> "dict[str, Inspection]":
    """Look at photos as training does: sizes, crops, captions, sharpness, near-duplicates, what is left over.

    Args:
        source: A folder of photos, or a configuration.
        overrides: Values of fields, such as ``"data.resolution=768"``.
        output: Contact sheet to draw.

    Returns:
        What was found of ``photos`` and, for a configuration that names the user's own, ``class_images``.

    Raises:
        ConfigError: An override or the configuration cannot be used.
        DataError: A folder does not exist, or holds no picture.
    """
    from lowmem_db.run.photos import inspect

    return inspect(Path(source), overrides, _path(output))


@out_of_memory.told()
def new(
    photos: PathLike,
    what: str,
    *,
    identifier: str = IDENTIFIER,
    config: str | None = None,
    base: PathLike | None = None,
    gpu: str | None = None,
    output: PathLike | None = None,
) -> Path:
    """Write a commented configuration of at most 25 lines for photos of something, with what the planner says of it.

    Args:
        photos: Folder of the photos.
        what: What they show, such as ``"dog"``.
        identifier: The rare word that names the subject in prompts.
        config: The configuration in this package to start from, one of ``demo``, ``sd15``, ``sd15_lora``, ... Default:
            the one for ``base`` or, without one, ``sd15`` on a machine with an NVIDIA card, else ``demo``.
        base: A model in place of the one in ``config``.
        gpu: A card to plan for. Default: the one here.
        output: The file. Default: the first of ``dog.yaml``, ``dog2.yaml``, ... that is free; its run is named alike.

    Returns:
        The file.

    Raises:
        BudgetError: Nothing fits.
        ConfigError: A word cannot be used, or the file exists.
        DataError: There is no photo.
        ModelError: The base cannot be used.
        StorageError: The file cannot be written.
    """
    from lowmem_db.run import new as making

    wish, file = making.wish_and_file(
        photos=Path(photos),
        noun=what,
        identifier=identifier,
        recipe=config,
        base=None if base is None else str(base),
        file=_path(output),
    )
    making.write_new(wish, file, plan(making.config_for(wish), gpu=gpu))
    return file


@out_of_memory.told()
def train(
    config: Config, *, resume: bool = False, step: int | None = None, observers: Sequence["Observer"] = ()
) -> "RunFolder":
    """Check, plan, prepare and train a run.

    Args:
        config: The configuration.
        resume: Continue from the newest complete checkpoint in ``output_dir``; start from scratch if there is none.
        step: Continue from the checkpoint of this step instead, and drop what came after it.
        observers: Notified while the run trains; see :mod:`lowmem_db.training.observers`.

    Returns:
        The run folder; ``final_dir`` holds the model.

    Raises:
        LowmemDbError: An error that the caller can fix; each subclass says which.
        RunInterrupted: The run was asked to stop; a checkpoint was saved.
    """
    from lowmem_db.run.inputs import check_inputs

    check_inputs(config)

    from lowmem_db.run.run import train as train_run

    return train_run(config, resume=resume, step=step, observers=observers)


@out_of_memory.told()
def generate(
    source: PathLike,
    prompts: Sequence[str] = (),
    *,
    num_images: int | None = None,
    seed: int = 0,
    negative_prompt: str | None = None,
    sampler: Sampler | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    resolution: int | None = None,
    width: int | None = None,
    height: int | None = None,
    precision: Precision | None = None,
    device: str = "auto",
    step: "Step | None" = None,
    steps: "Sequence[Step]" = (),
    base: PathLike | None = None,
    upscale: Sequence[PathLike] = (),
    stream_weights: bool | None = None,
    comic: PathLike | None = None,
    identifier: str | None = None,
    class_noun: str | None = None,
    output: PathLike | None = None,
) -> "list[tuple[str, Sequence[Image]]]":
    """Draw images for prompts; image ``i`` of every prompt starts from the same noise.

    What is left out is taken from the run, as its samples are drawn.

    Args:
        source: A run folder, a folder with a LoRA, or a model as ``model.base`` names it.
        prompts: What to draw. Default: the instance prompt of the run.
        num_images: Images per prompt. Default: 4; for a comic those that it shows.
        seed: Seed of the noise.
        negative_prompt: What guidance leads away from.
        sampler: ``"ddim"``, ``"dpm_solver"``, or ``"ddpm"``, the ancestral sampler. Default without a run: ``"ddim"``.
        num_inference_steps: Sampling steps. Default without a run: 50.
        guidance_scale: Classifier-free guidance (arXiv:2207.12598). Default without a run: 7.5, or 2 for the models in
            this package.
        resolution: Width and height in pixels. Default: that of the run, or the model's native one.
        width: Width alone.
        height: Height alone.
        precision: Type to compute in. Default: fp16 on CUDA devices, fp32 on the CPU.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        step: A checkpoint of the run, or ``"final"``. Default: the final model, or else the newest checkpoint.
        steps: Several checkpoints to compare: each prompt is drawn with each of them.
        base: Where the model is that a run or a LoRA was trained on, if it has moved.
        upscale: Super-resolution models, such as DeepFloyd IF's second stage or runs of one, that enlarge the images
            one after the other.
        stream_weights: Whether weights stay on the host and pass through the device part by part, which changes no
            image. Default: as in the run, and where they do not fit a card otherwise.
        comic: A script of panels, each with a prompt and words, to be drawn instead of prompts; the words are drawn
            into ``comic.png`` and ``comic.html`` in the output folder.
        identifier: Rare token of the subject, for the prompts of a comic. Default: that of the run.
        class_noun: Class of the subject, for the same.
        output: Folder for the images, a grid of them, and ``images.json`` with the settings and seeds.

    Returns:
        Each prompt, after its step if there are several, with its images.

    Raises:
        DataError: The run has no such model, there is no prompt, or a size does not fit the model.
        ModelError: The model does not exist.
    """
    _refuse_both({"--step": step, "--steps": steps or None})
    _refuse_both({"--resolution": resolution, "--width": width})
    _refuse_both({"--resolution": resolution, "--height": height})

    from lowmem_db.run.inputs import check_source

    check_source(str(source), None if base is None else str(base), [str(each) for each in upscale])

    from lowmem_db import environment
    from lowmem_db.distributed.world import joined
    from lowmem_db.engine.generate import Wishes, generate_at, save
    from lowmem_db.models.saving import DTYPES
    from lowmem_db.run.comic import Comic
    from lowmem_db.sampling.images import make_folder

    story = None
    if comic is not None:
        _refuse_both({"--comic": comic, "--steps": steps or None})
        _refuse_both({"--comic": comic, "--prompt": prompts or None})
        if output is None:
            raise DataError("output: is needed for a comic; allowed: the folder to write it to")
        story = Comic(Path(comic), str(source), identifier, class_noun)
        prompts = story.prompts
        num_images = story.num_images(num_images)
    elif identifier is not None or class_noun is not None:
        raise ConfigError("identifier, class_noun: are for the prompts of a comic; leave them out, or add comic=SCRIPT")
    with joined() as world:
        if output is not None and world.is_first:
            make_folder(Path(output))
        where = environment.resolve_device(device)
        rows, settings = generate_at(
            str(source),
            steps or [step],
            None if base is None else str(base),
            Wishes(
                prompts=prompts,
                negative_prompt=negative_prompt,
                num_images=num_images or 4,
                seed=seed,
                sampler=sampler,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                width=width or resolution,
                height=height or resolution,
                upscale=[str(each) for each in upscale],
                stream_weights=stream_weights,
            ),
            where,
            DTYPES[precision or environment.drawing_precision(where)],
            world,
        )
        if output is not None and world.is_first:
            save(Path(output), rows, settings)
            if story is not None:
                story.write(Path(output), [row.images for row in rows])
    return [(row.label if steps else row.prompt, row.images) for row in rows]


@out_of_memory.told()
def evaluate(
    source: PathLike,
    *,
    real: PathLike | None = None,
    class_images: PathLike | None = None,
    encoders: Sequence[str] = ("en0",),
    subjects: str | None = None,
    num_prompts: int | None = None,
    num_images: int | None = None,
    suite: str | None = None,
    prompt_file: PathLike | None = None,
    identifier: str | None = None,
    class_noun: str | None = None,
    num_class_images: int | None = None,
    seed: int = 0,
    sampler: Sampler | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    resolution: int | None = None,
    precision: Precision | None = None,
    device: str = "auto",
    shard: str | None = None,
    failures: bool = False,
    output: PathLike = "evaluation",
    step: "Step | None" = None,
    base: PathLike | None = None,
) -> dict[str, Any]:
    """Measure how good a result is, with the metrics and the protocol of arXiv:2208.12242, section 4.

    Args:
        source: A run, a folder of runs, or a folder of images made by any tool.
        real: Photos of the subject, or a folder with one folder of photos per subject.
        class_images: Images drawn for the class prompt, for PRES. For a run they are drawn here.
        encoders: ``en0``, ``identity`` and ``captions`` need no network; ``dino``, ``clip``, ``lpips``, or ``paper``
            for these three; ``NAME=FOLDER_OR_HUB_ID`` chooses the model.
        subjects: How many subjects to use, or their names separated by commas.
        num_prompts: Use only the first so many prompts.
        num_images: Images per prompt. Default: 4 are drawn for a run, all are read from a folder.
        suite: Prompt suite for a run. Default: the paper's suite for the class.
        prompt_file: Prompts for a run instead of a suite, one per line.
        identifier: Rare token of the subject. Default: that of the run.
        class_noun: Class of the subject. Default: that of the run.
        num_class_images: Images drawn for the class prompt of a run. Default: 16.
        seed: Seed of images and bootstrap.
        sampler: Default: that of the run's samples, as for the next two.
        num_inference_steps: Sampling steps.
        guidance_scale: Classifier-free guidance.
        resolution: Side length in pixels. Default: that of the run.
        precision: Type to compute in. Default: fp16 on CUDA devices, fp32 on the CPU.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        shard: Draw one part of a run's images, such as ``"1/4"``, and score nothing.
        failures: For a run, also draw the subject without a context, and every prompt with the model before training:
            they tell the failures of the paper's figure 9 apart.
        output: Folder for images, contact sheets and ``evaluation.json``.
        step: Checkpoint of a run to evaluate, or ``"final"``. Default: the final model, or else the newest checkpoint.
        base: Where the model is that a run was trained on, if it has moved.

    Returns:
        The report, as written to ``evaluation.json``. For a shard, ``{"num_missing": N}``: images that other shards
        still have to draw.

    Raises:
        DataError: Something to be compared cannot be found or read.
        ModelError: An encoder cannot be found.
    """
    from lowmem_db import environment
    from lowmem_db.evaluation.folders import Limits, parse_subjects
    from lowmem_db.evaluation.protocol import NUM_CLASS_IMAGES, NUM_IMAGES, Drawing, PromptChoice, Whereabouts
    from lowmem_db.evaluation.request import Request, evaluate_request
    from lowmem_db.models.saving import DTYPES

    where = environment.resolve_device(device)
    return evaluate_request(
        Request(
            source=Path(source),
            real=_path(real),
            class_images=_path(class_images),
            encoders=tuple(encoders),
            limits=Limits(subjects=parse_subjects(subjects), num_prompts=num_prompts, num_images=num_images),
            choice=PromptChoice(
                suite=suite, prompt_file=_path(prompt_file), identifier=identifier, class_noun=class_noun
            ),
            drawing=Drawing(
                sampler=sampler,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                num_prompts=num_prompts,
                num_images=num_images or NUM_IMAGES,
                num_class_images=NUM_CLASS_IMAGES if num_class_images is None else num_class_images,
                resolution=resolution,
                seed=seed,
                failures=failures,
                device=where,
                dtype=DTYPES[precision or environment.drawing_precision(where)],
            ),
            only_for_runs={
                "--shard": shard,
                "--suite": suite,
                "--prompt-file": prompt_file,
                "--identifier": identifier,
                "--class-noun": class_noun,
                "--num-class-images": num_class_images,
                "--sampler": sampler,
                "--num-inference-steps": num_inference_steps,
                "--guidance-scale": guidance_scale,
                "--resolution": resolution,
                "--precision": precision,
                "--step": step,
                "--base": base,
                "--failures": failures or None,
            },
            shard=shard,
            output=Path(output),
            at=Whereabouts(step=step, base=None if base is None else str(base)),
        )
    )


@out_of_memory.told()
def export(
    source: PathLike,
    out: PathLike | None = None,
    *,
    layout: ExportLayout | None = None,
    precision: Precision | None = None,
    merge: bool = False,
    extract_lora: int | None = None,
    base: PathLike | None = None,
    step: "Step | None" = None,
) -> Path:
    """Write a trained model in a layout that other programs load.

    Args:
        source: A run folder, or a model as ``model.base`` names it.
        out: File or folder to write; must not exist yet. Default: named after the source, in the working folder.
        layout: Default: one file in the original layout, or kohya's layout for a LoRA.
        precision: Type of the weights. Default: unchanged.
        merge: Merge a LoRA into its base model first.
        extract_lora: Rank of the LoRA to extract from a full fine-tuning.
        base: Model that the training started from, for ``extract_lora``, ``merge`` and ``step``. Default: where the run
            says.
        step: Checkpoint of a run to export instead of its final model.

    Returns:
        What was written.

    Raises:
        ModelError: The source cannot be found, or does not fit the request.
        StorageError: The disk is full.
    """
    from lowmem_db.run.inputs import check_source

    check_source(str(source), None if base is None else str(base))

    from lowmem_db.exporting.request import Request, export_model
    from lowmem_db.models.saving import DTYPES

    return export_model(
        Request(
            source=str(source),
            layout=layout,
            precision=None if precision is None else DTYPES[precision],
            out=_path(out),
            merge=merge,
            extract_rank=extract_lora,
            base=None if base is None else str(base),
            step=step,
        )
    )


def _refuse_both(options: Mapping[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: only one of them can be given; leave the other out")


def _path(path: PathLike | None) -> Path | None:
    return None if path is None else Path(path)


def _read_budget(budget: str | int | None) -> int | None:
    try:
        return None if budget is None else parse_bytes(budget)
    except ValueError as error:
        raise ConfigError(f"--budget: {budget!r} {error}") from None


def report(runs: Sequence[PathLike] | PathLike, output: PathLike | None = None, *, share: bool = False) -> Path:
    """Write one self-contained HTML page about a run, or about several beside each other.

    Args:
        runs: Run folders.
        output: The HTML file. Default: ``report.html`` in the run folder or, for several, in the current folder.
        share: Leave out photos, paths and the names of folders; the default name is then ``report_to_share.html``.

    Returns:
        The file.

    Raises:
        CheckpointError: A folder is not a run.
        StorageError: The file cannot be written.
    """
    from lowmem_db.reporting.page import REPORT_FILE, SHARED_FILE, write_report

    folders = [Path(runs)] if isinstance(runs, str | Path) else [Path(run) for run in runs]
    name = SHARED_FILE if share else REPORT_FILE
    path = _page(output, name) if output is not None else folders[0] / name if len(folders) == 1 else Path(name)
    write_report(folders, path, share=share)
    return path


def gallery(
    images: Sequence[PathLike],
    real: PathLike | None = None,
    *,
    names: Sequence[str] = (),
    subjects: str | None = None,
    num_prompts: int | None = None,
    num_images: int | None = None,
    output: PathLike = "gallery.html",
) -> Path:
    """Write one self-contained HTML page: real photos beside the images of several methods, prompt by prompt.

    Args:
        images: A folder of images for each method, as for :func:`evaluate`.
        real: Photos of the subject, or a folder with one folder of photos per subject.
        names: Name of each method. Default: the names of the folders.
        subjects: How many subjects to show, or their names separated by commas.
        num_prompts: Show only the first so many prompts.
        num_images: Images per prompt. Default: all.
        output: The HTML file, or the folder for ``gallery.html``.

    Returns:
        The file.

    Raises:
        DataError: Something to be shown cannot be found or read.
        StorageError: The file cannot be written.
    """
    from lowmem_db.evaluation.folders import Limits, parse_subjects
    from lowmem_db.run.gallery import show_side_by_side

    folders = [Path(each) for each in ([images] if isinstance(images, str | Path) else images)]
    limits = Limits(subjects=parse_subjects(subjects), num_prompts=num_prompts, num_images=num_images)
    page = _page(output, "gallery.html")
    show_side_by_side(folders, _path(real), names, limits, page)
    return page


def _page(output: PathLike, name: str) -> Path:
    """Return the page to write: the file that is named or, in a folder, one with a name.

    Raises:
        ConfigError: The file is not called a page, and may be something else that would be overwritten.
    """
    path = Path(output)
    if path.is_dir():
        return path / name
    if path.suffix.lower() not in {".html", ".htm"}:
        raise ConfigError(f"--output: {output} is not named like a page; allowed: NAME.html, or an existing folder")
    return path


def class_noun(photos: PathLike) -> "ClassNoun":
    """Name what photos show by a word such as "dog", with a classifier, as in section 3.2 of arXiv:2208.12242.

    Args:
        photos: Folder of the photos.

    Returns:
        The noun, or None where the classifier is not sure, and the likeliest nouns.

    Raises:
        DataError: The folder does not exist, or holds no picture.
        DependencyError: The extra ``evaluation`` is not installed.
    """
    from lowmem_db.evaluation.class_noun import find_class_noun

    return find_class_noun(Path(photos))


def files_to_publish(run: PathLike) -> dict[str, int]:
    """Return the files that :func:`publish` sends, by relative path, with their bytes.

    Raises:
        ModelError: The run has no final model.
        StorageError: A file names a folder of this machine.
    """
    from lowmem_db.run.publishing import files_to_publish as listed

    return listed(Path(run))


def publish(run: PathLike, model_id: str, *, private: bool = False) -> str:
    """Upload the final model of a run, with its card and samples, to the Hugging Face hub.

    No photo, no path, and no name of a folder, a user or a machine is sent; :func:`files_to_publish` lists the files.

    Args:
        run: A finished run.
        model_id: ``owner/name``; the repository is created if it does not exist.
        private: Whether nobody else sees a repository that is created.

    Returns:
        Its address.

    Raises:
        ModelError: The run has no final model.
        StorageError: The hub refused the upload or cannot be reached, or a file names a folder of this machine.
    """
    from lowmem_db.run.publishing import publish as send

    return send(Path(run), model_id, private=private)


def ask(run: PathLike, request: "Request") -> None:
    """Ask a run that trains, in whatever process, for something; it does it after the step in progress.

    Args:
        run: Its folder.
        request: ``"save"`` a checkpoint and go on; save, draw a ``"sample"`` of each prompt and go on; save and
            ``"stop"``. A run that is still prepared stops before its first step.

    Raises:
        CheckpointError: No run trains there.
        StorageError: The folder cannot be written.
    """
    from lowmem_db.storage import asking
    from lowmem_db.storage.run_folder import RunFolder

    if request not in asking.REQUESTS:
        raise ConfigError(f"request: {request!r} is not possible; allowed: {', '.join(asking.REQUESTS)}")
    folder = RunFolder(Path(run))
    if not folder.is_in_use():
        raise CheckpointError(f"RUN: nothing trains in {run}, so it cannot {request}; start it with lowmem-db train")
    asking.ask(folder, request)
