"""Values that are infinite or NaN are refused where they arise, named, and not kept; old caches are healed of them."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config
from lowmem_db.errors import NonFiniteError
from lowmem_db.models.finding import model_of
from lowmem_db.preparation.prepare import check_photos, prepare
from lowmem_db.storage import tensors
from lowmem_db.storage.tensors import TensorStore

CPU = torch.device("cpu")


def run(config: Config) -> None:
    prepare(config, model_of(config), CPU, check_photos(config))


@pytest.fixture
def fields(tiny_fields: dict[str, object], tiny_model: Path, tmp_path: Path) -> dict[str, object]:
    """Fields of a run on a copy of the tiny model, with one class image."""
    copy = shutil.copytree(tiny_model, tmp_path / "model")
    return tiny_fields | {"model.base": str(copy), "prior.num_class_images": 1}


def enlarge(fields: dict[str, object], component: str, name: str, factor: float) -> None:
    """Multiply a weight, so that finite weights give infinite values."""
    (file,) = Path(str(fields["model.base"]), component).glob("*.safetensors")
    state = load_file(file)
    state[name] = torch.full_like(state[name], factor)
    save_file(state, file, {"format": "pt"})


def of(fields: dict[str, object], **changes: object) -> Config:
    return load_config(
        None, list((fields | {name.replace("__", "."): value for name, value in changes.items()}).items())
    )


def kept(config: Config, kind: str, pattern: str) -> list[Path]:
    return list((config.cache_dir / kind).rglob(pattern))


def test_class_images_that_fp16_cannot_hold_are_refused_and_fp32_draws_them(fields: dict[str, object]) -> None:
    enlarge(fields, "vae", "decoder.conv_out.bias", 6e4)
    enlarge(fields, "vae", "decoder.conv_out.weight", 6e4)
    config = of(fields, prior__precision="fp16")
    with pytest.raises(NonFiniteError, match=r"vae: the autoencoder gives pictures .* float16\); set prior.precision="):
        run(config)
    assert kept(config, "class_images", "*.png") == []
    config = of(fields, prior__precision="fp32")
    run(config)
    assert len(kept(config, "class_images", "*.png")) == 1


def test_latents_that_are_not_finite_name_the_prompt(fields: dict[str, object]) -> None:
    enlarge(fields, "unet", "conv_out.weight", 3e38)
    config = of(fields)
    with pytest.raises(NonFiniteError, match=r"class images: .*: the images of 'a dog' are infinite or NaN before"):
        run(config)
    assert kept(config, "class_images", "*.png") == []


def test_moments_that_are_not_finite_name_the_photo(fields: dict[str, object]) -> None:
    enlarge(fields, "vae", "encoder.conv_out.weight", 3e38)
    config = of(fields, prior__enabled=False)
    with pytest.raises(NonFiniteError, match=r"photo0\.png: .*vae: the autoencoder gives latents that are infinite"):
        run(config)
    assert kept(config, "latents", "*.safetensors") == []


def test_embedding_that_is_not_finite_names_the_prompt(fields: dict[str, object]) -> None:
    enlarge(fields, "text_encoder", "text_model.final_layer_norm.weight", 3e38)
    config = of(fields, prior__enabled=False)
    with pytest.raises(NonFiniteError, match=r"text_encoder: the text encoder's embedding of '' is infinite or NaN"):
        run(config)
    assert kept(config, "prompts", "*.safetensors") == []


def test_poisoned_entries_of_an_older_version_are_made_again(
    fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = of(fields)
    run(config)
    files = {file: file.read_bytes() for file in config.cache_dir.rglob("*.safetensors")}
    poisoned = [kept(config, kind, "*.safetensors")[0] for kind in ("latents", "prompts")]
    monkeypatch.setattr(tensors, "first_not_finite", lambda _: None)
    for file in poisoned:
        store = TensorStore(file.parents[1])
        found = store.read(file.stem)
        assert found is not None
        first = next(iter(found))
        found[first].view(-1)[0] = float("nan")
        store.write(file.stem, found)
    monkeypatch.undo()
    run(config)
    assert {file: file.read_bytes() for file in config.cache_dir.rglob("*.safetensors")} == files


def test_black_class_image_of_an_older_version_is_drawn_again(fields: dict[str, object]) -> None:
    config = of(fields)
    run(config)
    (file,) = kept(config, "class_images", "*.png")
    before = file.read_bytes()
    Image.new("RGB", (32, 32)).save(file)
    run(config)
    assert file.read_bytes() == before


@pytest.mark.parametrize("place", [20, 60, -20])
def test_class_image_with_a_flipped_bit_is_drawn_again(
    fields: dict[str, object], capsys: pytest.CaptureFixture[str], place: int
) -> None:
    config = of(fields)
    run(config)
    (file,) = kept(config, "class_images", "*.png")
    before = file.read_bytes()
    rotten = bytearray(before)
    rotten[place] ^= 1
    file.write_bytes(rotten)
    run(config)
    assert file.read_bytes() == before
    assert f"{file}: is damaged and will be drawn again" in capsys.readouterr().err


def test_black_picture_of_finite_values_is_told_and_drawn_once(
    fields: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    enlarge(fields, "vae", "decoder.conv_out.weight", 0.0)
    enlarge(fields, "vae", "decoder.conv_out.bias", -1.0)
    config = of(fields)
    run(config)
    assert "00000.png: is completely black, although all values are finite" in capsys.readouterr().err
    (file,) = kept(config, "class_images", "*.png")
    before = file.stat().st_mtime_ns
    run(config)
    assert file.stat().st_mtime_ns == before
