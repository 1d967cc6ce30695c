"""Writing a trained model as a folder that every diffusers pipeline loads, with safetensors only."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from lowmem_db_kernels import unpack_extra_bits_eager
from safetensors.torch import save_file
from torch import Tensor, nn

from lowmem_db.config.schema import ObjectiveConfig
from lowmem_db.config.sharing import public_name
from lowmem_db.errors import NonFiniteError
from lowmem_db.finite import is_finite
from lowmem_db.models.copying import copy_known_files
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.loading import schedule_changes
from lowmem_db.models.names import published_name, second_names

_DDIM = "DDIMScheduler"
_PLACES = ("_name_or_path", "name_or_path")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def save_model(
    folder: Path,
    source: ModelFolder,
    trained: Mapping[str, nn.Module],
    *,
    dtype: torch.dtype,
    objective: ObjectiveConfig | None = None,
    extra_bits: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a complete model: trained components in ``dtype``, the others as they are in the source.

    Weights that are pickled, or a variant, in the source are written as safetensors under the usual names, in fp32.

    Args:
        folder: An existing, empty folder.
        source: The model that training started from.
        trained: Trained components by name.
        dtype: Type of their weights on disk; the modules themselves are not changed.
        objective: What it was trained for: what the UNet predicts and the noise schedule, if they have changed, and
            the variance. Samplers read them from the scheduler. Default: nothing has changed.
        extra_bits: Eight more bits of bf16 weights, by ``component.name``; used if ``dtype`` is wider than bf16.
    """
    for component, has_weights in ((each.name, each.has_weights) for each in source.family.components):
        if component in trained:
            own = {name.removeprefix(f"{component}."): bits for name, bits in (extra_bits or {}).items()}
            save_component(folder / component, trained[component], dtype=dtype, extra_bits=own)
        elif has_weights and not _has_usual_weights(source, component):
            save_component(folder / component, source.load_whole(component), dtype=torch.float32)
        else:
            copy_known_files(source.folder_of(component), folder / component, root=source.folder_of(component).parent)
    index = {"_diffusers_version": diffusers.__version__} | source.family.finished_index(source.index)
    objective = objective or ObjectiveConfig()
    changed = {
        **schedule_changes(objective.prediction_type, objective.zero_terminal_snr),
        **source.family.scheduler_changes(source, objective),
    }
    if changed:
        index["scheduler"] = ["diffusers", _change_scheduler(folder / "scheduler" / "scheduler_config.json", changed)]
    _write_json(folder / "model_index.json", index)


def forget_places(folder: Path) -> None:
    """Remove from the configurations below a folder where on this machine their base lay, which libraries write there.

    Names of models on the hub stay.
    """
    for file in folder.rglob("*.json"):
        config = _read_json(file)
        if isinstance(config, dict):
            kept = {
                name: value
                for name, value in config.items()
                if name not in _PLACES or not isinstance(value, str) or public_name(value) == value
            }
            if kept != config:
                _write_json(file, kept)


def _change_scheduler(file: Path, changed: Mapping[str, Any]) -> str:
    """Change a scheduler's configuration; return its class, which becomes DDIM if the old one lacks the options."""
    config = _read_json(file)
    name = config.get("_class_name", _DDIM)
    if not set(changed) <= inspect.signature(getattr(diffusers, name)).parameters.keys():
        name = _DDIM
    _write_json(file, {**config, "_class_name": name, **changed})
    return name


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _has_usual_weights(source: ModelFolder, component: str) -> bool:
    return source.variant_of(component) is None and any(source.folder_of(component).glob("*.safetensors"))


def save_component(
    folder: Path, module: nn.Module, *, dtype: torch.dtype, extra_bits: Mapping[str, Tensor] | None = None
) -> None:
    """Write one component with its configuration into a folder named after it.

    Floating-point tensors are converted to ``dtype``.
    """
    folder.mkdir(parents=True)
    if isinstance(module, ModelMixin):
        module.save_config(folder)
        file = folder / "diffusion_pytorch_model.safetensors"
    else:
        module.config.save_pretrained(folder)  # type: ignore[union-attr, operator]
        file = folder / "model.safetensors"
    save_file(published_state(folder.name, module, dtype, extra_bits), file, {"format": "pt"})


def published_state(
    component: str, module: nn.Module, dtype: torch.dtype, extra_bits: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return a module's weights under the names of the published files, joined with their extra bits.

    Raises:
        NonFiniteError: One is infinite or NaN.
    """
    state, second = {}, second_names(module)
    for name, tensor in module.state_dict().items():
        if name in second:
            continue
        published = published_name(component, name)
        if not is_finite(tensor):
            raise NonFiniteError(f"{component}: {published} has values that are infinite or NaN, so nothing is written")
        bits = None if dtype == torch.bfloat16 else (extra_bits or {}).get(name)
        if bits is not None:
            tensor = unpack_extra_bits_eager(tensor.detach(), bits.to(tensor.device))
        state[published] = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
    return state
