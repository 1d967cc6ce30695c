"""Which family a model is of, and families from outside."""

from pathlib import Path

import pytest

from lowmem_db.errors import ModelError
from lowmem_db.models.families import FAMILIES, find_family, find_lora_prefixes, register
from lowmem_db.models.families.stable_diffusion import StableDiffusion
from lowmem_db.models.files import ModelFiles


def test_registered_family_comes_first_and_goes_again(tiny_model: Path) -> None:
    before, files = list(FAMILIES), ModelFiles(path=tiny_model)
    mine = StableDiffusion("mine", 16)
    with register(mine):
        assert find_family(files) is mine
    assert before == FAMILIES
    assert find_family(files).name == "Stable Diffusion architecture"


def test_models_of_no_family_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    with pytest.raises(ModelError, match="is a OtherPipeline; allowed: StableDiffusionPipeline, StableDiffusionXL"):
        find_family(ModelFiles(path=tmp_path))


def test_prefixes_of_adapters_are_those_of_the_family_that_has_the_components() -> None:
    assert find_lora_prefixes(["unet", "text_encoder"])["text_encoder"] == "lora_te"
    assert find_lora_prefixes(["unet", "text_encoder", "text_encoder_2"])["text_encoder"] == "lora_te1"
    with pytest.raises(ModelError, match="no names for adapters of transformer"):
        find_lora_prefixes(["transformer"])
