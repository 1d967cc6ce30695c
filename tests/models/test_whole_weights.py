"""A model whose weight files lack tensors, have others, or hold NaN is refused before anything is computed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowmem_db.errors import ModelError, NonFiniteError
from lowmem_db.models.finding import find_model
from lowmem_db.models.loading import check_names

TENSORS = {
    "unet": ("conv_in.bias", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"),
    "text_encoder": ("text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.bias"),
    "vae": ("decoder.conv_in.bias", "encoder.mid_block.attentions.0.to_q.weight"),
}
CASES = [(component, name) for component, names in TENSORS.items() for name in names]


def change(model: Path, component: str, how: Callable[[dict[str, Tensor]], object]) -> None:
    (file,) = (model / component).glob("*.safetensors")
    state = load_file(file)
    how(state)
    save_file(state, file, {"format": "pt"})


@pytest.mark.parametrize(("component", "name"), CASES)
def test_missing_tensor_is_refused_before_a_weight_is_read(model_copy: Path, component: str, name: str) -> None:
    change(model_copy, component, lambda state: state.pop(name))
    with pytest.raises(ModelError, match=rf"{component}: its weight files lack 1 tensor, such as .*{name[-20:]}"):
        find_model(str(model_copy))


@pytest.mark.parametrize("component", TENSORS)
def test_superfluous_tensor_is_refused(model_copy: Path, component: str) -> None:
    change(model_copy, component, lambda state: state.update(other=torch.ones(2)))
    with pytest.raises(
        ModelError, match=rf"{component}: its weight files have, without a place .* 1 tensor, such as o"
    ):
        find_model(str(model_copy))


@pytest.mark.parametrize("component", TENSORS)
def test_tensor_of_another_shape_is_refused(model_copy: Path, component: str) -> None:
    name = TENSORS[component][0]
    change(model_copy, component, lambda state: state.update({name: torch.ones(3, 5)}))
    with pytest.raises(ModelError, match=rf"{name} is \[3, 5\], but config.json needs"):
        find_model(str(model_copy))


@pytest.mark.parametrize("component", TENSORS)
def test_pickled_weights_are_checked_when_they_are_loaded(
    model_copy: Path, pickle_weights: Callable[[Path], None], component: str
) -> None:
    change(model_copy, component, lambda state: state.pop(TENSORS[component][0]))
    pickle_weights(model_copy / component)
    with pytest.raises(ModelError, match="its weight files lack 1 tensor"):
        find_model(str(model_copy), allow_pickle=True).load(component)


@pytest.mark.parametrize(("component", "name"), CASES)
def test_weight_that_is_nan_is_named(model_copy: Path, component: str, name: str) -> None:
    change(model_copy, component, lambda state: state[name].view(-1).__setitem__(-1, float("nan")))
    with pytest.raises(NonFiniteError, match=rf"{component}: .*{name[-20:]} has values that are infinite or NaN"):
        find_model(str(model_copy)).load(component)


def test_weight_that_is_too_large_for_the_type_is_named(model_copy: Path) -> None:
    change(model_copy, "vae", lambda state: state["decoder.conv_in.bias"].fill_(1e6))
    assert find_model(str(model_copy)).load("vae")
    with pytest.raises(NonFiniteError, match=r"decoder\.conv_in\.bias .* in float16"):
        find_model(str(model_copy)).load("vae", dtype=torch.float16)


def test_tensors_that_published_files_have_and_nobody_uses_are_allowed() -> None:
    check_names(Path(), missing=(), unexpected=["text_model.embeddings.position_ids", "text_projection.weight"])
    with pytest.raises(ModelError, match=r"2 tensors, such as a"):
        check_names(Path(), missing=(), unexpected=["a", "b"])
