"""One export request of any kind."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from lowmem_db.adaptation.lora_file import lora_of_checkpoint
from lowmem_db.config.loading import load_config
from lowmem_db.console import say
from lowmem_db.engine.source import Step, choose_step, find_source
from lowmem_db.errors import ModelError
from lowmem_db.exporting.diffusers_folder import export_diffusers
from lowmem_db.exporting.extraction import ChangeNorms, bake_dora, base_of, base_of_lora, extract_lora, total_of
from lowmem_db.exporting.lora import (
    LoraLayout,
    LoraSource,
    export_lora,
    find_lora_source,
    is_dora,
    refuse_family_without_kohya,
)
from lowmem_db.exporting.merging import merge_into_folder
from lowmem_db.exporting.single_file import export_single_file
from lowmem_db.exporting.source import ExportSource, find_export_source, refuse_existing, source_at_step
from lowmem_db.models.embedding_file import write_embedding
from lowmem_db.models.finding import find_model
from lowmem_db.models.saving import DTYPES
from lowmem_db.models.suggested_base import SuggestedBase
from lowmem_db.storage.run_folder import RunFolder

_DORA_RANKS = 4  # how many times the rank of a DoRA its LoRA has


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of ``lowmem-db export``.

    Attributes:
        source: A run folder, or anything that ``model.base`` accepts.
        layout: Layout of the output. Default: a single file, or kohya's layout for a LoRA.
        precision: Type of the weights. Default: unchanged.
        out: Path of the output. Default: named after the source, in the working folder.
        merge: Merge a LoRA into its base model first.
        extract_rank: Rank of a LoRA to extract from a full fine-tuning. Default: do not extract one.
        base: The model that a fine-tuning or a LoRA started from. Default: that of its run.
        step: A checkpoint of the run to export instead of its final model.
    """

    source: str
    layout: Literal["single-file", "diffusers", "lora-diffusers", "lora-kohya"] | None = None
    precision: torch.dtype | None = None
    out: Path | None = None
    merge: bool = False
    extract_rank: int | None = None
    base: str | None = None
    step: Step | None = None


def export_model(request: Request) -> Path:
    """Write the output; return its path.

    Raises:
        ModelError: The source does not exist, or does not fit the request.
        StorageError: The disk is full.
    """
    run = RunFolder(Path(request.source))
    if request.out is not None:
        refuse_existing(request.out)
    if request.step is not None and not run.config_file.is_file():
        raise ModelError(
            f"--step: {request.step}, but {request.source} is not a run, which has checkpoints; leave it out"
        )
    if request.step in (None, "final"):
        return _export(request, find_lora_source(request.source), lambda: find_export_source(request.source))
    step = choose_step(run, request.step)
    config, name = load_config(run.config_file), f"{run.root.resolve().name}-step-{step:06d}"
    if config.lora.enabled:
        trained = config.training.model_copy(update={"max_train_steps": step})  # as other programs will be told
        lora = lora_of_checkpoint(run.checkpoint_dir(step), config)
        return _export(
            request,
            LoraSource(
                name=name,
                lora=lora,
                config=config.model_copy(update={"training": trained}),
                sample=run.newest_sample(step=step),
            ),
            None,
        )
    if config.textual_inversion.enabled:
        return _export_embedding(request, step, name)
    refuse_existing(_whole_file(request, name) if request.extract_rank is None else _lora_file(request, name))
    beside = (request.out or Path(name)).absolute().parent
    with source_at_step(find_source(request.source, step=step, base=request.base), name, beside) as source:
        return _export(request, None, lambda: replace(source, sample=run.newest_sample(step=step)))


def _export_embedding(request: Request, step: int, name: str) -> Path:
    """Write the embedding of a checkpoint, as ``final/`` holds that of the last step."""
    asked = {"--merge": request.merge, "--extract-lora": request.extract_rank, "--format": request.layout}
    if given := [flag for flag, value in asked.items() if value]:
        raise ModelError(
            f"{given[0]}: has no effect on a learned embedding, which other programs load as it is; leave it out"
        )
    out = request.out or Path(f"{name}.safetensors")
    refuse_existing(out)
    found = find_source(request.source, step=step, base=request.base)
    assert found.run_config is not None, f"{name} is no run"
    config, word = found.run_config, found.model.words[-1]
    dtype = request.precision or DTYPES[config.final.precision]
    vectors = {component: rows.to(dtype) for component, rows in word.vectors.items()}
    base = SuggestedBase(fields=config.model.model_dump(), key=found.model.base_key)
    write_embedding(out, replace(word, vectors=vectors), base)
    return out


def _export(request: Request, lora: LoraSource | None, find_whole: Callable[[], ExportSource] | None) -> Path:
    """Export a LoRA, or else what ``find_whole`` finds."""
    if request.extract_rank is not None:
        if request.merge:
            raise ModelError("--extract-lora: cannot be combined with --merge; leave one of them out")
        if lora is not None and not is_dora(lora.lora):
            raise ModelError(f"--extract-lora: needs a full fine-tuning, but {request.source} is a LoRA; leave it out")
        if request.layout is not None and not _is_of_lora(request):
            raise ModelError(
                f"--extract-lora: makes a LoRA, but --format {request.layout} is for complete models; allowed: "
                "lora-kohya, lora-diffusers"
            )
        if lora is not None:
            return _export_lora(request, _baked(request, lora, request.extract_rank))
        assert find_whole is not None, "neither a LoRA nor a complete model"
        return _export_extracted(request, find_whole(), request.extract_rank)
    if lora is None:
        assert find_whole is not None, "neither a LoRA nor a complete model"
        if request.merge or _is_of_lora(request):
            asked = "--merge" if request.merge else f"--format {request.layout}"
            raise ModelError(
                f"{request.source}: is not a LoRA, which {asked} needs; make one from a full fine-tuning with "
                f"--extract-lora RANK, or leave {asked} out"
            )
        if request.base is not None and request.step in (None, "final"):
            raise ModelError(
                f"--base: {request.base} has no effect on a complete model without --extract-lora RANK; leave it out"
            )
        return _export_whole(request, find_whole())
    return _export_adapters(request, lora)


def _export_adapters(request: Request, lora: LoraSource) -> Path:
    if request.merge:
        return _export_merged(request, lora)
    is_baked = is_dora(lora.lora) and request.layout != "lora-diffusers"
    if request.base is not None and not is_baked:
        raise ModelError(f"--base: {request.base} has no effect on a LoRA without --merge; add that, or leave it out")
    if request.layout is not None and not _is_of_lora(request):
        raise ModelError(
            f"--format: {request.layout} is for complete models, but {request.source} is a LoRA; add --merge to merge "
            "it into its base model, or use --format lora-kohya or lora-diffusers"
        )
    if is_baked:
        lora = _baked(request, lora, _rank_of_baked(lora))
    return _export_lora(request, lora)


def _is_of_lora(request: Request) -> bool:
    return request.layout in {"lora-diffusers", "lora-kohya"}


def _export_whole(request: Request, source: ExportSource) -> Path:
    out = _whole_file(request, source.name)
    write = export_diffusers if request.layout == "diffusers" else export_single_file
    write(source, out, request.precision)
    return out


def _whole_file(request: Request, name: str) -> Path:
    return request.out or Path(f"{name}-diffusers" if request.layout == "diffusers" else f"{name}.safetensors")


def _export_lora(request: Request, source: LoraSource) -> Path:
    out = _lora_file(request, source.name)
    export_lora(source, out, _lora_layout(request), request.precision)
    return out


def _lora_layout(request: Request) -> LoraLayout:
    return "lora-diffusers" if request.layout == "lora-diffusers" else "lora-kohya"


def _lora_file(request: Request, name: str) -> Path:
    return request.out or Path(f"{name}-{_lora_layout(request)}.safetensors")


def _export_merged(request: Request, lora: LoraSource) -> Path:
    if _is_of_lora(request):
        raise ModelError(f"--merge: makes a complete model, --format {request.layout} a LoRA; leave one of them out")
    if request.layout == "diffusers":
        out = request.out or Path(f"{lora.name}-diffusers")
        merge_into_folder(lora, out, request.precision or torch.float32, request.base)
        return out
    out = request.out or Path(f"{lora.name}.safetensors")
    refuse_existing(out)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=".merging-") as temporary:
        folder = Path(temporary) / lora.name
        merge_into_folder(lora, folder, request.precision or torch.float32, request.base)
        merged = ExportSource(name=lora.name, model=find_model(str(folder)), config=lora.config, sample=lora.sample)
        return _export_whole(replace(request, out=out), merged)


def _export_extracted(request: Request, source: ExportSource, rank: int) -> Path:
    refuse_existing(_lora_file(request, source.name))
    if request.layout != "lora-diffusers":
        refuse_family_without_kohya(source.model.family)
    made, kept = extract_lora(source, base_of(source, request.base), rank)
    _say_kept(kept, rank)
    return _export_lora(request, made)


def _baked(request: Request, source: LoraSource, rank: int) -> LoraSource:
    """Return a DoRA as a plain LoRA, and say how much of it is kept."""
    refuse_existing(_lora_file(request, source.name))
    made, kept = bake_dora(source, base_of_lora(source, request.base), rank)
    say(
        f"{source.name} is a DoRA, which other programs read in different ways, none of them as it was trained; it is "
        f"baked into a plain LoRA of rank {rank} (--extract-lora RANK chooses another, --merge keeps all of it)"
    )
    _say_kept(kept, rank)
    return made


def _rank_of_baked(source: LoraSource) -> int:
    """Return the rank for a DoRA: the norms that it trains besides change each row by a factor, of any rank."""
    return max(_DORA_RANKS * settings["r"] for settings in source.lora.settings.values())


def _say_kept(kept: Mapping[str, ChangeNorms], rank: int) -> None:
    for component, norms in {**kept, "all": total_of(kept)}.items():
        say(f"rank {rank} keeps {norms.share:.1%} of the change of {component} (squared Frobenius norm)")
