"""Metadata of a single file: ModelSpec, and the run that made it.

Reference: https://github.com/Stability-AI/ModelSpec, version 1.0.0. There is no date, so that the same model gives the
same bytes. No photo, no path and no name of a folder is in it.
"""

import json
from typing import Any

from lowmem_db.config.sharing import shareable
from lowmem_db.exporting.source import ExportSource
from lowmem_db.exporting.thumbnails import THUMBNAIL_KEY, thumbnail_text
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
        found["lowmem_db.config"] = _json(shareable(source.config.model_dump(mode="json")))
    if source.sample is not None:
        found[THUMBNAIL_KEY] = f"data:image/jpeg;base64,{thumbnail_text(source.sample)}"
    return found


def _without_path(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
