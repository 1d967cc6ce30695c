"""Encoders from local folders in the layout of the hub, against transformers itself; what is refused."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer, ViTModel

from lowmem_db import environment
from lowmem_db.errors import ConfigError, DependencyError, ModelError
from lowmem_db.evaluation import encoders
from lowmem_db.evaluation.encoders import BATCH_SIZE, Encoder, find_encoders, load_encoder
from lowmem_db.evaluation.preprocessing import read_preprocessing
from tests.evaluation.conftest import CPU, random_picture


def load(request: str) -> Encoder:
    return load_encoder(find_encoders([request])[0], CPU)


def pictures(count: int) -> list[Image.Image]:
    return [random_picture(seed) for seed in range(count)]


def pixels(folder: Path, images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([read_preprocessing(folder)(image) for image in images])


def test_dino_is_the_class_token(dino_folder: Path) -> None:
    found = load(f"dino={dino_folder}").embed_images(pictures(3))
    network = ViTModel.from_pretrained(dino_folder, add_pooling_layer=False).eval()
    expected = network(pixels(dino_folder, pictures(3))).last_hidden_state[:, 0]
    torch.testing.assert_close(found, expected.detach())


def test_clip_embeds_pictures_and_texts_in_one_space(clip_folder: Path) -> None:
    texts = ["a dog", "a very long text that no model of sixteen tokens can read to its end"]
    encoder = load(f"clip={clip_folder}")
    network = CLIPModel.from_pretrained(clip_folder).eval()
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(
        texts, padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    output = network(**tokens, pixel_values=pixels(clip_folder, pictures(2)))
    normalise = torch.nn.functional.normalize
    torch.testing.assert_close(normalise(encoder.embed_images(pictures(2))), output.image_embeds.detach())
    torch.testing.assert_close(normalise(encoder.embed_texts(texts)), output.text_embeds.detach())


@pytest.mark.parametrize("name", ["en0", "identity", "dino", "clip"])
def test_a_batch_gives_what_each_picture_gives(name: str, dino_folder: Path, clip_folder: Path) -> None:
    folder = {"en0": "", "identity": "", "dino": f"={dino_folder}", "clip": f"={clip_folder}"}[name]
    encoder = load(name + folder)
    together = encoder.embed_images(pictures(BATCH_SIZE + 2))
    assert len(together) == BATCH_SIZE + 2
    for index in (0, BATCH_SIZE, BATCH_SIZE + 1):
        torch.testing.assert_close(
            together[index], encoder.embed_images([random_picture(index)])[0], atol=1e-4, rtol=1e-4
        )


def test_what_cannot_be_had_is_not_offered(dino_folder: Path) -> None:
    with pytest.raises(NotImplementedError):
        load(f"dino={dino_folder}").embed_texts(["a dog"])


def test_pickled_weights_are_read(dino_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(dino_folder, tmp_path / "dino")
    network = ViTModel.from_pretrained(dino_folder, add_pooling_layer=False)
    (tmp_path / "dino" / "model.safetensors").unlink()
    torch.save(network.state_dict(), tmp_path / "dino" / "pytorch_model.bin")
    found = load(f"dino={tmp_path / 'dino'}").embed_images(pictures(1))
    torch.testing.assert_close(found, load(f"dino={dino_folder}").embed_images(pictures(1)))


def test_only_the_papers_architecture_is_the_papers(dino_folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    assert not any(files.is_papers for files in find_encoders([f"dino={dino_folder}", f"clip={clip_folder}", "en0"]))
    changed = shutil.copytree(dino_folder, tmp_path / "dino")
    fields = json.loads((changed / "config.json").read_text())
    fields |= {"hidden_size": 384, "num_hidden_layers": 12, "patch_size": 16}
    (changed / "config.json").write_text(json.dumps(fields))
    assert find_encoders([f"dino={changed}"])[0].is_papers


@pytest.mark.parametrize(
    ("requests", "part"),
    [
        (["foo"], "'foo' is unknown; allowed: en0, identity, captions, dino, clip, lpips"),
        (["en0", "en0"], "en0 is given 2 times"),
        (["paper", "clip"], "clip is given 2 times"),
    ],
)
def test_unknown_and_repeated_encoders_are_refused(requests: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        find_encoders(requests)


def test_folders_that_are_no_encoders_are_refused(dino_folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not have a config\.json and weights"):
        find_encoders([f"dino={tmp_path}"])
    with pytest.raises(ModelError, match="has the type 'vit'; allowed for clip: 'clip'"):
        find_encoders([f"clip={dino_folder}"])
    with pytest.raises(ModelError, match="is not a file; allowed: en0, or the weights file"):
        find_encoders([f"en0={tmp_path}"])
    with pytest.raises(ModelError, match="has 0 weights files; allowed: one"):
        find_encoders([f"lpips={tmp_path}"])
    with pytest.raises(ModelError, match=r"lpips needs its weights: .*torch\.save\(lpips\.LPIPS"):
        find_encoders(["lpips"])


def test_damaged_weights_are_named(dino_folder: Path, lpips_file: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(dino_folder, tmp_path / "dino")
    (damaged / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ModelError, match="dino cannot be loaded"):
        load(f"dino={damaged}")
    (tmp_path / "lpips.pth").write_bytes(lpips_file.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"lpips\.pth cannot be loaded"):
        load(f"lpips={tmp_path / 'lpips.pth'}")


def test_network_that_is_not_there_is_answered_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"'facebook/dino-vits16' is not a folder and .* use --encoder en0"):
        find_encoders(["dino"])


def test_missing_package_is_answered_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(environment.importlib, "import_module", missing)
    with pytest.raises(DependencyError, match=r'pip install "lowmem-db\[evaluation\]"'):
        find_encoders(["en0"])


def test_hub_is_asked_for_safetensors_first(monkeypatch: pytest.MonkeyPatch, dino_folder: Path, tmp_path: Path) -> None:
    asked = []

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        folder = tmp_path / "hub"
        if len(asked) == 1:
            shutil.copytree(dino_folder, folder)
            (folder / "model.safetensors").unlink()
        else:
            (folder / "pytorch_model.bin").touch()
        return str(folder)

    monkeypatch.setattr(encoders, "snapshot_download", download)
    assert find_encoders(["dino"])[0].path == tmp_path / "hub"
    assert "*.safetensors" in asked[0]
    assert asked[1] == ["pytorch_model.bin"]
