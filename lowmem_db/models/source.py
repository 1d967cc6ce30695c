"""Where a model's files are: the model in this package, a folder in diffusers' layout, a single file, or the hub.

Everything is checked before a weight is read: layout, family, and that the weights are safetensors.
"""

import difflib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

from lowmem_db import fingerprint
from lowmem_db.errors import ModelError

DEMO_DIR = Path(__file__).parent / "demo" / "base"
CONFIGS_DIR = Path(__file__).parent / "configs"
COMPONENTS = ("unet", "text_encoder", "tokenizer", "vae", "scheduler")
_SECOND = ("text_encoder_2", "tokenizer_2")
_TOKENIZERS = ("tokenizer", "tokenizer_2")
_WITHOUT_WEIGHTS = {*_TOKENIZERS, "scheduler"}
_WEIGHT_SUFFIXES = {".safetensors", ".bin"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILE = re.compile(r"([\w-][\w.-]*/[\w.-]+)/(.+\.safetensors)")
_NETWORK_ERRORS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError)


@dataclass(frozen=True)
class Family:
    """A kind of model that can be trained.

    Attributes:
        name: As it is shown.
        cross_attention_dim: Width of the text embeddings; None: any, the last rows of the table.
        has_text_encoder_2: Whether there is a second text encoder.
    """

    name: str
    cross_attention_dim: int | None
    has_text_encoder_2: bool = False

    @property
    def components(self) -> tuple[str, ...]:
        """Folders of a model in diffusers' layout."""
        return COMPONENTS + _SECOND * self.has_text_encoder_2

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Components that read prompts."""
        return ("text_encoder", "text_encoder_2") if self.has_text_encoder_2 else ("text_encoder",)

    @property
    def with_weights(self) -> tuple[str, ...]:
        """Components that have weights."""
        return tuple(component for component in self.components if component not in _WITHOUT_WEIGHTS)


FAMILIES = (
    Family("Stable Diffusion 1.x", 768),
    Family("Stable Diffusion 2.x", 1024),
    Family("Stable Diffusion XL", 2048, has_text_encoder_2=True),
    Family("Stable Diffusion architecture", None),
    Family("Stable Diffusion XL architecture", None, has_text_encoder_2=True),
)
_PIPELINE_CLASSES = {"StableDiffusionPipeline": COMPONENTS, "StableDiffusionXLPipeline": COMPONENTS + _SECOND}


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A local model in diffusers' layout whose files were checked.

    Attributes:
        name: What the user called it.
        path: The folder.
        family: Its row in the table of families.
        variant: Variant of the weight files.
        allow_pickle: Whether pickled weights may be read.
    """

    name: str
    path: Path
    family: Family
    variant: str | None = None
    allow_pickle: bool = False

    def config_of(self, component: str) -> dict[str, Any]:
        """Return the JSON configuration of a component."""
        names = {"scheduler": "scheduler_config.json", **dict.fromkeys(_TOKENIZERS, "tokenizer_config.json")}
        return _read_json(self.path / component / names.get(component, "config.json"))

    @property
    def zeroes_empty_prompt(self) -> bool:
        """Whether the embeddings of the empty prompt are zeros, as SDXL was trained."""
        if not self.family.has_text_encoder_2:
            return False
        return _read_json(self.path / "model_index.json").get("force_zeros_for_empty_prompt", True)

    def num_parameters(self, component: str) -> int:
        """Return the number of values in a component's weight files, read from their headers."""
        files = [file for file in (self.path / component).iterdir() if file.suffix in _WEIGHT_SUFFIXES]
        return max(_num_values(file) for file in files)

    def content_key(self, *components: str) -> str:
        """Return the key of the bytes of some components, configuration and weights together."""
        keys = []
        for component in components:
            files = [file for file in sorted((self.path / component).iterdir()) if file.is_file()]
            keys.append((component, fingerprint.of_files(files)))
        return fingerprint.of_values(keys, self.variant)


def find_model(
    base: str, *, revision: str | None = None, variant: str | None = None, allow_pickle: bool = False
) -> ModelFolder:
    """Find a model and check its layout; a hub id is downloaded first, a single file becomes a folder of the cache.

    Args:
        base: ``demo``, a folder in diffusers' layout, a single file in the original layout (``.safetensors``), a hub id
            such as ``owner/name``, or a single file on the hub such as ``owner/name/file.safetensors``.
        revision: Branch, tag or commit on the hub.
        variant: Variant of the weight files, for instance ``fp16``.
        allow_pickle: Accept ``.bin`` weights where there are no safetensors.

    Raises:
        ModelError: It is not there, is no Stable Diffusion model, or has pickled weights alone.
    """
    if base == "demo":
        path = DEMO_DIR
    elif Path(base).is_dir():
        path = Path(base)
    elif (file := find_file(base, revision)) is not None:
        from lowmem_db.models.single_file_folder import folder_of_file  # which imports this module

        if variant is not None:
            raise ModelError(f"model.variant: {variant}, but {base} is a single file, which has none; leave it out")
        path = folder_of_file(file)
    elif _HUB_ID.fullmatch(base) and not base.startswith(".") and not base.endswith(".safetensors"):
        path = _download(base, revision, variant, allow_pickle)
    else:
        raise ModelError(
            f"model.base: {base!r} is neither a folder, a file nor a hub id; allowed: demo, a folder, a .safetensors "
            f"file, owner/name{_near(base)}"
        )
    family = _check_layout(base, path)
    model = ModelFolder(name=base, path=path, family=family, variant=variant, allow_pickle=allow_pickle)
    _check_weights(model)
    return model


def find_file(base: str, revision: str | None = None) -> Path | None:
    """Return the single file that ``base`` names here or on the hub, or None where it names something else.

    Raises:
        ModelError: It cannot be had from the hub.
    """
    if Path(base).is_file():
        return Path(base)
    on_hub = _HUB_FILE.fullmatch(base)
    if on_hub is None or Path(base).parent.is_dir():
        return None
    try:
        return Path(hf_hub_download(on_hub[1], on_hub[2], revision=revision))
    except _NETWORK_ERRORS as error:
        raise _unreachable(base, error) from error


def _num_values(file: Path) -> int:
    if file.suffix != ".safetensors":
        return file.stat().st_size // 4
    try:
        with safe_open(file, framework="pt") as weights:
            return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: is damaged ({error}); get the model anew") from error


def _download(hub_id: str, revision: str | None, variant: str | None, allow_pickle: bool) -> Path:
    patterns = ["*.json", "*.txt", "*.model", "*/*.json", "*/*.txt", "*/*.safetensors"]
    patterns += ["*/*.bin"] if allow_pickle else []
    ignored = ["safety_checker/*", "vae_1_0/*", "*/flax*", "*/tf_*", "*/openvino*"]
    ignored += ["*.fp16.*", "*.bf16.*", "*.non_ema.*"] if variant is None else []
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))
    except _NETWORK_ERRORS as error:
        raise _unreachable(hub_id, error) from error


def _unreachable(base: str, error: Exception) -> ModelError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ModelError(
        f"model.base: {base!r} is not here and cannot be had from the hub ({reason}); check the name, the network and "
        "`hf auth login`, or give a local folder or file"
    )


def _check_layout(base: str, path: Path) -> Family:
    index = path / "model_index.json"
    if not index.is_file():
        raise ModelError(
            f"model.base: {base} holds no model_index.json; allowed: a folder in diffusers' layout "
            f"(model_index.json, {', '.join(COMPONENTS)})"
        )
    pipeline = _read_json(index).get("_class_name")
    if pipeline not in _PIPELINE_CLASSES:
        raise ModelError(f"model.base: {base} is a {pipeline}; allowed: {', '.join(sorted(_PIPELINE_CLASSES))}")
    missing = [component for component in _PIPELINE_CLASSES[pipeline] if not (path / component).is_dir()]
    if missing:
        raise ModelError(
            f"model.base: {base} lacks {', '.join(missing)}; a whole folder in diffusers' layout is needed"
        )
    return find_family(path)


def find_family(path: Path) -> Family:
    """Return the family of a folder in diffusers' layout: by its text encoders and the width of their embeddings."""
    unet = _read_json(path / "unet" / "config.json")
    return family_of(unet, has_text_encoder_2=(path / "text_encoder_2").is_dir())


def family_of(unet: Mapping[str, Any], *, has_text_encoder_2: bool) -> Family:
    """Return the family of a model, from the configuration of its UNet."""
    width = unet.get("cross_attention_dim")
    return next(
        family
        for family in FAMILIES
        if family.has_text_encoder_2 == has_text_encoder_2 and family.cross_attention_dim in {width, None}
    )


def _check_weights(model: ModelFolder) -> None:
    for component in model.family.with_weights:
        folder = model.path / component
        suffixes = {file.suffix for file in folder.iterdir()} & _WEIGHT_SUFFIXES
        if not suffixes:
            raise ModelError(f"model.base: {folder} holds no weights; allowed: a .safetensors file")
        if suffixes == {".bin"} and not model.allow_pickle:
            raise ModelError(
                f"model.base: {folder} holds pickled weights alone, which can run code when they are read; "
                "use a safetensors version, or set model.allow_pickle=true (they are then read with weights_only=True)"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"holds {type(found).__name__}, no mapping")
        return found
    except FileNotFoundError:
        raise ModelError(f"{path}: is missing; a whole folder in diffusers' layout is needed") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: is damaged ({error}); get the model anew") from error


def _near(base: str) -> str:
    parent = Path(base).parent
    there = parent.iterdir() if parent.is_dir() else []
    names = [path.name for path in there if path.is_dir() or path.suffix == ".safetensors"]
    nearest = difflib.get_close_matches(Path(base).name, ["demo", *names], n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""
