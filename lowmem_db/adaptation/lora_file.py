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
from lowmem_db.config.schema import Config
from lowmem_db.errors import ModelError, NonFiniteError
from lowmem_db.finite import first_not_finite
from lowmem_db.models.suggested_base import SuggestedBase
from lowmem_db.storage.checksums import check_folder
from lowmem_db.storage.tensors import read_state, read_tensors, write_tensors

_ADAPTER_METADATA = "lora_adapter_metadata"  # diffusers' key; its fields are ``component.field``
_LARGEST = 1 << 16
_SETTINGS: dict[str, tuple[tuple[type, ...], float]] = {  # types, and least value
    "r": ((int,), 1),
    "lora_alpha": ((int, float), 0),
    "lora_dropout": ((int, float), 0),
    "use_rslora": ((bool,), 0),
    "use_dora": ((bool,), 0),
}
_WANTED = {"rank_pattern": {}}  # diffusers 0.35 loads no file whose metadata lack it


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """The content of a LoRA file.

    Attributes:
        state: Tensors by ``component.path.lora_A.weight``, ``lora_B.weight`` and, for DoRA,
            ``lora_magnitude_vector``.
        settings: peft's settings of each component's adapters.
        base: What it says of its base model.
        metadata: All metadata of the file.
    """

    state: Mapping[str, Tensor]
    settings: Mapping[str, Mapping[str, Any]]
    base: SuggestedBase
    metadata: Mapping[str, str]

    def of_component(self, component: str) -> dict[str, Tensor]:
        """Return a component's tensors, without the component in their names."""
        prefix = f"{component}."
        return {name.removeprefix(prefix): tensor for name, tensor in self.state.items() if name.startswith(prefix)}


def lora_file(
    modules: Mapping[str, nn.Module],
    settings: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    base: SuggestedBase,
) -> LoraFile:
    """Return the adapters of a model as the content of a file.

    Args:
        modules: Components with adapters, by name.
        settings: See :func:`lowmem_db.adaptation.low_rank.peft_settings`.
        dtype: Type of the tensors.
        base: Its base model.
    """
    state = {
        f"{component}.{name}": tensor.to("cpu", dtype).contiguous()
        for component, module in modules.items()
        for name, tensor in adapters_of(component, module).items()
    }
    return LoraFile(
        state=state,
        settings={name: dict(settings) for name in modules},
        base=base,
        metadata={},
    )


def write_lora(file: Path, lora: LoraFile) -> None:
    """Write a file for diffusers' ``load_lora_weights``."""
    fields = {
        f"{component}.{name}": value
        for component, settings in lora.settings.items()
        for name, value in (_WANTED | {**settings, "target_modules": _targets(lora.of_component(component))}).items()
    }
    metadata = {"format": "pt", _ADAPTER_METADATA: json.dumps(fields, indent=2, sort_keys=True)}
    write_tensors(file, lora.state, {**lora.metadata, **metadata, **lora.base.metadata()})


def read_lora(file: Path) -> LoraFile:
    """Read what :func:`write_lora` wrote.

    Raises:
        ModelError: The file is not a LoRA in this layout.
        StorageError: It is missing or damaged.
    """
    check_folder(file.parent, below=file.name)
    state, metadata = read_tensors(file)
    if _ADAPTER_METADATA not in metadata:
        raise ModelError(f"{file}: is not a LoRA in diffusers' layout with its metadata ({_ADAPTER_METADATA})")
    if (name := first_not_finite(state)) is not None:
        raise NonFiniteError(f"{file}: {name} has values that are infinite or NaN; get the file again")
    try:
        fields = _mapping(metadata[_ADAPTER_METADATA])
        base = SuggestedBase.of(metadata)
        settings = _settings(fields, {name.partition(".")[0] for name in state})
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{file}: its metadata is damaged ({' '.join(str(error).split())[:200]})") from error
    return LoraFile(state=state, settings=settings, base=base, metadata=metadata)


def _settings(fields: Mapping[str, Any], components: set[str]) -> dict[str, dict[str, Any]]:
    """Return peft's settings by component: those that this program writes, and no others of peft's many."""
    settings: dict[str, dict[str, Any]] = {name: {} for name in sorted(components)}
    for name, value in fields.items():
        component, _, field = name.partition(".")
        if field not in _SETTINGS:
            continue
        kinds, least = _SETTINGS[field]
        if type(value) not in kinds or not least <= value <= _LARGEST:
            raise ValueError(f"{name} is {value!r}")
        settings.setdefault(component, {})[field] = value
    for component, found in settings.items():
        if missing := _SETTINGS.keys() - found.keys():
            raise ValueError(f"{component}.{sorted(missing)[0]} is missing")
    return settings


def _mapping(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__} instead of a mapping")
    return found


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
    base = SuggestedBase(fields=config.model.model_dump())
    return LoraFile(state=state, settings=dict.fromkeys(files, settings), base=base, metadata={})


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
