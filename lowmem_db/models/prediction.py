"""What the UNet of a single file predicts, which the shapes of its weights do not reveal.

Programs leave different traces. In order of trust: empty tensors as markers (``v_pred``, ``ztsnr``), a configuration
of the original repositories beside the file, metadata; for Stable Diffusion 2.x also a statistic of one tensor, which
other loaders look at too.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lowmem_db.errors import ModelError
from lowmem_db.models.families.original_layout import UNET_PREFIX, Layout
from lowmem_db.models.stored_tensor import StoredTensor

CONFIGS_KEY = "lowmem_db.components"
"""Metadata key of files written by this program: the configuration of every component, as JSON."""
V_PREDICTION = "v_pred"
ZERO_TERMINAL_SNR = "ztsnr"
MARKERS = frozenset({V_PREDICTION, ZERO_TERMINAL_SNR})
"""Names of empty tensors."""
_NAMES = {
    "v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon", "sample": "sample",
}  # fmt: skip
_SPEC_KEYS = ("modelspec.predict_key", "modelspec.prediction_type")  # ComfyUI's, and ModelSpec's
_SPEC_ARCHITECTURE = re.compile(r"stable-diffusion-v2-\d+(-v)?")
_SCALING = re.compile(r".*\.(V|Eps)Scaling")
_TELLING = f"{UNET_PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_TELLING_SPREAD = 0.09  # ComfyUI's threshold


@dataclass(frozen=True)
class Prediction:
    """What a UNet predicts.

    Attributes:
        type: ``epsilon``, ``v_prediction`` or ``sample``.
        reason: How that was decided, and what says otherwise.
    """

    type: str
    reason: str


def find_prediction(
    file: Path, layout: Layout, found: Mapping[str, StoredTensor], metadata: Mapping[str, str]
) -> Prediction:
    """Return what the UNet of a file predicts.

    Args:
        file: The file.
        layout: Its layout.
        found: Its tensors.
        metadata: Its metadata.

    Raises:
        ModelError: Nothing says so and most models of its family do not predict the same, or the configuration beside
            the file cannot be used.
    """
    said = list(_what_is_said(file, found, metadata))
    if not said:
        return _guess(file, layout, found)
    prediction_type, source = said[0]
    against = [f"{other} says {kind}" for kind, other in said if kind != prediction_type]
    overruled = f", although {' and '.join(against)}" if against else ""
    return Prediction(prediction_type, f"as {source} says{overruled}")


def _what_is_said(
    file: Path, found: Mapping[str, StoredTensor], metadata: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Yield what each trace says, with the trace in words, the most trusted first."""
    if V_PREDICTION in found:
        yield "v_prediction", f"its tensor {V_PREDICTION}"
    beside = file.with_suffix(".yaml")
    if beside.is_file() and (read := _from_configuration(beside)) is not None:
        yield read, f"{beside.name} next to it"
    if CONFIGS_KEY in metadata:
        own = json.loads(metadata[CONFIGS_KEY])["scheduler"].get("prediction_type", "epsilon")
        yield own, f"its metadata {CONFIGS_KEY}"
    for key in _SPEC_KEYS:
        if metadata.get(key) in _NAMES:
            yield _NAMES[metadata[key]], f"its metadata {key}"
    if architecture := _SPEC_ARCHITECTURE.fullmatch(metadata.get("modelspec.architecture", "")):
        yield "v_prediction" if architecture[1] else "epsilon", "its metadata modelspec.architecture"


def _guess(file: Path, layout: Layout, found: Mapping[str, StoredTensor]) -> Prediction:
    way_out = f"write a file {file.with_suffix('.yaml').name} next to it with the line parameterization: v (or eps)"
    if layout.usual_prediction is not None:
        return Prediction(
            layout.usual_prediction,
            f"like most models of its family, as the file does not say; if that is wrong, {way_out}",
        )
    if _TELLING not in found:
        raise ModelError(
            f"model.base: {file} does not say whether it predicts epsilon or v, and its family has both; {way_out}"
        )
    spread = float(found[_TELLING].read().float().std(correction=0))
    kind = "v_prediction" if spread > _TELLING_SPREAD else "epsilon"
    return Prediction(
        kind,
        f"judging by the spread of {_TELLING} ({spread:.3f}; above {_TELLING_SPREAD} it is v), as the file does not "
        f"say; if that is wrong, {way_out}",
    )


def _from_configuration(file: Path) -> str | None:
    """Return what the UNet predicts according to a configuration of the original repositories, LDM's or SGM's.

    LDM's default is epsilon; a file without a model's ``params`` is something else and says nothing.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ModelError(f"{file}: is damaged ({error}); delete it, or write parameterization: v (or eps)") from error
    said = next(_values(content, "parameterization"), None)
    if said is not None:
        if said not in _NAMES:
            raise ModelError(f"{file}: parameterization is {said!r}; allowed: eps, v")
        return _NAMES[said]
    for scaling in _values(content, "scaling_config"):
        target = str(scaling.get("target") if isinstance(scaling, dict) else scaling)
        known = _SCALING.fullmatch(target)
        if known is None:
            raise ModelError(f"{file}: scaling_config is {target!r}; allowed: EpsScaling, VScaling")
        return "v_prediction" if known[1] == "V" else "epsilon"
    return "epsilon" if any(_values(content, "params")) else None


def _values(content: Any, key: str) -> Iterator[Any]:
    """Yield the values of a key anywhere in nested mappings."""
    if isinstance(content, dict):
        if key in content:
            yield content[key]
        for value in content.values():
            yield from _values(value, key)
