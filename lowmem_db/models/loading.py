"""Loading one component from its folder, or building it on the meta device from its configuration."""

import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from lowmem_db.errors import ModelError
from lowmem_db.models.autoencoder_taef2 import AutoencoderTAEF2
from lowmem_db.models.files import ModelFiles
from lowmem_db.models.new_words import add_to_tokenizer

Autoencoder = AutoencoderKL | AutoencoderTiny | AutoencoderTAEF2
_AUTOENCODERS: dict[str, type[ModelMixin]] = {
    kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny, AutoencoderTAEF2)
}
_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
CPU = torch.device("cpu")
META = torch.device("meta")
_DAMAGED = (SafetensorError, UnpicklingError, OSError, ValueError, RuntimeError, KeyError)


def load_module(kind: type, files: ModelFiles, component: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a module of diffusers or transformers, frozen and in evaluation mode, whatever the type in the file.

    Args:
        kind: Its class.
        files: The model; on the meta device its configuration is enough.
        component: Name of its folder.
        device: Device of the module.
        dtype: Type of its weights.

    Raises:
        ModelError: It is damaged.
    """
    if device.type == "meta":
        return nn.Module.to(_build_on_meta(kind, files, component), dtype).eval().requires_grad_(False)
    hide_loading_bars()
    path = files.folder_of(component)
    options: dict[str, Any] = {"use_safetensors": not files.allow_pickle or _has_safetensors(path)}
    options["torch_dtype" if issubclass(kind, ModelMixin) else "dtype"] = dtype
    try:
        loaded: Any = cast("Any", kind).from_pretrained(
            path, local_files_only=True, variant=files.variant_of(component), **options
        )
    except _DAMAGED as error:
        raise _damaged(path, error) from error
    return loaded.to(device).eval().requires_grad_(False)


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
    name = config.get("_class_name", "AutoencoderKL")
    if name not in _AUTOENCODERS:
        raise ModelError(f"{files.folder_of(component)}: is a {name}; allowed: {', '.join(_AUTOENCODERS)}")
    return cast("Autoencoder", load_module(_AUTOENCODERS[name], files, component, device, dtype))


def load_tokenizer(files: ModelFiles, component: str) -> CLIPTokenizer:
    """Load a CLIP tokenizer, with the model's new words.

    Raises:
        ConfigError: A new word cannot be added.
        ModelError: Its files are missing; transformers would silently make an empty one.
    """
    path = files.folder_of(component)
    if not any(all((path / name).is_file() for name in names) for names in _TOKENIZER_FILES):
        raise ModelError(f"{path}: has neither tokenizer.json nor vocab.json and merges.txt; download the model again")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(path, local_files_only=True)
    except _DAMAGED as error:
        raise _damaged(path, error) from error
    add_to_tokenizer(tokenizer, files.words)
    return tokenizer


def load_noise_schedule(
    files: ModelFiles, prediction_type: str | None = None, zero_terminal_snr: bool | None = None
) -> DDPMScheduler:
    """Load the noise schedule the model was trained with, whichever sampler its folder names.

    Samples are never clipped to [-1, 1] as pixels would be; some samplers' configurations leave that open.

    Args:
        files: The model.
        prediction_type: What a fine-tuned denoiser predicts instead. Default: the value in the model's folder.
        zero_terminal_snr: Whether the last timestep is pure noise. Default: the value in the model's folder.
    """
    changed = schedule_changes(prediction_type, zero_terminal_snr)
    schedule = DDPMScheduler.from_config(files.config_of("scheduler"), clip_sample=False, **changed)
    return cast("DDPMScheduler", schedule)


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
    config = files.config_of(component)
    with torch.device("meta"):
        if issubclass(kind, PreTrainedModel):
            return kind(cast("Any", kind.config_class)(**config))
        return kind.from_config(config)


def _has_safetensors(path: Path) -> bool:
    return any(file.suffix == ".safetensors" for file in path.iterdir())


def _damaged(path: Path, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:200]
    return ModelError(f"{path}: cannot be loaded ({reason}); check model.base and model.variant, or download it again")
