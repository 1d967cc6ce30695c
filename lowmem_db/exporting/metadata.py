"""Metadata of a single file: ModelSpec, and the run that made it.

Reference: https://github.com/Stability-AI/ModelSpec, version 1.0.0. There is no date, so that the same model gives the
same bytes.
"""

import json
from pathlib import Path
from typing import Any

from lowmem_db.config.schema import Config
from lowmem_db.exporting.source import ExportSource
from lowmem_db.models.families.original_layout import Layout
from lowmem_db.models.prediction import CONFIGS_KEY

_SPEC_PREDICTION = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}


def metadata_of(source: ExportSource, layout: Layout) -> dict[str, str]:
    """Return the metadata of a model's single file."""
    model = source.model
    components = {name: _without_path(model.config_of(name)) for name in (*layout.prefixes, "scheduler")}
    resolution = model.resolution if source.config is None else source.config.data.resolution
    prediction_type = components["scheduler"].get("prediction_type", "epsilon")
    found = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": layout.architecture_of(
            components[model.family.denoiser]["sample_size"], prediction_type
        ),
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": source.name,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": _SPEC_PREDICTION[prediction_type],
        "modelspec.predict_key": _SPEC_PREDICTION[prediction_type],  # ComfyUI's name for it
        CONFIGS_KEY: _json(components),
        "format": "pt",
    }
    if source.config is not None:
        found["modelspec.trigger_phrase"] = source.config.subject.instance_prompt
        if source.config.model.clip_skip is not None:
            found["modelspec.encoder_layer"] = str(source.config.model.clip_skip)
        found["lowmem_db.config"] = _json(_without_folders(source.config))
    return found


def _without_path(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def _without_folders(config: Config) -> dict[str, Any]:
    """Return a configuration whose paths are reduced to names, so that the file reveals no folders of this machine."""

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [named(item) for item in value]
        return value.name if isinstance(value, Path) else value

    found = named(config.model_dump())
    if Path(config.model.base).exists():
        found["model"]["base"] = Path(config.model.base).name
    return found


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
