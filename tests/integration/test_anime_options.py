"""Mirrored photos, repeats, tags, clip skip, long prompts, another autoencoder: trained, resumed and drawn alike."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from lowmem_db.cli.train import train
from lowmem_db.config.loading import load_config
from lowmem_db.engine.source import find_source
from lowmem_db.errors import ConfigError, DataError, ModelError, StorageError
from lowmem_db.models.families.original_layout import SD1
from lowmem_db.models.finding import find_model, model_of
from lowmem_db.models.text_encoders import embed_prompts, load_text_encoders
from lowmem_db.planning.plan import plan
from lowmem_db.planning.target import find_target
from lowmem_db.preparation import encode
from lowmem_db.preparation.prepare import check_photos, check_prompts, prepare
from lowmem_db.storage.run_folder import RunFolder
from tests.tiny_models import NUM_TOKENS, RESOLUTION

CPU = torch.device("cpu")


def batches_of(fields: dict[str, object], **changed: object) -> Any:
    config = load_config(None, list((fields | changed).items()))
    return prepare(config, model_of(config), CPU, check_photos(config))


@pytest.fixture
def fields(tiny_fields: dict[str, object]) -> dict[str, object]:
    return tiny_fields | {"prior.enabled": False, "training.max_train_steps": 2}


# Photos.


def test_mirrored_crops_follow_the_others_and_are_drawn_half_of_the_time(fields: dict[str, object]) -> None:
    plain = batches_of(fields)
    both = batches_of(fields, **{"data.random_flip": True})
    for image, mirrored in zip(plain.instance_images, both.instance_images, strict=True):
        count = len(image.mean)
        assert (len(mirrored.mean), mirrored.num_crops) == (2 * count, count)
        assert torch.equal(mirrored.mean[:count], image.mean)
        assert not torch.equal(mirrored.mean[count:], image.mean)
    chosen = [both._crop(both.instance_images[0], step, 0) for step in range(200)]
    num_crops = both.instance_images[0].num_crops
    assert 70 < sum(crop >= num_crops for crop in chosen) < 130
    assert [crop % num_crops for crop in chosen] == [
        plain._crop(plain.instance_images[0], step, 0) for step in range(200)
    ]


def test_mirrored_pixels_are_encoded_once_and_tell_sdxl_where_they_are_from(
    fields: dict[str, object], tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"data.random_flip": True, "model.base": str(tiny_sdxl), "data.crop": "random", "data.num_crops": 2}
    first = batches_of(fields, **asked)
    wide = first.instance_images[1]
    resized_width = round(wide.record.width * RESOLUTION / wide.record.height)
    left = [int(row[3]) for row in wide.picture["time_ids"]]
    for plain, mirrored in zip(left[:2], left[2:], strict=True):
        assert abs(plain + mirrored + RESOLUTION - resized_width) <= 1
    monkeypatch.setattr(encode, "load_pixels", lambda *_, **__: pytest.fail("encoded again"))
    again = batches_of(fields, **asked)
    assert torch.equal(first.instance_images[0].mean, again.instance_images[0].mean)


def test_repeated_photos_are_seen_more_often(fields: dict[str, object]) -> None:
    batches = batches_of(fields, **{"data.repeats": {"photo0*": 4, "*.png": 1}})
    seen = [batches.batches_at(step)[0].sources[0] for step in range(12)]
    assert {name: seen.count(name) for name in seen} == {"photo0.png": 8, "photo1.png": 2, "photo2.png": 2}
    with pytest.raises(DataError, match=r"data\.repeats: 'face\*' matches no photo; allowed: .*photo0\.png"):
        batches_of(fields, **{"data.repeats": {"face*": 2}})


def test_tags_of_photos_vary_and_those_of_class_images_do_not(tiny_fields: dict[str, object]) -> None:
    asked = {"subject.instance_prompt": "zx, a, b, c", "subject.class_prompt": "d, e, f", "prior.num_class_images": 2}
    batches = batches_of(tiny_fields, **asked, **{"data.shuffle_tags": True, "data.keep_tags": 1})
    known = set(batches.prompts.tokens)
    images = [batches.instance_images[0], batches.class_images[0]]
    drawn = [[batches._prompt(image, step, sample) for sample, image in enumerate(images)] for step in range(40)]
    of_photos, of_class = ({prompts[place] for prompts in drawn} for place in (0, 1))
    assert len(of_photos) > 3
    assert {prompt.split(", ")[0] for prompt in of_photos} == {"zx"}
    assert of_photos <= known
    assert of_class == {"d, e, f"}


def test_embeddings_of_many_variants_stay_on_the_disk(
    fields: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(encode, "_EMBEDS_IN_MEMORY", 2)
    batches = batches_of(fields, **{"subject.instance_prompt": "zx, a, b, c", "data.shuffle_tags": True})
    for step in range(12):
        batches.batches_at(step)
    assert batches.prompts.embeds is not None
    assert batches.prompts.embeds._read.cache_info().currsize == 2  # type: ignore[attr-defined]
    shutil.rmtree(tmp_path / "cache" / "prompts")
    with pytest.raises(StorageError, match="has been deleted or damaged since the run started"):
        [batches.batches_at(step) for step in range(12)]


# How prompts are read.


def embeds(base: Path, prompts: list[str], **options: Any) -> dict[str, torch.Tensor]:
    model = find_model(str(base), **options)
    table = embed_prompts(model, load_text_encoders(model), prompts)
    return dict(table.conditioning(prompts).embeds)


def test_clip_skip_is_counted_as_in_other_programs(tiny_model: Path, tiny_sdxl: Path) -> None:
    """AUTOMATIC1111, kohya's scripts and ComfyUI read the second layer from the end, and then the final norm."""
    model = find_model(str(tiny_model))
    text_encoder = model.load("text_encoder")
    inner = getattr(text_encoder, "text_model", text_encoder)
    states = text_encoder(model.family.tokenize(model, ["a dog"])["input_ids"], output_hidden_states=True).hidden_states
    torch.testing.assert_close(embeds(tiny_model, ["a dog"], clip_skip=2)["embeds"], inner.final_layer_norm(states[-2]))
    assert torch.equal(embeds(tiny_model, ["a dog"], clip_skip=1)["embeds"], embeds(tiny_model, ["a dog"])["embeds"])
    xl = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, local_files_only=True)
    usual = xl.encode_prompt("a dog", device=CPU, do_classifier_free_guidance=False)[0]
    torch.testing.assert_close(embeds(tiny_sdxl, ["a dog"], clip_skip=2)["embeds"], usual)
    assert not torch.equal(embeds(tiny_sdxl, ["a dog"], clip_skip=1)["embeds"], usual)
    with pytest.raises(ConfigError, match=r"model\.clip_skip: 3, but text_encoder of .* has layers 1 to 2"):
        find_model(str(tiny_model), clip_skip=3)


@pytest.mark.parametrize("is_xl", [False, True])
def test_long_prompts_are_read_in_chunks(is_xl: bool, tiny_model: Path, tiny_sdxl: Path) -> None:
    base = tiny_sdxl if is_xl else tiny_model
    body = NUM_TOKENS - 2
    head, tail = "a" * body, "bcd"
    long = embeds(base, [head + tail, tail], prompt_chunks=2)
    alone = embeds(base, [head, tail, ""])
    assert long["embeds"].shape[1] == 2 * NUM_TOKENS
    # every letter is a token, but the last of a word is another one: compare what does not hold one
    torch.testing.assert_close(long["embeds"][0, NUM_TOKENS:], alone["embeds"][1])
    torch.testing.assert_close(long["embeds"][1, :NUM_TOKENS], alone["embeds"][1])
    torch.testing.assert_close(long["embeds"][1, NUM_TOKENS:], alone["embeds"][2])
    if is_xl:
        torch.testing.assert_close(long["pooled"][1], alone["pooled"][1])


def test_prompts_that_are_too_long_say_how_many_chunks_they_need(
    fields: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(None, list((fields | {"subject.instance_prompt": "zx " + "a" * 3 * NUM_TOKENS}).items()))
    model = model_of(config)
    check_prompts(config, model, check_photos(config))
    assert "to read all of it, set model.prompt_chunks=4" in capsys.readouterr().err
    longer = find_model(str(model.path), prompt_chunks=4)
    check_prompts(config, longer, check_photos(config))
    assert "ignores the last" not in capsys.readouterr().err


def test_chunks_are_planned(fields: dict[str, object]) -> None:
    asked = fields | {"training.train_batch_size": 8}
    phases = []
    for chunks in (1, 6):
        config = load_config(None, list((asked | {"model.prompt_chunks": chunks}).items()))
        phases.append({phase.name: phase.parts.activations for phase in plan(config, find_target(config)).phases})
    assert phases[1]["train"] > phases[0]["train"]
    assert phases[1]["encode_text"] > phases[0]["encode_text"]


# Another autoencoder.


def other_autoencoder(model: Path, folder: Path) -> Path:
    shutil.copytree(model / "vae", folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(file).items()}, file)
    return folder


@pytest.mark.parametrize("form", ["folder", "model", "file", "original"])
def test_another_autoencoder_replaces_the_model_s_own(form: str, tiny_model: Path, tmp_path: Path) -> None:
    inner = tmp_path / "other" / "vae"
    folder = other_autoencoder(tiny_model, inner)
    file = folder / "diffusion_pytorch_model.safetensors"
    given = {"folder": folder, "model": folder.parent, "file": file, "original": tmp_path / "one.safetensors"}[form]
    if form == "original":
        model = find_model(str(tiny_model))
        layout_entries = SD1.entries("vae", model.config_of("vae"), load_file(file))
        tensors = load_file(file)
        published = {
            entry.name.removeprefix("first_stage_model."): entry.pack([tensors[name] for name in entry.sources])
            for entry in layout_entries
        }
        save_file({name: tensor.contiguous() for name, tensor in published.items()}, given)
    found = find_model(str(tiny_model), vae=str(given), cache_dir=tmp_path / "cache")
    expected = load_file(file)
    state = found.load("vae").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert found.space.content_key() != find_model(str(tiny_model)).space.content_key()
    assert found.config_of("vae")["latent_channels"] == 4


def test_final_model_holds_the_autoencoder_that_it_was_trained_with(
    fields: dict[str, object], tiny_model: Path, tmp_path: Path
) -> None:
    folder = other_autoencoder(tiny_model, tmp_path / "other")
    asked = fields | {"model.vae": str(folder), "model.clip_skip": 2, "model.prompt_chunks": 2}
    train([f"{field}={json.dumps(value)}" for field, value in asked.items()])
    source = find_source(str(tmp_path / "run"))
    assert (source.model.family.reading.clip_skip, source.model.family.reading.num_chunks) == (2, 2)
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "run" / "final" / "vae" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_channels": 16}, "has latent_channels 16 instead of 4: it is for other models"),
        ({"scaling_factor": 0.5}, "has scaling_factor 0.5 instead of 0.18215"),
        ({"block_out_channels": [8, 8, 8]}, "has pixels per latent pixel 4 instead of 2"),
    ],
)
def test_autoencoders_of_other_models_are_refused(
    change: dict[str, object], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = other_autoencoder(tiny_model, tmp_path / "other")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelError, match=message):
        find_model(str(tiny_model), vae=str(folder))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", r"model\.vae: .*nothing' is not a folder, a file or a hub id"),
        ("unet", r"model\.vae: .*config\.json is not of an autoencoder|has neither config\.json"),
        ("x.safetensors", r"is not an autoencoder for Stable Diffusion"),
    ],
)
def test_what_is_no_autoencoder_is_refused(name: str, message: str, tiny_model: Path, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / "unet").mkdir()
    with pytest.raises(ModelError, match=message):
        find_model(str(tiny_model), vae=str(tmp_path / name))


# Samples, and all of it together.


def test_samples_before_the_first_step_and_negative_prompts(fields: dict[str, object], tmp_path: Path) -> None:
    asked = fields | {
        "sampling.prompts": ["a zx dog"],
        "sampling.num_images": 1,
        "sampling.num_inference_steps": 2,
        "sampling.at_start": True,
    }
    pictures = []
    for negative in ("", "blurry"):
        output = tmp_path / f"run{negative}"
        changed = asked | {"sampling.negative_prompt": negative, "output_dir": str(output)}
        train([f"{field}={json.dumps(value)}" for field, value in changed.items()])
        run = RunFolder(output)
        assert run.samples_dir(2).is_dir()
        pictures.append((run.samples_dir(0) / "00-00.png").read_bytes())
    assert pictures[0] != pictures[1]


@pytest.mark.long
def test_a_resumed_run_with_everything_ends_bit_for_bit_as_one_that_was_not_stopped(
    tiny_fields: dict[str, object], photos_dir: Path, tmp_path: Path
) -> None:
    everything = tiny_fields | {
        "prior.num_class_images": 2,
        "subject.instance_prompt": "zx dog, a, b, c",
        "data.random_flip": True,
        "data.repeats": {"photo1*": 2},
        "data.shuffle_tags": True,
        "data.keep_tags": 1,
        "data.tag_dropout": 0.2,
        "model.clip_skip": 2,
        "model.prompt_chunks": 2,
        "training.train_text_encoder": True,
        "checkpointing.every": 2,
    }
    whole, parts = (everything | {"output_dir": str(tmp_path / name)} for name in ("whole", "parts"))
    train([f"{field}={json.dumps(value)}" for field, value in whole.items()])
    short = parts | {"training.max_train_steps": 2}
    train([f"{field}={json.dumps(value)}" for field, value in short.items()])
    shutil.rmtree(tmp_path / "parts" / "final")
    train([f"{field}={json.dumps(value)}" for field, value in parts.items()], resume=True)
    files = [
        {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.safetensors")}
        for folder in (tmp_path / "whole" / "final", tmp_path / "parts" / "final")
    ]
    assert files[0] == files[1]
