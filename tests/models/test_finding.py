"""Where a model is, and what is refused before a weight is read."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest

from lowmem_db.errors import ModelError
from lowmem_db.models.families.stable_diffusion import SD_OF_ANY_WIDTH
from lowmem_db.models.finding import find_model
from lowmem_db.storage.places import DEMO_DIR
from tests.tiny_models import tiny_autoencoder, tiny_text_encoder, tiny_unet

COMPONENTS = [component.name for component in SD_OF_ANY_WIDTH.components]


@pytest.fixture
def hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def set_index(model: Path, content: str) -> None:
    (model / "model_index.json").write_text(content)


def configure(model: Path, component: str, **fields: object) -> None:
    file = model / component / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_folder_is_found(tiny_model: Path) -> None:
    model = find_model(str(tiny_model))
    assert (model.path, model.family.name) == (tiny_model, "Stable Diffusion architecture")


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_demo_is_found_wherever_the_command_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    model = find_model("demo")
    assert {path.name for path in model.path.iterdir() if path.is_dir()} == set(COMPONENTS)
    assert size_of(model.path) <= 30_000_000


def test_small_pixel_cascade_is_found_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    stages = [find_model(name) for name in ("demo_if", "demo_if_ii")]
    assert [(stage.family.name, stage.resolution) for stage in stages] == [
        ("DeepFloyd IF, stage I", 16),
        ("DeepFloyd IF, super-resolution", 64),
    ]
    assert stages[0].content_key("text_encoder", "tokenizer") == stages[1].content_key("text_encoder", "tokenizer")
    assert sum(size_of(stage.path) for stage in stages) <= 8_000_000
    assert size_of(DEMO_DIR.parent) <= 38_000_000


@pytest.mark.parametrize(
    ("width", "family"),
    [(768, "Stable Diffusion 1.x"), (1024, "Stable Diffusion 2.x"), (16, "Stable Diffusion architecture")],
)
def test_family_follows_the_width_of_the_text_embeddings(model_copy: Path, width: int, family: str) -> None:
    configure(model_copy, "unet", cross_attention_dim=width)
    configure(model_copy, "text_encoder", hidden_size=width)
    assert find_model(str(model_copy), weights=False).family.name == family


def test_family_of_two_text_encoders_is_sdxl_s(tiny_sdxl: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_sdxl, tmp_path / "copy")
    assert find_model(str(copy)).family.name == "Stable Diffusion XL architecture"
    configure(copy, "unet", cross_attention_dim=2048)
    configure(copy, "text_encoder", hidden_size=2032)
    assert find_model(str(copy), weights=False).family.name == "Stable Diffusion XL"


def test_sdxl_without_its_second_text_encoder_is_refused(tiny_sdxl: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_sdxl, tmp_path / "copy")
    (copy / "text_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="text_encoder_2 has no weights"):
        find_model(str(copy))
    shutil.rmtree(copy / "text_encoder_2")
    with pytest.raises(ModelError, match="lacks text_encoder_2"):
        find_model(str(copy))


def test_missing_folder_names_its_neighbour(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match=rf"is not a folder, a file or a hub id; .*; did you mean {tiny_model}\?"):
        find_model(str(tiny_model.with_name(tiny_model.name + "x")))


def test_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.safetensors").write_text("notes")
    with pytest.raises(ModelError, match=r"notes\.safetensors: is truncated or not a safetensors file"):
        find_model(str(tmp_path / "notes.safetensors"))


def test_single_file_has_no_variant(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"model\.variant: fp16, but .* is a single file, without variants"):
        find_model(str(tmp_path / "model.safetensors"), variant="fp16")


def test_missing_single_file_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "dreams.safetensors").touch()
    with pytest.raises(
        ModelError, match=r"not a folder, a file or a hub id; .*; did you mean models/dreams.safetensors"
    ):
        find_model("models/dream.safetensors")


def test_single_file_on_the_hub_cannot_be_reached(hub_cache: Path) -> None:
    with pytest.raises(
        ModelError, match=r"'owner/name/folder/model\.safetensors' does not exist here and cannot be downloaded"
    ):
        find_model("owner/name/folder/model.safetensors")


def test_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no model_index\.json; allowed: a folder in diffusers' layout"):
        find_model(str(tmp_path))


@pytest.mark.parametrize("name", ["StableDiffusionXLImg2ImgPipeline", "FluxPipeline", None])
def test_other_pipelines_are_refused(model_copy: Path, name: str | None) -> None:
    set_index(model_copy, json.dumps({"_class_name": name}))
    with pytest.raises(ModelError, match=rf"is a {name}; allowed: StableDiffusionPipeline"):
        find_model(str(model_copy))


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "\0"])
def test_damaged_index_is_refused_by_its_name(model_copy: Path, content: str) -> None:
    set_index(model_copy, content)
    with pytest.raises(ModelError, match=r"model_index\.json: is damaged"):
        find_model(str(model_copy))


def test_every_missing_component_is_named(model_copy: Path) -> None:
    shutil.rmtree(model_copy / "vae")
    shutil.rmtree(model_copy / "tokenizer")
    with pytest.raises(ModelError, match="lacks tokenizer, vae; a complete folder"):
        find_model(str(model_copy))


def test_missing_configuration_is_refused_by_its_name(model_copy: Path) -> None:
    (model_copy / "unet" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"unet/config\.json: is missing"):
        find_model(str(model_copy))


@pytest.mark.parametrize("component", ["unet", "text_encoder", "vae"])
def test_component_without_weights_is_refused(model_copy: Path, component: str) -> None:
    for file in (model_copy / component).glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ModelError, match=rf"{component} has no weights; allowed: a \.safetensors file"):
        find_model(str(model_copy))


@pytest.mark.parametrize("component", ["unet", "text_encoder", "vae"])
def test_pickled_weights_are_refused_unless_asked_for(
    model_copy: Path, pickle_weights: Callable[[Path], None], component: str
) -> None:
    pickle_weights(model_copy / component)
    with pytest.raises(ModelError, match=rf"{component} has only pickled weights, .* set model\.allow_pickle=true"):
        find_model(str(model_copy))
    assert find_model(str(model_copy), allow_pickle=True).allow_pickle


def test_number_of_parameters_is_read_from_the_headers(tiny_model: Path) -> None:
    model = find_model(str(tiny_model))
    built = {"unet": tiny_unet(), "text_encoder": tiny_text_encoder(), "vae": tiny_autoencoder()}
    for component, module in built.items():
        assert model.num_parameters(component) == sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_damaged_weights_are_refused_by_their_name(model_copy: Path, kept: int) -> None:
    file = model_copy / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(
        ModelError, match=r"unet/diffusion_pytorch_model\.safetensors: is truncated .* download the model again"
    ):
        find_model(str(model_copy))
    with pytest.raises(
        ModelError, match=r"unet/diffusion_pytorch_model\.safetensors: is truncated .* download the model"
    ):
        find_model(str(model_copy), weights=False).num_parameters("unet")


def test_content_key_follows_the_bytes_of_its_components(model_copy: Path) -> None:
    before = find_model(str(model_copy))
    keys = {component: before.content_key(component) for component in COMPONENTS}
    assert len(set(keys.values())) == len(COMPONENTS)
    file = model_copy / "vae" / "config.json"
    file.write_text(file.read_text() + "\n")
    after = find_model(str(model_copy))
    assert [component for component in COMPONENTS if after.content_key(component) != keys[component]] == ["vae"]
    assert replace(after, variant="fp16").content_key("unet") != keys["unet"]


def test_hub_id_without_network_is_refused_in_one_line(hub_cache: Path) -> None:
    with pytest.raises(ModelError) as refused:
        find_model("nobody/nothing")
    assert "cannot be downloaded from the hub" in str(refused.value)
    assert "or name a local folder" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("base", ["a/b..c", "a--b/c--", "модель/пёс", "-a/b"])
def test_what_cannot_be_a_hub_id_is_refused(hub_cache: Path, base: str) -> None:
    with pytest.raises(ModelError, match="cannot be downloaded from the hub"):
        find_model(base)


@pytest.mark.parametrize("revision", [None, "main", "v1"])
def test_hub_id_is_served_from_the_cache(hub_cache: Path, tiny_model: Path, revision: str | None) -> None:
    commit = "0123456789012345678901234567890123456789"
    repository = hub_cache / "models--owner--tiny"
    shutil.copytree(tiny_model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / (revision or "main")).write_text(commit)
    model = find_model("owner/tiny", revision=revision)
    assert model.path == repository / "snapshots" / commit
    assert model.name == "owner/tiny"
    with pytest.raises(ModelError, match="cannot be downloaded from the hub"):
        find_model("owner/tiny", revision="v2")
