"""Loading one component from its folder, or building it on the meta device from its configuration."""

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn, cast

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from lowmem_db.errors import ModelError, NonFiniteError
from lowmem_db.finite import first_not_finite, is_finite
from lowmem_db.models.autoencoder_taef2 import AutoencoderTAEF2
from lowmem_db.models.configurations import NONSENSE, own_fields
from lowmem_db.models.files import ModelFiles, safetensors_of
from lowmem_db.models.new_words import add_to_tokenizer
from lowmem_db.models.reading import read_module
from lowmem_db.out_of_memory import place_of

Autoencoder = AutoencoderKL | AutoencoderTiny | AutoencoderTAEF2
_AUTOENCODERS: dict[str, type[ModelMixin]] = {
    kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny, AutoencoderTAEF2)
}
CPU = torch.device("cpu")
META = torch.device("meta")
# Tensors that published files have although no component uses them: CLIP's positions and its unused head.
_UNUSED = re.compile(r"(^|\.)position_ids$|^text_projection\.|^logit_scale$")
_DAMAGED = (SafetensorError, UnpicklingError, OSError, ValueError, RuntimeError, KeyError)


class ConfigurationError(ModelError):
    """The configuration of a component describes none."""


def load_module(kind: type, files: ModelFiles, component: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a module of diffusers or transformers, frozen and in evaluation mode, whatever the type in the file.

    Args:
        kind: Its class.
        files: The model; on the meta device its configuration is enough.
        component: Name of its folder.
        device: Device of the module.
        dtype: Type of its weights.

    Raises:
        ModelError: It is damaged, or lacks tensors.
        NonFiniteError: A weight is infinite or NaN in ``dtype``.
    """
    if device.type == "meta":
        return nn.Module.to(_build_on_meta(kind, files, component), dtype).eval().requires_grad_(False)
    path = files.folder_of(component)
    weights = safetensors_of(path, files.variant_of(component))
    read = _from_pretrained if not weights or getattr(kind, "_keep_in_fp32_modules", None) else _read
    try:
        loaded, found = read(kind, files, component, device, dtype)
    except _DAMAGED as error:
        _refuse_damaged(path, error)
    check_names(path, missing=found["missing_keys"], unexpected=found["unexpected_keys"])
    if found["mismatched_keys"]:
        raise ModelError(f"{path}: {found['mismatched_keys'][0]}; download the model again")
    check_finite(path, loaded)
    return loaded.to(device).eval().requires_grad_(False)


def _read(
    kind: Any, files: ModelFiles, component: str, device: torch.device, dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    """Return a module with the tensors of safetensors, read one by one, and the names that do not match."""
    path = files.folder_of(component)
    weights = safetensors_of(path, files.variant_of(component))
    module, found = read_module(partial(_build, kind, files, component), weights, component, device, dtype)
    if isinstance(module, PreTrainedModel):
        module.config.dtype = dtype  # named in saved configurations, as by from_pretrained
    return module, found


def _from_pretrained(
    kind: Any, files: ModelFiles, component: str, device: torch.device, dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    """Return a module that its library loads onto the host, and the names that do not match."""
    del device
    hide_loading_bars()
    path, config = files.folder_of(component), files.config_of(component)
    options: dict[str, Any] = {"use_safetensors": not files.allow_pickle or _has_safetensors(path)}
    options["torch_dtype" if issubclass(kind, ModelMixin) else "dtype"] = dtype
    if issubclass(kind, PreTrainedModel):
        options["config"] = cast("Any", kind.config_class)(**own_fields(kind.config_class, config))
    variant = files.variant_of(component)
    loaded, found = cast("Any", kind).from_pretrained(
        path, local_files_only=True, variant=variant, output_loading_info=True, **options
    )
    return loaded, {**found, "mismatched_keys": []}  # the library has refused those


def check_names(path: Path, *, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuse a component whose weight files do not hold the tensors that its configuration needs, and only those.

    Raises:
        ModelError: A tensor is missing, or there is one that the configuration has no place for.
    """
    strangers = (name for name in unexpected if not _UNUSED.search(name))
    for what, names in (("lack", sorted(missing)), ("have, without a place for them in config.json,", list(strangers))):
        if names:
            raise ModelError(
                f"{path}: its weight files {what} {len(names)} tensor{'s' * (len(names) != 1)}, such as {names[0]}; "
                "check that config.json belongs to them, or download the model again"
            )


def check_finite(path: Path, module: nn.Module) -> None:
    """Refuse weights that are infinite or NaN.

    Raises:
        NonFiniteError: One is; the message names it.
    """
    state = module.state_dict()
    if (name := first_not_finite(state)) is not None:
        kind = str(state[name].dtype).removeprefix("torch.")
        raise NonFiniteError(
            f"{path}: {name} has values that are infinite or NaN in {kind}; download the model again, or, if it is "
            "whole, choose a wider type"
        )


def hide_loading_bars() -> None:
    """Hide transformers' bars for weights that are on the disk; bars of downloads stay as they are."""
    shows_downloads = not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the hub's bars cannot be hidden if the environment wants them, which is fine
        disable_progress_bar()
    if shows_downloads:
        enable_progress_bars()


def load_autoencoder(files: ModelFiles, component: str, device: torch.device, dtype: torch.dtype) -> Autoencoder:
    """Load the autoencoder, frozen and in evaluation mode; in fp32 if its configuration says ``force_upcast``.

    SDXL's does: its activations are larger than fp16 can hold.

    Raises:
        ModelError: Its class is not supported.
    """
    config = files.config_of(component)
    dtype = torch.float32 if config.get("force_upcast") else dtype
    name = str(config.get("_class_name", "AutoencoderKL"))[:100]
    if name not in _AUTOENCODERS:
        raise ModelError(f"{files.folder_of(component)}: is a {name}; allowed: {', '.join(_AUTOENCODERS)}")
    return cast("Autoencoder", load_module(_AUTOENCODERS[name], files, component, device, dtype))


def load_tokenizer(
    files: ModelFiles,
    component: str,
    kind: Any = CLIPTokenizer,
    enough: Sequence[Sequence[str]] = (("tokenizer.json",), ("vocab.json", "merges.txt")),
) -> Any:
    """Load a tokenizer, with the model's new words.

    Args:
        files: The model.
        component: Name of its folder.
        kind: Its class. Default: CLIP's.
        enough: Files that are enough, in several ways.

    Raises:
        ConfigError: A new word cannot be added.
        ModelError: Its files are missing; transformers would silently make an empty one.
    """
    path = files.folder_of(component)
    if not any(all((path / name).is_file() for name in names) for names in enough):
        needed = " nor ".join(" and ".join(names) for names in enough)
        raise ModelError(f"{path}: has neither {needed}; download the model again")
    try:
        tokenizer = kind.from_pretrained(path, local_files_only=True)
    except _DAMAGED as error:
        _refuse_damaged(path, error)
    add_to_tokenizer(tokenizer, files.words)
    return tokenizer


def load_noise_schedule(
    files: ModelFiles,
    prediction_type: str | None = None,
    zero_terminal_snr: bool | None = None,
    *,
    clips: bool = False,
    component: str = "scheduler",
) -> DDPMScheduler:
    """Load the noise schedule the model was trained with, whichever sampler its folder names.

    Args:
        files: The model.
        prediction_type: What a fine-tuned denoiser predicts instead. Default: the value in the model's folder.
        zero_terminal_snr: Whether the last timestep is pure noise. Default: the value in the model's folder.
        clips: Whether samples are clipped as the folder says, which is right for pixels. Default: never; some samplers'
            configurations leave it open.
        component: Name of the schedule's folder.
    """
    changed = schedule_changes(prediction_type, zero_terminal_snr)
    if not clips:
        changed["clip_sample"] = False
    try:
        schedule = DDPMScheduler.from_config(files.config_of(component), **changed)
    except NONSENSE as error:
        raise ConfigurationError(
            f"{files.path / component}: scheduler_config.json does not describe a noise schedule "
            f"({_in_a_line(error)}); download the model again"
        ) from error
    schedule = cast("DDPMScheduler", schedule)
    if not is_finite(schedule.alphas_cumprod) or not bool((schedule.alphas_cumprod >= 0).all()):
        raise ModelError(
            f"{files.path / component}: the noise schedule of scheduler_config.json has values that are no "
            "probabilities; download the model again"
        )
    return schedule


def schedule_changes(prediction_type: str | None, zero_terminal_snr: bool | None) -> dict[str, Any]:
    """Return what a fine-tuning changes in the configuration of a scheduler.

    With zero terminal SNR the betas are rescaled (arXiv:2305.08891, Algorithm 1), and samplers must start at the
    last timestep (section 3.3).
    """
    changed: dict[str, Any] = {} if prediction_type is None else {"prediction_type": prediction_type}
    if zero_terminal_snr is not None:
        changed["rescale_betas_zero_snr"] = zero_terminal_snr
    return changed | {"timestep_spacing": "trailing"} if zero_terminal_snr else changed


def _build_on_meta(kind: Any, files: ModelFiles, component: str) -> Any:
    """Build a component from its configuration, without weights."""
    with torch.device("meta"):
        return _build(kind, files, component)


def _build(kind: Any, files: ModelFiles, component: str) -> Any:
    if issubclass(kind, PreTrainedModel):
        config = configuration_of(kind, files, component)
        return _making_sense(kind, files, component, lambda: kind(config))
    return _making_sense(kind, files, component, lambda: kind.from_config(files.config_of(component)))


def configuration_of(kind: Any, files: ModelFiles, component: str) -> Any:
    """Return the configuration of a network of transformers, without fields that are not the network's.

    Raises:
        ConfigurationError: It describes none.
    """
    config = files.config_of(component)
    return _making_sense(kind, files, component, lambda: kind.config_class(**own_fields(kind.config_class, config)))


def _making_sense(kind: Any, files: ModelFiles, component: str, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except NONSENSE as error:
        raise ConfigurationError(
            f"{files.folder_of(component)}: config.json does not describe a {kind.__name__} ({_in_a_line(error)}); "
            "download the model again"
        ) from error


def _has_safetensors(path: Path) -> bool:
    return any(file.suffix == ".safetensors" for file in path.iterdir())


def _refuse_damaged(path: Path, error: Exception) -> NoReturn:
    """Raise the error of a damaged component; out of memory is no damage."""
    if place_of(error) is not None:
        raise error
    raise ModelError(
        f"{path}: cannot be loaded ({_in_a_line(error)}); check model.base and model.variant, or download it again"
    ) from error


def _in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
