"""Models that come as one file in the layout of the published checkpoints, recognised by the file's header."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from lowmem_db.errors import ModelError
from lowmem_db.models.families import FAMILIES, find_family
from lowmem_db.models.families.misfits import OTHER_CHANNELS
from lowmem_db.models.families.original_layout import UNET_PREFIX, Entry, Layout, layout_for
from lowmem_db.models.families.stable_diffusion import text_width
from lowmem_db.models.files import ModelFiles
from lowmem_db.models.folder import ModelFolder
from lowmem_db.models.loading import ConfigurationError, load_noise_schedule
from lowmem_db.models.prediction import CONFIGS_KEY, ZERO_TERMINAL_SNR, Prediction, find_prediction
from lowmem_db.models.stored_tensor import StoredTensor, read_header
from lowmem_db.models.stored_weights import expected_shapes
from lowmem_db.storage.tensor_stream import FLOAT8

CONFIGS_DIR = Path(__file__).parent / "configs"
_CONV_IN = "input_blocks.0.0.weight"
_PICKLED = {".ckpt", ".pt", ".pth", ".bin"}
_ZERO_TERMINAL_SNR = {
    "_class_name": "DDIMScheduler",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
_NONSENSE = (
    ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
    ConfigurationError, StrictDataclassError,
)  # fmt: skip
_OTHER_NOISE = {
    "edm_mean": "an EDM model with latents of its own, such as Playground v2.5",
    "edm_std": "an EDM model with latents of its own, such as Playground v2.5",
    "edm_vpred.sigma_max": "an EDM model that predicts v over continuous noise levels, such as CosXL",
}
_SCALED = re.compile(
    r"(^|\.)scaled_fp8$|\.(scale_weight|scale_input|weight_scale(_2)?|input_scale|comfy_quant)$"
    r"|\.weight\.(absmax|quant_map|quant_state\..*)$|\.(SCB|weight_format)$"
)
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
        is_own = component in self.configs and component not in self.replaced
        return self.configs[component] if is_own else super().config_of(component)


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
    if file.suffix == ".gguf":
        raise ModelError(
            f"model.base: {file} is quantized (GGUF), which is for drawing only; allowed: the fp16 or bf16 version as "
            ".safetensors"
        )
    if file.suffix in _PICKLED:
        raise ModelError(
            f"model.base: {file} is pickled, which can run code when it is read; allowed: the same model as "
            ".safetensors; the checkpoint merger of AUTOMATIC1111 writes one"
        )
    found, metadata = read_header(file)
    if quantized := next((name for name in found if _SCALED.search(name)), None):
        raise _refusal(
            file,
            f"holds quantized weights with scales beside them ({quantized}), which are for drawing only; plain fp8 "
            "would do, or use the fp16 or bf16 version",
        )
    conv_in = _find(found, UNET_PREFIX + _CONV_IN)
    if conv_in is None:
        raise _refusal(file, f"is {_describe(found)}")
    if conv_in.shape[1] != 4:
        kind = OTHER_CHANNELS.get(conv_in.shape[1], "an unknown model")
        raise _refusal(file, f"is {kind}: its UNet has {conv_in.shape[1]} input channels instead of 4")
    for marker, what in _OTHER_NOISE.items():
        if marker in found:
            raise _refusal(file, f"is {what}, as its tensor {marker} says: it would train into noise")
    if CONFIGS_KEY not in metadata:
        return _with_tensors(_of_family(file, found, metadata), found)
    with _refusing_nonsense(file):
        return _with_tensors(_with_own_configs(file, found, metadata), found)


def _with_tensors(model: SingleFile, found: Mapping[str, StoredTensor]) -> SingleFile:
    tensors = {}
    for component in model.layout.prefixes:
        own = _tensors_of(model, component, found)
        if component == model.family.denoiser:
            _refuse_unknown(model, own, found)
        tensors |= own
    remark = model.remark
    if any(tensor.dtype in FLOAT8 for tensor in tensors.values()):
        remark += (
            "; weights that it holds in 8 bits (fp8) are widened to fp16, which does not bring back what they lost"
        )
    return replace(model, tensors=tensors, remark=remark)


def _refuse_unknown(model: SingleFile, known: Iterable[str], found: Iterable[str]) -> None:
    """Refuse a UNet with tensors that the layout does not know: it computes something else."""
    names = set(known)
    if unknown := [name for name in found if name.startswith(UNET_PREFIX) and name not in names]:
        raise _refusal(
            model.file,
            f"is not a plain {model.family.name} model: its UNet has {len(unknown)} tensors more, such as {unknown[0]}",
        )


def _of_family(file: Path, found: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> SingleFile:
    """Return the model with the published configurations of its family, which its tensors reveal."""
    shapes = {name: tensor.shape for name, tensor in found.items()}
    layout = next((family.layout for family in FAMILIES if family.recognises_file(shapes)), None)
    if layout is None:
        width = text_width(shapes)
        raise _refusal(file, f"has a UNet for text embeddings of width {width}" + " (SDXL's refiner)" * (width == 1280))
    prediction = find_prediction(file, layout, found, metadata)
    path = CONFIGS_DIR / layout.folder_of_configs(prediction.type)
    scheduler = ModelFiles(path=path).config_of("scheduler")
    return _model(file, path, layout, {"scheduler": _as_marked(scheduler, prediction, found)}, prediction)


def _with_own_configs(file: Path, found: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> SingleFile:
    """Return the model that a file written by this program describes in its metadata."""
    configs = json.loads(metadata[CONFIGS_KEY])
    if odd := [name for name, config in configs.items() if not isinstance(config, dict)]:
        raise TypeError(f"{odd[0]} is no mapping")
    layout = layout_for(configs)
    prediction = find_prediction(file, layout, found, metadata)
    if prediction.type not in {"epsilon", "v_prediction", "sample"}:
        raise ValueError(f"prediction_type {prediction.type!r}; allowed: epsilon, v_prediction, sample")
    path = CONFIGS_DIR / layout.folder_of_configs(prediction.type)
    configs["scheduler"] = _as_marked(configs["scheduler"], prediction, found)
    model = _model(file, path, layout, configs, prediction)
    load_noise_schedule(model)  # refuses an invalid schedule
    return model


def _as_marked(scheduler: dict[str, Any], prediction: Prediction, found: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Return a scheduler's configuration with what the file says of the prediction and of zero terminal SNR."""
    changed: dict[str, Any] = {}
    if prediction.type != scheduler.get("prediction_type", "epsilon"):
        changed["prediction_type"] = prediction.type
    if ZERO_TERMINAL_SNR in found and not scheduler.get("rescale_betas_zero_snr"):
        changed |= _ZERO_TERMINAL_SNR
    return scheduler | changed


@contextmanager
def _refusing_nonsense(file: Path) -> Iterator[None]:
    """Refuse metadata from which no model can be built; the libraries raise all sorts of errors."""
    try:
        yield
    except _NONSENSE as error:
        reason = " ".join(repr(error).split())[:200]
        raise ModelError(f"{file}: its metadata {CONFIGS_KEY} is damaged ({reason}); export it again") from error


def _model(
    file: Path, path: Path, layout: Layout, configs: Mapping[str, dict[str, Any]], prediction: Prediction
) -> SingleFile:
    files = DescribedFiles(path=path, configs=configs)
    family = find_family(files)
    remark = f"{file.name} is {family.name} and predicts {prediction.type}, {prediction.reason}"
    if configs["scheduler"].get("rescale_betas_zero_snr"):
        remark += "; it has zero terminal SNR"
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
