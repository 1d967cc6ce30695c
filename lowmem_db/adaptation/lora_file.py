"""A LoRA as one file in the layout of diffusers and peft, for ``load_lora_weights``.

Its metadata holds what the tensors do not say: peft's settings of the adapters, such as the scale, and the base model.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_db.adaptation.low_rank import adapters_of, inject, load_adapters, name_in_files, peft_settings
from lowmem_db.config.schema import Config, ModelConfig
from lowmem_db.errors import ModelError
from lowmem_db.storage.tensors import read_state, read_tensors, write_tensors

_ADAPTER_METADATA = "lora_adapter_metadata"  # diffusers' key; its fields are ``component.field``
_BASE = "lowmem_db_base"


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """The content of a LoRA file.

    Attributes:
        state: Tensors by ``component.path.lora_A.weight``, ``lora_B.weight`` and, for DoRA,
            ``lora_magnitude_vector``.
        settings: peft's settings of each component's adapters.
        base: The fields of ``model`` that name the base model; empty if the file does not say.
        metadata: All metadata of the file.
    """

    state: Mapping[str, Tensor]
    settings: Mapping[str, Mapping[str, Any]]
    base: Mapping[str, Any]
    metadata: Mapping[str, str]

    @property
    def trained_on(self) -> ModelConfig | None:
        """The base model, or None if the file does not say."""
        known = {name: value for name, value in self.base.items() if name in ModelConfig.model_fields}
        return ModelConfig(**known) if known.get("base") else None

    def of_component(self, component: str) -> dict[str, Tensor]:
        """Return a component's tensors, without the component in their names."""
        prefix = f"{component}."
        return {name.removeprefix(prefix): tensor for name, tensor in self.state.items() if name.startswith(prefix)}


def lora_file(
    modules: Mapping[str, nn.Module], settings: Mapping[str, Any], *, dtype: torch.dtype, base: Mapping[str, Any]
) -> LoraFile:
    """Return the adapters of a model as the content of a file.

    Args:
        modules: Components with adapters, by name.
        settings: See :func:`lowmem_db.adaptation.low_rank.peft_settings`.
        dtype: Type of the tensors.
        base: The fields of ``model`` that name the base model.
    """
    state = {
        f"{component}.{name}": tensor.to("cpu", dtype).contiguous()
        for component, module in modules.items()
        for name, tensor in adapters_of(component, module).items()
    }
    return LoraFile(state=state, settings={name: dict(settings) for name in modules}, base=dict(base), metadata={})


def write_lora(file: Path, lora: LoraFile) -> None:
    """Write a file for diffusers' ``load_lora_weights``."""
    fields = {
        f"{component}.{name}": value
        for component, settings in lora.settings.items()
        for name, value in {**settings, "target_modules": _targets(lora.of_component(component))}.items()
    }
    metadata = {"format": "pt", _ADAPTER_METADATA: json.dumps(fields, indent=2, sort_keys=True)}
    metadata |= {_BASE: json.dumps(lora.base)} if lora.base else {}
    write_tensors(file, lora.state, {**lora.metadata, **metadata})


def read_lora(file: Path) -> LoraFile:
    """Read what :func:`write_lora` wrote.

    Raises:
        ModelError: The file is not a LoRA in this layout.
        StorageError: It is missing or damaged.
    """
    state, metadata = read_tensors(file)
    if _ADAPTER_METADATA not in metadata:
        raise ModelError(f"{file}: is not a LoRA in diffusers' layout with its metadata ({_ADAPTER_METADATA})")
    fields = json.loads(metadata[_ADAPTER_METADATA])
    base = json.loads(metadata.get(_BASE, "{}"))
    settings: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        component, _, field = name.partition(".")
        if field != "target_modules":
            settings.setdefault(component, {})[field] = value
    return LoraFile(state=state, settings=settings, base=base, metadata=metadata)


def lora_of_checkpoint(folder: Path, config: Config) -> LoraFile:
    """Return the adapters of a checkpoint, or their moving average if the run keeps one.

    Args:
        folder: The checkpoint.
        config: Configuration of its run.
    """
    files = {file.stem: file for file in sorted(folder.glob("*.safetensors")) if file.stem not in {"optimizer", "ema"}}
    state = {
        f"{component}.{name}": value for component, file in files.items() for name, value in read_state(file).items()
    }
    if config.ema.enabled:
        for name, value in read_state(folder / "ema.safetensors").items():
            component, _, path = name.partition(".")
            state[f"{component}.{name_in_files(component, path)}"] = value
    settings = peft_settings(config.lora)
    return LoraFile(state=state, settings=dict.fromkeys(files, settings), base=config.model.model_dump(), metadata={})


def put_into(component: str, module: nn.Module, lora: LoraFile) -> None:
    """Put the adapters of a file into a component, if the file has any for it.

    Raises:
        ModelError: The adapters belong to a different model.
    """
    if component not in lora.settings:
        return
    state = lora.of_component(component)
    paths = [path for path, _ in module.named_modules()]
    targets = [path for path in paths if _is_target(path, set(_targets(state)))]
    try:
        inject(module, targets, lora.settings[component])
        load_adapters(component, module, state)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{component}: the LoRA does not fit this base model ({error}); use the one it was trained on"
        ) from error


def _targets(state: Mapping[str, Tensor]) -> list[str]:
    """Return the paths of the adapted layers, without ``text_model.`` so that they fit every transformers version."""
    return sorted({name.partition(".lora_")[0].removeprefix("text_model.") for name in state})


def _is_target(path: str, targets: set[str]) -> bool:
    return path.removeprefix("text_model.") in targets
