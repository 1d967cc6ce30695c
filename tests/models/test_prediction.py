"""What a single file's UNet predicts: which trace decides, and what is said about it."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowmem_db.errors import ModelError
from lowmem_db.models.families.original_layout import SD1, SD2, SDXL, Layout
from lowmem_db.models.prediction import Prediction, find_prediction
from lowmem_db.models.stored_tensor import read_header

SPREAD = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
SGM = (
    "model:\n  params:\n    denoiser_config:\n      params:\n        scaling_config:\n"
    "          target: sgm.modules.diffusionmodules.denoiser_scaling.{}\n"
)
V = {"v_pred": torch.tensor([])}


def found_in(
    folder: Path,
    layout: Layout = SD2,
    *,
    tensors: dict[str, torch.Tensor] | None = None,
    metadata: dict[str, str] | None = None,
    beside: str | None = None,
) -> Prediction:
    file = folder / "m.safetensors"
    save_file({"x": torch.zeros(1), **(tensors or {})}, file, metadata)
    if beside is not None:
        (folder / "m.yaml").write_text(beside)
    return find_prediction(file, layout, *read_header(file))


@pytest.mark.parametrize(
    ("key", "said", "prediction_type"),
    [
        ("modelspec.prediction_type", "v", "v_prediction"),
        ("modelspec.prediction_type", "epsilon", "epsilon"),
        ("modelspec.predict_key", "v", "v_prediction"),
        ("modelspec.predict_key", "epsilon", "epsilon"),
        ("modelspec.architecture", "stable-diffusion-v2-768-v", "v_prediction"),
        ("modelspec.architecture", "stable-diffusion-v2-512", "epsilon"),
        ("lowmem_db.components", '{"scheduler": {"prediction_type": "sample"}}', "sample"),
    ],
)
def test_metadata_tell_what_is_predicted(key: str, said: str, prediction_type: str, tmp_path: Path) -> None:
    found = found_in(tmp_path, metadata={key: said})
    assert found == Prediction(prediction_type, f"as its metadata {key} says")


@pytest.mark.parametrize(
    ("text", "prediction_type"),
    [
        ('model:\n  target: ldm\n  params:\n    parameterization: "v"\n', "v_prediction"),
        ("model:\n  params:\n    linear_start: 0.00085\n", "epsilon"),
        ("parameterization: eps\n", "epsilon"),
        (SGM.format("VScaling"), "v_prediction"),
        (SGM.format("EpsScaling"), "epsilon"),
    ],
)
def test_configuration_beside_the_file_tells_what_is_predicted(text: str, prediction_type: str, tmp_path: Path) -> None:
    assert found_in(tmp_path, beside=text) == Prediction(prediction_type, "as m.yaml next to it says")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("parameterization: x0\n", "'x0'; allowed: eps, v"),
        ("a: [", "is damaged"),
        (SGM.format("EDMScaling"), "EDMScaling'; allowed: EpsScaling, VScaling"),
    ],
)
def test_configuration_beside_the_file_that_cannot_be_used_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=re.escape(said)):
        found_in(tmp_path, beside=text)


def test_a_configuration_of_something_else_says_nothing(tmp_path: Path) -> None:
    found = found_in(tmp_path, tensors=V, beside="model:\n  base: m.safetensors\n")
    assert found == Prediction("v_prediction", "as its tensor v_pred says")


def test_tensors_come_before_the_configuration_and_that_before_metadata(tmp_path: Path) -> None:
    spec = {"modelspec.prediction_type": "epsilon"}
    assert found_in(tmp_path, SDXL, tensors=V, metadata=spec, beside=SGM.format("EpsScaling")) == Prediction(
        "v_prediction",
        "as its tensor v_pred says, although m.yaml next to it says epsilon and its metadata modelspec.prediction_type "
        "says epsilon",
    )
    assert found_in(tmp_path, SDXL, metadata=spec, beside="parameterization: v") == Prediction(
        "v_prediction", "as m.yaml next to it says, although its metadata modelspec.prediction_type says epsilon"
    )


@pytest.mark.parametrize("layout", [SD1, SDXL])
def test_a_guess_is_said_with_the_way_to_correct_it(layout: Layout, tmp_path: Path) -> None:
    found = found_in(tmp_path, layout)
    assert found.type == "epsilon"
    assert "like most models of its family, as the file does not say" in found.reason
    assert "write a file m.yaml next to it with the line parameterization: v (or eps)" in found.reason


@pytest.mark.parametrize(("spread", "prediction_type"), [(0.07, "epsilon"), (0.12, "v_prediction")])
def test_2x_that_does_not_say_is_judged_by_the_tensor_that_other_loaders_look_at(
    spread: float, prediction_type: str, tmp_path: Path
) -> None:
    found = found_in(tmp_path, tensors={SPREAD: torch.tensor([spread, -spread]).repeat(160)})
    assert found.type == prediction_type
    assert f"judging by the spread of {SPREAD} ({spread}" in found.reason
    assert "if that is wrong, write a file m.yaml" in found.reason


def test_2x_without_any_trace_is_asked_about(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not say whether it predicts epsilon or v.*write a file m\.yaml"):
        found_in(tmp_path)
