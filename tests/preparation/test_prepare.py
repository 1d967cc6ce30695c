"""Class images and caches: what is there is used again, what changed is made anew, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config
from lowmem_db.data.batches import BatchSource
from lowmem_db.engine import draw
from lowmem_db.errors import ConfigError, DataError
from lowmem_db.models.finding import find_model, model_of
from lowmem_db.preparation import encode
from lowmem_db.preparation.prepare import check_photos, check_prompts, prepare
from lowmem_db.run.inputs import check_inputs

CPU = torch.device("cpu")


def run(config: Config) -> BatchSource:
    model = model_of(config)
    return prepare(config, model, CPU, check_photos(config))


def with_fields(fields: dict[str, object], **changes: object) -> Config:
    return load_config(
        None, list((fields | {name.replace("__", "."): value for name, value in changes.items()}).items())
    )


@pytest.fixture
def own_photos(tiny_fields: dict[str, object], photos_dir: Path, tmp_path: Path) -> dict[str, object]:
    """Fields with a copy of the photos that a test may change."""
    copy = tmp_path / "own_photos"
    shutil.copytree(photos_dir, copy)
    return tiny_fields | {"subject.instance_dir": str(copy)}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the pictures that were encoded and not taken from the cache, one for each crop."""
    names: list[str] = []
    original = encode.load_pixels

    def recording(record, **arguments):
        names.append(record.path.name)
        return original(record, **arguments)

    monkeypatch.setattr(encode, "load_pixels", recording)
    return names


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches of class images that were drawn."""
    sizes: list[int] = []
    original = draw.sample_latents

    def recording(*arguments, **options):
        sizes.append(len(options["generators"]))
        return original(*arguments, **options)

    monkeypatch.setattr(draw, "sample_latents", recording)
    return sizes


def class_dir(config: Config) -> Path:
    (folder,) = (config.cache_dir / "class_images").iterdir()
    return folder


def pictures(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.png"))}


def test_second_run_makes_nothing(tiny_config: Config, encoded: list[str], drawn: list[int]) -> None:
    first = run(tiny_config)
    assert len(first.instance_images) == 3
    assert len(first.class_images) == 5
    assert drawn == [4, 4]
    encoded.clear()
    drawn.clear()
    second = run(tiny_config)
    assert encoded == []
    assert drawn == []
    for one, other in zip(first.instance_images, second.instance_images, strict=True):
        assert torch.equal(one.mean, other.mean)
        assert torch.equal(one.std, other.std)


def test_changed_photo_is_encoded_anew_and_no_other(
    own_photos: dict[str, object], encoded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_fields(own_photos)
    run(config)
    encoded.clear()
    photo = config.subject.instance_dir / "photo1.png"
    Image.open(photo).rotate(180).save(photo)
    capsys.readouterr()
    run(config)
    assert set(encoded) == {"photo1.png"}
    assert "encoding photo1.png again: the file has changed" in capsys.readouterr().err


def test_truncated_cache_file_is_made_anew(
    own_photos: dict[str, object], encoded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_fields(own_photos)
    before = run(config)
    index = next(
        content
        for file in (config.cache_dir / "latents").glob("index-*.json")
        if "photo2.png" in (content := json.loads(file.read_text()))
    )
    key = index["photo2.png"]["moments_key"]
    file = config.cache_dir / "latents" / key[:2] / f"{key}.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    encoded.clear()
    capsys.readouterr()
    after = run(config)
    assert set(encoded) == {"photo2.png"}
    assert "its cache file is missing or damaged" in capsys.readouterr().err
    assert all(torch.equal(a.mean, b.mean) for a, b in zip(before.instance_images, after.instance_images, strict=True))


def test_other_resolution_or_autoencoder_encodes_all_photos(
    own_photos: dict[str, object], encoded: list[str], tmp_path: Path, tiny_model: Path
) -> None:
    config = with_fields(own_photos, prior__enabled=False)
    run(config)
    encoded.clear()
    run(with_fields(own_photos, prior__enabled=False, data__resolution=24))
    assert set(encoded) == {"photo0.png", "photo1.png", "photo2.png"}
    encoded.clear()
    other_model = tmp_path / "other"
    shutil.copytree(tiny_model, other_model)
    (other_model / "vae" / "extra.json").write_text("{}")
    run(with_fields(own_photos, prior__enabled=False, model__base=str(other_model)))
    assert set(encoded) == {"photo0.png", "photo1.png", "photo2.png"}


def test_class_images_are_topped_up_to_the_same_images(
    tiny_fields: dict[str, object], drawn: list[int], tmp_path: Path
) -> None:
    few, many = with_fields(tiny_fields, prior__num_class_images=2), with_fields(tiny_fields, prior__num_class_images=7)
    run(few)
    first_two = pictures(class_dir(few))
    assert list(first_two) == ["00000.png", "00001.png"]
    run(many)
    assert drawn == [4, 4, 4]
    topped_up = pictures(class_dir(many))
    assert len(topped_up) == 7
    assert {name: topped_up[name] for name in first_two} == first_two
    at_once = with_fields(tiny_fields, prior__num_class_images=7, cache_dir=str(tmp_path / "other_cache"))
    run(at_once)
    assert pictures(class_dir(at_once)) == topped_up


def test_killed_drawing_goes_on_with_the_missing_images(tiny_config: Config, drawn: list[int]) -> None:
    run(tiny_config)
    folder = class_dir(tiny_config)
    before = pictures(folder)
    (folder / "00004.png").unlink()
    drawn.clear()
    run(tiny_config)
    assert drawn == [4]
    assert pictures(folder) == before


def test_fewer_class_images_use_the_first_ones(tiny_fields: dict[str, object]) -> None:
    run(with_fields(tiny_fields))
    batches = run(with_fields(tiny_fields, prior__num_class_images=3))
    assert [image.record.path.name for image in batches.class_images] == ["00000.png", "00001.png", "00002.png"]


def test_class_images_of_several_prompts_train_with_their_own(tiny_fields: dict[str, object], tmp_path: Path) -> None:
    plain = run(with_fields(tiny_fields))
    several = with_fields(
        tiny_fields, prior__class_prompts=["a cat", "a dog on the beach"], cache_dir=str(tmp_path / "other")
    )
    batches = run(several)
    prompts = [image.record.prompt for image in batches.class_images]
    assert prompts == ["a dog", "a cat", "a dog on the beach", "a dog", "a cat"]
    assert [
        one.record.content_key == other.record.content_key
        for one, other in zip(batches.class_images, plain.class_images, strict=True)
    ] == [True, False, False, True, False]
    (class_dir(several) / "00001.png").unlink()
    again = run(several)
    assert [image.record for image in again.class_images] == [image.record for image in batches.class_images]
    other = with_fields(tiny_fields, prior__class_dir=str(class_dir(several)))
    with pytest.raises(DataError, match=r"prior\.class_dir: .*prompt is \['a dog', 'a cat', 'a dog on the beach'\]"):
        run(other)


def test_prompts_for_ones_own_pictures_are_refused(tiny_fields: dict[str, object], tmp_path: Path) -> None:
    Image.new("RGB", (96, 96)).save(tmp_path / "own.png")
    config = with_fields(tiny_fields, prior__class_dir=str(tmp_path), prior__class_prompts=["a cat"])
    with pytest.raises(ConfigError, match=r"prior\.class_prompts: .* own pictures.* text file"):
        check_inputs(config)


def test_folder_of_ones_own_pictures_is_used_as_it_is(
    tiny_fields: dict[str, object], tmp_path: Path, drawn: list[int]
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (96, 96), (number * 40, 90, 0)).save(folder / f"photo{number}.png")
    before = sorted(folder.iterdir())
    batches = run(with_fields(tiny_fields, prior__class_dir=str(folder)))
    assert drawn == []
    assert [image.record.path.name for image in batches.class_images] == ["photo0.png", "photo1.png", "photo2.png"]
    assert all(image.record.prompt == "a dog" for image in batches.class_images)
    assert sorted(folder.iterdir()) == before


def test_class_images_drawn_otherwise_are_refused(tiny_fields: dict[str, object], tmp_path: Path) -> None:
    folder = str(tmp_path / "class")
    run(with_fields(tiny_fields, prior__class_dir=folder))
    with pytest.raises(DataError, match=r"prompt is 'a dog' instead of 'a cat'.*delete this one"):
        run(with_fields(tiny_fields, prior__class_dir=folder, subject__class_prompt="a cat"))
    with pytest.raises(DataError, match="num_inference_steps is 2 instead of 3"):
        run(with_fields(tiny_fields, prior__class_dir=folder, prior__num_inference_steps=3))


def test_class_images_of_a_run_serve_the_next_seed(
    tiny_fields: dict[str, object], tmp_path: Path, drawn: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "class"
    first = with_fields(tiny_fields, prior__class_dir=str(folder))
    run(first)
    before, manifest = pictures(folder), (folder / "manifest.json").read_text()
    drawn.clear()
    next_run = {"prior__class_dir": str(folder), "seed": 7, "prior__sample_batch_size": 1, "prior__precision": "bf16"}
    batches = run(with_fields(tiny_fields, **next_run))
    assert (drawn, pictures(folder)) == ([], before)
    assert len(batches.class_images) == 5
    said = " ".join(capsys.readouterr().err.split())
    assert "those of an earlier run serve this one too (precision is 'fp32' instead of 'bf16'; " in said
    assert "sample_batch_size is 4 instead of 1; seed is 0 instead of 7)" in said
    run(with_fields(tiny_fields, **next_run, prior__num_class_images=6))
    assert drawn == [1]
    assert (folder / "manifest.json").read_text() == manifest
    more = pictures(folder)
    run(with_fields(tiny_fields, prior__class_dir=str(tmp_path / "all"), prior__num_class_images=6,
                    prior__sample_batch_size=1, prior__precision="bf16"))  # fmt: skip
    assert more["00005.png"] == pictures(tmp_path / "all")["00005.png"], "the noise is that of the first run"


@pytest.mark.parametrize("before", ["nf4", None])
def test_quantized_class_images_are_of_another_kind(
    tiny_fields: dict[str, object], tmp_path: Path, before: str | None
) -> None:
    folder = tmp_path / "class"
    config = with_fields(tiny_fields, prior__class_dir=str(folder))
    run(config)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"precision": before}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=f"precision is {before!r} instead of 'fp32'"):
        run(config)


def test_manifest_tells_what_the_images_were_drawn_with(tiny_config: Config) -> None:
    run(tiny_config)
    manifest = json.loads((class_dir(tiny_config) / "manifest.json").read_text())
    assert manifest["prompt"] == "a dog"
    assert manifest["sampler"] == "ddpm"
    assert {"model", "num_inference_steps", "guidance_scale", "resolution", "seed"} <= manifest.keys()


def test_embeddings_are_cached_while_the_text_encoder_is_frozen(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tiny_config).prompts.embeds
    monkeypatch.setattr(encode, "load_encoders_of_text", lambda *_: pytest.fail("the text encoder was loaded again"))
    second = run(tiny_config).prompts.embeds
    assert first is not None
    assert second is not None
    assert first.keys() == second.keys() == {"", "a zx dog", "a dog"}
    assert all(torch.equal(first[prompt]["embeds"], second[prompt]["embeds"]) for prompt in first)


def test_training_text_encoder_gets_token_ids_alone(tiny_fields: dict[str, object]) -> None:
    batches = run(with_fields(tiny_fields, training__train_text_encoder=True))
    assert batches.prompts.embeds is None
    assert not batches.batches_at(0)[0].conditioning.embeds


def test_long_prompt_is_warned_of(tiny_fields: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    config = with_fields(tiny_fields, subject__instance_prompt="a zx dog that sits in the grass")
    check_prompts(config, find_model(config.model.base), check_photos(config))
    assert "the model reads 16 tokens" in " ".join(capsys.readouterr().err.split())
