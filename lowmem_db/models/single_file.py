"""Models that come as one file in the layout of the published checkpoints, recognised by the file's header."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError

from lowmem_db.errors import ModelError
from lowmem_db.models.families import FAMILIES, find_family
from lowmem_db.models.families.misfits import OTHER_CHANNELS
from lowmem_db.models.families.original_layout import UNET_PREFIX, Entry, Layout, layout_for
from lowmem_db.models.families.stable_diffusion import text_width
from lowmem_db.models.files import ModelFiles
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.stored_weights import StoredTensor, expected_shapes, read_header

CONFIGS_DIR = Path(__file__).parent / "configs"
CONFIGS_KEY = "lowmem_db.components"
"""Metadata key of files written by this program: the configuration of every component, as JSON."""
_CONV_IN = "input_blocks.0.0.weight"
_PICKLED = {".ckpt", ".pt", ".pth", ".bin"}
_PREDICTION_TYPES = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
_ZERO_TERMINAL_SNR = {
    "_class_name": "DDIMScheduler",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
_NONSENSE = (
    ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
    StrictDataclassError,
)  # fmt: skip
_OTHER_FILES = (
    (r"^lora_(unet|te)|\.lora_(down|up|[AB])\b|\.lora\.(down|up)\.", "a LoRA, which needs its base model"),
    (r"^control_model\.|^controlnet_", "a ControlNet"),
    (r"double_blocks\.0\.", "a Flux model"),
    (r"joint_blocks\.0\.", "a Stable Diffusion 3 model"),
    (r"^down_blocks\.0\.", "only a UNet, in diffusers' layout"),
    (r"^((first_stage_model|vae)\.)?(encoder|decoder)\.(down|up|mid|conv)", "only an autoencoder"),
    (r"^(cond_stage_model\.|text_encoders?\.)?(transformer\.)?text_model\.", "only a text encoder"),
    (r"^emb_params$|^clip_[lg]$|^string_to_param", "a Textual Inversion embedding"),
)
_ROLES = {"denoiser": "UNet", "autoencoder": "autoencoder", "text_encoder": "text encoder"}


@dataclass(frozen=True, kw_only=True)
class DescribedFiles(ModelFiles):
    """A folder of configurations, some of which are replaced.

    Attributes:
        configs: Configurations to use instead of those in the folder, or in addition to them.
    """

    configs: Mapping[str, dict[str, Any]]

    def config_of(self, component: str) -> dict[str, Any]:
        """Return the configuration of a component."""
        return self.configs[component] if component in self.configs else super().config_of(component)


@dataclass(frozen=True, kw_only=True)
class SingleFile(DescribedFiles, ModelFolder):
    """A model recognised by the header of its single file: its configurations are known, its weights are not read.

    Attributes:
        file: The single file.
        layout: Layout of the file.
        tensors: The tensors that are used, by their names in the published files.
        remark: What it is, and how that was recognised, for the user.
    """

    file: Path
    layout: Layout
    tensors: Mapping[str, StoredTensor]
    remark: str

    def entries(self, component: str, names: Iterable[str]) -> list[Entry]:
        """Return the tensors of a component that are used, from their names in diffusers' layout."""
        return [e for e in self.layout.entries(component, self.config_of(component), names) if not e.spare]


def recognise(file: Path) -> SingleFile:
    """Recognise a model from the header of its single file, and check that it is complete.

    Raises:
        ModelError: It is not a complete Stable Diffusion model; the message says what was found.
    """
    if file.suffix in _PICKLED:
        raise ModelError(
            f"model.base: {file} is pickled, which can run code when it is read; allowed: the same model as "
            ".safetensors; the checkpoint merger of AUTOMATIC1111 writes one"
        )
    found, metadata = read_header(file)
    conv_in = _find(found, UNET_PREFIX + _CONV_IN)
    if conv_in is None:
        raise _refusal(file, f"is {_describe(found)}")
    if conv_in.shape[1] != 4:
        kind = OTHER_CHANNELS.get(conv_in.shape[1], "an unknown model")
        raise _refusal(file, f"is {kind}: its UNet has {conv_in.shape[1]} input channels instead of 4")
    if CONFIGS_KEY not in metadata:
        return _with_tensors(_of_family(file, found, metadata), found)
    with _refusing_nonsense(file):
        return _with_tensors(_with_own_configs(file, metadata), found)


def _with_tensors(model: SingleFile, found: Mapping[str, StoredTensor]) -> SingleFile:
    tensors = {}
    for component in model.layout.prefixes:
        tensors |= _tensors_of(model, component, found)
    return replace(model, tensors=tensors)


def _of_family(file: Path, found: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> SingleFile:
    """Return the model with the published configurations of its family, which its tensors reveal."""
    shapes = {name: tensor.shape for name, tensor in found.items()}
    layout = next((family.layout for family in FAMILIES if family.recognises_file(shapes)), None)
    if layout is None:
        width = text_width(shapes)
        raise _refusal(file, f"has a UNet for text embeddings of width {width}" + " (SDXL's refiner)" * (width == 1280))
    prediction_type, reason = _prediction_type(file, layout, found, metadata)
    path = CONFIGS_DIR / layout.folder_of_configs(prediction_type)
    scheduler = ModelFiles(path=path).config_of("scheduler")
    scheduler |= {"prediction_type": prediction_type} | (_ZERO_TERMINAL_SNR if "ztsnr" in found else {})
    return _model(file, path, layout, {"scheduler": scheduler}, reason)


def _with_own_configs(file: Path, metadata: Mapping[str, str]) -> SingleFile:
    """Return the model that a file written by this program describes in its metadata."""
    configs = json.loads(metadata[CONFIGS_KEY])
    layout = layout_for(configs)
    prediction_type = configs["scheduler"].get("prediction_type", "epsilon")
    if prediction_type not in {"epsilon", "v_prediction", "sample"}:
        raise ValueError(f"prediction_type {prediction_type!r}; allowed: epsilon, v_prediction, sample")
    path = CONFIGS_DIR / layout.folder_of_configs(prediction_type)
    model = _model(file, path, layout, configs, "as its metadata says")
    model.family.sampler(model, "ddpm")  # refuses an invalid schedule
    return model


@contextmanager
def _refusing_nonsense(file: Path) -> Iterator[None]:
    """Refuse metadata from which no model can be built; the libraries raise all sorts of errors."""
    try:
        yield
    except _NONSENSE as error:
        reason = " ".join(repr(error).split())[:200]
        raise ModelError(f"{file}: its metadata {CONFIGS_KEY} is damaged ({reason}); export it again") from error


def _model(file: Path, path: Path, layout: Layout, configs: Mapping[str, dict[str, Any]], reason: str) -> SingleFile:
    files = DescribedFiles(path=path, configs=configs)
    family = find_family(files)
    predicts = files.config_of("scheduler").get("prediction_type", "epsilon")
    remark = f"{file.name} is {family.name} and predicts {predicts}, {reason}"
    return SingleFile(
        name=str(file),
        path=path,
        family=family,
        file=file,
        configs=configs,
        layout=layout,
        tensors={},
        remark=remark,
    )


def _prediction_type(file: Path, layout: Layout, found: Iterable[str], metadata: Mapping[str, str]) -> tuple[str, str]:
    """Return what the UNet predicts, which its weights do not reveal, and how that was decided."""
    spec = metadata.get("modelspec.prediction_type", "")
    if spec in _PREDICTION_TYPES:
        return _PREDICTION_TYPES[spec], f"as its metadata says (modelspec.prediction_type: {spec})"
    beside = file.with_suffix(".yaml")
    if beside.is_file():
        said = _parameterization(beside)
        return said, f"as {beside.name} next to it says"
    if "v_pred" in found:
        return "v_prediction", "as its tensor v_pred says"
    return layout.usual_prediction, (
        f"like most models of its family, as the file does not say; if that is wrong, write a file {beside.name} next "
        "to it with the line parameterization: v (or eps)"
    )


def _parameterization(file: Path) -> str:
    """Return what the UNet predicts according to a configuration of the original repositories."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ModelError(f"{file}: is damaged ({error}); delete it, or write parameterization: v (or eps)") from error
    said = next(_values(content, "parameterization"), "eps")  # the original code's default
    if said not in _PREDICTION_TYPES:
        raise ModelError(f"{file}: parameterization is {said!r}; allowed: eps, v")
    return _PREDICTION_TYPES[said]


def _values(content: Any, key: str) -> Iterator[Any]:
    """Yield the values of a key anywhere in nested mappings."""
    if isinstance(content, dict):
        if key in content:
            yield content[key]
        for value in content.values():
            yield from _values(value, key)


def _tensors_of(model: SingleFile, component: str, found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors of a component.

    Raises:
        ModelError: Some are missing, or have the wrong shape.
    """
    shapes = expected_shapes(model, component)
    tensors, missing = {}, []
    for entry in model.entries(component, shapes):
        tensor = _find(found, entry.name)
        if tensor is None:
            missing.append(entry.name)
        elif not _same_shape(tensor.shape, entry.shape([shapes[name] for name in entry.sources])):
            wanted = list(entry.shape([shapes[name] for name in entry.sources]))
            found_shape = f"{entry.name} is {list(tensor.shape)}, not {wanted}"
            raise _refusal(model.file, f"is not a {model.family.name} model: {found_shape}")
        else:
            tensors[entry.name] = tensor
    if not tensors:
        raise _refusal(model.file, f"has a UNet, but no {_in_words(model, component)}")
    if missing:
        lacking = f"lacks {len(missing)} tensors of its {_in_words(model, component)}, such as {missing[0]}"
        raise _refusal(model.file, lacking)
    return tensors


def _in_words(model: SingleFile, component: str) -> str:
    name = _ROLES[model.family.component(component).role]
    return name if component in model.family.names_of(model.family.component(component).role)[:1] else f"second {name}"


def _same_shape(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Compare shapes; a matrix may be written as a 1x1 convolution."""
    return found == wanted or tuple(n for n in found if n != 1) == tuple(n for n in wanted if n != 1)


def _find(found: Mapping[str, StoredTensor], name: str) -> StoredTensor | None:
    """Return a tensor by its published name, or by a name that other files use for it.

    A moving average, whose names have no dots, stands in for a UNet that is missing. Older versions of transformers
    wrote CLIP's names without ``text_model.``.
    """
    averaged = "model_ema." + name.removeprefix("model.").replace(".", "")
    return found.get(name) or found.get(averaged) or found.get(name.replace("transformer.text_model.", "transformer."))


def _describe(found: Mapping[str, StoredTensor]) -> str:
    """Return what a file seems to be, judging by its tensors."""
    for pattern, what in _OTHER_FILES:
        if any(re.search(pattern, name) for name in found):
            return what
    return f"not a known model: it has {len(found)} tensors, such as {', '.join(list(found)[:3]) or 'none'}"


def _refusal(file: Path, what: str) -> ModelError:
    return ModelError(
        f"model.base: {file} {what}; allowed: a complete Stable Diffusion 1.x, 2.x or XL model, with UNet, autoencoder "
        "and text encoders, in one .safetensors file"
    )
