"""Exporting LoRAs in the layouts of diffusers / peft and of kohya, which ComfyUI and AUTOMATIC1111 load."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lowmem_db.adaptation.lora_file import LoraFile, read_lora, write_lora
from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config
from lowmem_db.errors import ModelError
from lowmem_db.exporting.casting import cast
from lowmem_db.exporting.source import refuse_existing
from lowmem_db.exporting.thumbnails import THUMBNAIL_KEY, thumbnail_text
from lowmem_db.models.families import FAMILIES, Family, find_lora_prefixes
from lowmem_db.storage.places import LORA_FILE
from lowmem_db.storage.run_folder import RunFolder
from lowmem_db.storage.tensors import write_tensors

LoraLayout = Literal["lora-diffusers", "lora-kohya"]
_FACTORS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}


@dataclass(frozen=True, kw_only=True)
class LoraSource:
    """A LoRA to export.

    Attributes:
        name: The name of its run or folder.
        lora: Its tensors and settings.
        config: Configuration of its run, or None.
        sample: An image that the run has drawn, for the thumbnail, or None.
    """

    name: str
    lora: LoraFile
    config: Config | None = None
    sample: Path | None = None


def find_lora_source(source: str) -> LoraSource | None:
    """Return the LoRA of a finished run or in a folder, in diffusers' layout, or None if there is none.

    Raises:
        ModelError: The file is not a LoRA in this layout.
        StorageError: It is damaged.
    """
    path = Path(source)
    run = RunFolder(path)
    name = path.resolve().name
    if (run.final_dir / LORA_FILE).is_file():
        config = load_config(run.config_file) if run.config_file.is_file() else None
        lora = read_lora(run.final_dir / LORA_FILE)
        return LoraSource(name=name, lora=lora, config=config, sample=run.newest_sample())
    if (path / LORA_FILE).is_file():
        return LoraSource(name=name, lora=read_lora(path / LORA_FILE))
    if path.name == LORA_FILE and path.is_file():
        return LoraSource(name=path.resolve().parent.name, lora=read_lora(path))
    return None


def export_lora(source: LoraSource, out: Path, layout: LoraLayout, precision: torch.dtype | None = None) -> None:
    """Write a LoRA as one file.

    Args:
        source: The LoRA.
        out: The file to create.
        layout: Its layout.
        precision: Type of the tensors. Default: unchanged.

    Raises:
        ModelError: ``out`` exists, or a value does not fit into the precision.
        StorageError: The disk is full.
    """
    refuse_existing(out)
    state = {
        name: cast(name, tensor, precision or tensor.dtype).contiguous() for name, tensor in source.lora.state.items()
    }
    lora = replace(source.lora, state=state, base=source.lora.base.without_folders())
    if layout == "lora-diffusers":
        write_lora(out, lora)
    else:
        write_tensors(out, kohya_state(lora), kohya_metadata(replace(source, lora=lora)))


def refuse_family_without_kohya(family: Family) -> None:
    """Refuse a family whose adapters have no names in kohya's layout.

    Raises:
        ModelError: It is one.
    """
    if not family.lora_prefixes:
        raise ModelError(f"kohya's layout has no names for adapters of {family.name}; export --format lora-diffusers")


def kohya_state(lora: LoraFile) -> dict[str, Tensor]:
    """Return the tensors of a LoRA under the names of kohya's scripts.

    Each layer gets an ``alpha`` for which ``alpha / rank`` is the adapter's scale, rank-stabilised or not.

    Raises:
        ModelError: It is a DoRA, whose ``dora_scale`` programs read in different ways, none of them as it was trained;
            or the layout has no names for its family.
    """
    if is_dora(lora):
        raise ModelError(
            "lora.dora: true, but kohya's layout has no norms that programs agree on; bake it into a LoRA with "
            "export --format lora-kohya, or into the model with export --merge"
        )
    if (family := _family_of(lora)) is not None:
        refuse_family_without_kohya(family)
    prefixes = find_lora_prefixes(lora.settings)
    state: dict[str, Tensor] = {}
    for name, tensor in lora.state.items():
        component, _, path = name.partition(".")
        layer, _, kind = path.partition(".lora_")
        target = f"{prefixes[component]}_{layer.replace('.', '_')}"
        state[f"{target}.{_FACTORS[f'lora_{kind}']}"] = tensor
        state[f"{target}.alpha"] = torch.tensor(alpha_of(lora.settings[component]))
    return state


def is_dora(lora: LoraFile) -> bool:
    """Return whether adapters have norms besides their factors, which kohya's layout cannot express."""
    return any(settings.get("use_dora") for settings in lora.settings.values())


def alpha_of(settings: Mapping[str, Any]) -> float:
    """Return the alpha for which ``alpha / rank`` is the scale of an adapter."""
    alpha, rank = float(settings["lora_alpha"]), settings["r"]
    return alpha * math.sqrt(rank) if settings["use_rslora"] else alpha


def kohya_metadata(source: LoraSource) -> dict[str, str]:
    """Return the metadata that kohya's scripts write, as far as it is known."""
    settings = next(iter(source.lora.settings.values()))
    architecture, is_2x = _architecture(source)
    found: dict[str, Any] = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": settings["r"],
        "ss_network_alpha": alpha_of(settings),
        "ss_output_name": source.name,
        "ss_base_model_version": _base_version(source.lora),
        "ss_v2": is_2x,
        "ss_sd_model_name": Path(source.lora.base.name).name or None,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.architecture": architecture,
        "modelspec.title": source.name,
    }
    if settings["lora_dropout"]:
        found["ss_network_dropout"] = settings["lora_dropout"]
    if source.config is not None:
        found |= _of_run(source.config)
    if source.sample is not None:
        found |= _thumbnail(source.sample)
    return {name: str(value) for name, value in found.items() if value is not None} | {"format": "pt"}


def _of_run(config: Config) -> dict[str, Any]:
    training = config.training
    of_text = training.learning_rate_text_encoder or training.learning_rate
    return {
        "ss_unet_lr": training.learning_rate,
        "ss_learning_rate": training.learning_rate,
        "ss_text_encoder_lr": of_text if training.train_text_encoder else None,
        "ss_lr_scheduler": training.lr_scheduler,
        "ss_lr_warmup_steps": training.lr_warmup_steps,
        "ss_max_train_steps": training.max_train_steps,
        "ss_steps": training.max_train_steps,
        "ss_batch_size_per_device": training.train_batch_size,
        "ss_gradient_accumulation_steps": config.samples_per_step // training.train_batch_size,
        "ss_optimizer": config.optimizer.name,
        "ss_mixed_precision": training.mixed_precision,
        "ss_resolution": f"({config.data.resolution}, {config.data.resolution})",
        "ss_seed": config.seed,
        "ss_prior_loss_weight": config.prior.loss_weight if config.prior.enabled else None,
        "ss_min_snr_gamma": config.objective.snr_gamma,
        "ss_noise_offset": config.objective.noise_offset or None,
        "ss_clip_skip": config.model.clip_skip,
        "modelspec.encoder_layer": config.model.clip_skip,
        "modelspec.trigger_phrase": config.subject.instance_prompt,
        "modelspec.resolution": f"{config.data.resolution}x{config.data.resolution}",
        "ss_tag_frequency": json.dumps({"instance": {config.subject.instance_prompt: 1}}),
    }


def _thumbnail(sample: Path) -> dict[str, str]:
    """Return a small copy of an image, as ModelSpec and as AUTOMATIC1111 name it."""
    text = thumbnail_text(sample)
    return {THUMBNAIL_KEY: f"data:image/jpeg;base64,{text}", "ssmd_cover_images": json.dumps([text])}


def _base_version(lora: LoraFile) -> str | None:
    """Return the base model's name in kohya's scripts, which the adapters reveal."""
    family = _family_of(lora)
    return None if family is None else family.kohya_version


def _family_of(lora: LoraFile) -> Family | None:
    return next((family for family in FAMILIES if family.recognises_lora(lora.state)), None)


def _architecture(source: LoraSource) -> tuple[str | None, bool | None]:
    """Return ModelSpec's name of the architecture, and whether it is Stable Diffusion 2.x, if the family is known.

    ModelSpec tells 2.x models of 768 px, which predict v, from those of 512 px, which predict epsilon.
    """
    family = _family_of(source.lora)
    layout = None if family is None else family.layout
    if layout is None:
        return None, None
    is_large = source.config is not None and source.config.data.resolution > 512
    name = layout.architecture_of(96 if is_large else 64, "v_prediction" if is_large else "epsilon")
    return f"{name}/lora", layout.sizes_in_name
