"""The public functions: what ``import lowmem_db`` offers, and all that the command line does.

Importing this module loads neither torch nor diffusers; each function loads what it needs. What CUDA's libraries read
from the environment is set here, because they read it once. Every error that a caller can mend is a
:class:`lowmem_db.errors.LowmemDbError`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowmem_db import nvidia
from lowmem_db.config.loading import load_config as _load_config
from lowmem_db.config.schema import Config, Precision, Sampler
from lowmem_db.config.sizes import parse_bytes
from lowmem_db.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

    from lowmem_db.planning.plan import Plan
    from lowmem_db.storage.run_folder import RunFolder
    from lowmem_db.training.observers import Observer

nvidia.set_variables()
PathLike = str | Path
ExportLayout = Literal["single-file", "diffusers", "lora-diffusers", "lora-kohya"]


def load_config(path: PathLike | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read and check a configuration.

    Args:
        path: A YAML file; None: the overrides say everything.
        overrides: Values of fields by their dotted path, such as ``{"training.learning_rate": 2e-6}``.

    Raises:
        ConfigError: With every problem of the configuration, one per line.
    """
    return _load_config(None if path is None else Path(path), list((overrides or {}).items()))


def plan(config: Config, *, gpu: str | None = None, budget: str | int | None = None, here: bool = False) -> "Plan":
    """Predict what a run will need, and choose the fastest way that fits; no weights and no GPU are needed.

    Args:
        config: What it leaves open is chosen.
        gpu: A card to plan for, such as ``"rtx 3060"``; None: the device of the configuration.
        budget: Memory that the run may use: bytes, or ``"8GiB"``; None: ``memory.budget``, or that of the card.
        here: Refuse to plan for a card that this machine does not have.

    Raises:
        BudgetError: Nothing fits; the message names the smallest budget that would do.
        ConfigError: The card is not known, or no strategy is allowed.
        ModelError: The model's configuration files cannot be found.
    """
    from lowmem_db.planning.plan import plan as plan_run
    from lowmem_db.planning.target import find_target

    return plan_run(config, find_target(config, gpu=gpu, budget_bytes=_read_budget(budget), here=here))


def train(config: Config, *, resume: bool = False, observers: Sequence["Observer"] = ()) -> "RunFolder":
    """Check, plan, prepare and train a run.

    Args:
        config: The configuration.
        resume: Continue the newest complete checkpoint of ``output_dir``, or start where there is none.
        observers: Are told what happens while it trains; see :mod:`lowmem_db.training.observers`.

    Returns:
        The run folder; ``final_dir`` holds the model.

    Raises:
        LowmemDbError: What the caller can mend; each class says what.
        RunInterrupted: The run was asked to stop; a checkpoint was saved.
    """
    from lowmem_db.data.inputs import check_inputs

    check_inputs(config)

    from lowmem_db.run.run import train as train_run

    return train_run(config, resume=resume, observers=observers)


def generate(
    source: PathLike,
    prompts: Sequence[str],
    *,
    num_images: int = 4,
    seed: int = 0,
    sampler: Sampler = "ddim",
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    resolution: int | None = None,
    precision: Precision | None = None,
    device: str = "auto",
) -> "list[tuple[str, list[Image]]]":
    """Draw images of prompts; image ``i`` of every prompt starts from the same noise.

    Args:
        source: A run folder, a model folder, a hub id, or ``"demo"``.
        prompts: What to draw.
        num_images: Images of each prompt.
        seed: Seed of the noise.
        sampler: ``"ddim"``, ``"dpm_solver"``, or ``"ddpm"``, the ancestral sampler.
        num_inference_steps: Sampling steps.
        guidance_scale: Classifier-free guidance (arXiv:2207.12598).
        resolution: Pixels of a side; None: those of the run, or those the model was made for.
        precision: Type to compute in; None: fp16 on CUDA devices, fp32 on the CPU.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.

    Returns:
        Each prompt with its images.

    Raises:
        DataError: A run has no model yet, or the resolution does not fit the model.
        ModelError: There is no such model.
    """
    from lowmem_db import environment
    from lowmem_db.engine.generate import generate_images
    from lowmem_db.engine.source import find_source
    from lowmem_db.models.saving import DTYPES
    from lowmem_db.sampling.latents import SamplingSettings

    found, where = find_source(str(source)), environment.resolve_device(device)
    return generate_images(
        found,
        prompts,
        SamplingSettings(sampler=sampler, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale),
        num_images=num_images,
        resolution=resolution or found.resolution,
        seed=seed,
        device=where,
        dtype=DTYPES[precision or environment.drawing_precision(where)],
    )


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
    output: PathLike = "evaluation",
) -> dict[str, Any]:
    """Say how good a result is, with the metrics and the protocol of arXiv:2208.12242, section 4.

    Args:
        source: A run, a folder of runs, or a folder of images by any tool.
        real: Photos of the subject, or a folder with a folder of photos for each subject.
        class_images: Images that were drawn for the prompt of the class, for PRES; of a run they are drawn.
        encoders: ``en0`` and ``captions`` need no network; ``dino``, ``clip``, ``lpips``, or ``paper`` for these three;
            ``NAME=FOLDER_OR_HUB_ID`` chooses the model.
        subjects: So many subjects, or their names with commas between them.
        num_prompts: So many prompts, the first ones.
        num_images: Images of each prompt: drawn of a run (4), read of a folder (all).
        suite: Suite of prompts for a run; None: the paper's for its class.
        prompt_file: Prompts for a run instead of a suite, one in each line.
        identifier: Rare token of the subject; None: as the run says.
        class_noun: Class of the subject; None: as the run says.
        num_class_images: Images drawn of a run for the prompt of the class (16).
        seed: Seed of images and bootstrap.
        sampler: None: that of the run's samples; likewise the next two.
        num_inference_steps: Sampling steps.
        guidance_scale: Classifier-free guidance.
        resolution: Pixels of a side; None: those of the run.
        precision: Type to compute in; None: fp16 on CUDA devices, fp32 on the CPU.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        shard: Draw one part of a run's images, such as ``"1/4"``, and score nothing.
        output: Folder for images, contact sheets and ``evaluation.json``.

    Returns:
        The report, as ``evaluation.json`` holds it; of a shard, ``{"num_missing": N}``: images of other shards.

    Raises:
        DataError: Something that is compared cannot be found or read.
        ModelError: An encoder cannot be found.
    """
    from lowmem_db import environment
    from lowmem_db.evaluation.folders import Limits, parse_subjects
    from lowmem_db.evaluation.protocol import NUM_CLASS_IMAGES, NUM_IMAGES, Drawing, PromptChoice
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
            },
            shard=shard,
            output=Path(output),
        )
    )


def export(
    source: PathLike,
    out: PathLike | None = None,
    *,
    layout: ExportLayout | None = None,
    precision: Precision | None = None,
    merge: bool = False,
    extract_lora: int | None = None,
    base: str | None = None,
) -> Path:
    """Write a trained model in the layout that other programs load.

    Args:
        source: A run folder, or a model as ``model.base`` names it.
        out: File or folder to write, never overwritten; None: named after the source, in the working folder.
        layout: None: one file in the original layout, or kohya's layout for a LoRA.
        precision: Type of the weights; None: as they are.
        merge: Bake a LoRA into its base model first.
        extract_lora: Rank of a LoRA to be made from a full fine-tuning.
        base: Model that a fine-tuning started from, for ``extract_lora``; None: that of the run.

    Returns:
        What was written.

    Raises:
        ModelError: The source cannot be found, or is not what is asked for.
        StorageError: The disk is full.
    """
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
            base=base,
        )
    )


def _path(path: PathLike | None) -> Path | None:
    return None if path is None else Path(path)


def _read_budget(budget: str | int | None) -> int | None:
    try:
        return None if budget is None else parse_bytes(budget)
    except ValueError as error:
        raise ConfigError(f"--budget: {budget!r} {error}") from None
