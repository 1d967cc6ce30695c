"""Writing a trained model as a folder that every diffusers pipeline loads, safetensors alone."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from lowmem_db_kernels import unpack_extra_bits_eager
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from lowmem_db.models.loading import load_autoencoder, load_text_encoder
from lowmem_db.models.source import COMPONENTS, ModelFolder

_LOADERS = {"vae": load_autoencoder, "text_encoder": load_text_encoder}
_OTHER_WEIGHTS = shutil.ignore_patterns("*.bin*", "*.ckpt", "*.pt", "*.pth", "*.msgpack", "*.h5", "*.onnx")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def save_model(
    folder: Path,
    source: ModelFolder,
    trained: Mapping[str, nn.Module],
    *,
    dtype: torch.dtype,
    prediction_type: str | None = None,
    extra_bits: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a whole model: trained components in ``dtype``, the others as they are in the source.

    Weights that are pickled or a variant in the source are written as safetensors under the usual names, in fp32.

    Args:
        folder: An existing, empty folder.
        source: The model that training started from.
        trained: Trained components by name.
        dtype: Type of their weights on disk; the modules themselves are not changed.
        prediction_type: What the trained UNet predicts where that has changed; samplers read it from the scheduler.
        extra_bits: Eight more bits of bf16 weights by ``component.name``, which a type wider than bf16 takes in.
    """
    for component in COMPONENTS:
        if component in trained:
            own = {name.removeprefix(f"{component}."): bits for name, bits in (extra_bits or {}).items()}
            save_component(folder / component, trained[component], dtype=dtype, extra_bits=own)
        elif component in _LOADERS and not _has_usual_weights(source, component):
            save_component(folder / component, _LOADERS[component](source), dtype=torch.float32)
        else:
            shutil.copytree(
                source.path / component, folder / component, copy_function=shutil.copyfile, ignore=_OTHER_WEIGHTS
            )
    if prediction_type is not None:
        file = folder / "scheduler" / "scheduler_config.json"
        scheduler = json.loads(file.read_text(encoding="utf-8")) | {"prediction_type": prediction_type}
        file.write_text(json.dumps(scheduler, indent=2) + "\n", encoding="utf-8")
    index = json.loads((source.path / "model_index.json").read_text(encoding="utf-8"))
    (folder / "model_index.json").write_text(json.dumps(_without_extras(index), indent=2) + "\n", encoding="utf-8")


def _has_usual_weights(source: ModelFolder, component: str) -> bool:
    return source.variant is None and any((source.path / component).glob("*.safetensors"))


def save_component(
    folder: Path, module: nn.Module, *, dtype: torch.dtype, extra_bits: Mapping[str, Tensor] | None = None
) -> None:
    """Write one component with its configuration; floating-point tensors are converted to ``dtype``."""
    folder.mkdir(parents=True)
    if isinstance(module, ModelMixin):
        module.save_config(folder)
        file = folder / "diffusion_pytorch_model.safetensors"
    else:
        module.config.save_pretrained(folder)  # type: ignore[union-attr, operator]
        file = folder / "model.safetensors"
    save_file(published_state(module, dtype, extra_bits), file, {"format": "pt"})


def published_state(
    module: nn.Module, dtype: torch.dtype, extra_bits: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return a module's weights under the names of the published files, joined with their extra bits.

    transformers 5 dropped the prefix ``text_model.`` of CLIP's text encoder in memory; other tools still expect it.
    """
    prefix = "text_model." if isinstance(module, CLIPTextModel) else ""
    state = {}
    for name, tensor in module.state_dict().items():
        published = name if name.startswith(prefix) else prefix + name
        bits = None if dtype == torch.bfloat16 else (extra_bits or {}).get(name)
        if bits is not None:
            tensor = unpack_extra_bits_eager(tensor.detach(), bits.to(tensor.device))
        state[published] = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
    return state


def _without_extras(index: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is not part of the folder, so that the pipeline loads without it."""
    extras = {name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder") if name in index}
    return index | extras | {"requires_safety_checker": False}
