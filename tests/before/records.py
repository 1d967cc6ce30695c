"""What a folder holds, in words short enough for a record: layout and bits of each file apart."""

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

HERE = Path(__file__).parent
ARCHIVE = HERE / "before.tar.xz"
RECORD = HERE / "record.json"
VERSIONS = {"_diffusers_version", "transformers_version"}  # of the libraries that write a configuration
PATHS = {"_name_or_path"}  # of the machine
NEW_FILES = {"checksums.json"}
NEW_METADATA = {
    "lowmem_db.config", "lowmem_db_base_key", "modelspec.predict_key", "ss_v2", "ss_clip_skip", "ssmd_cover_images",
    "modelspec.thumbnail",
}  # fmt: skip
OF_THE_MACHINE = {"seconds", "peak_bytes"}

GENERATED = ("-p", "a zx dog", "-p", "a dog on a beach", "--num-images", "2", "--num-inference-steps", "3")
EVALUATED = (
    "--prompts", "2", "--images", "1", "--num-class-images", "1", "--num-inference-steps", "2", "--json",
)  # fmt: skip
EXPORTED = {
    "full.safetensors": ("finished/full",),
    "full_fp16.safetensors": ("finished/full", "--precision", "fp16"),
    "full_diffusers": ("finished/full", "--format", "diffusers", "--precision", "bf16"),
    "lora_kohya.safetensors": ("finished/lora", "--format", "lora-kohya"),
    "lora_diffusers.safetensors": ("finished/lora", "--format", "lora-diffusers"),
    "lora_xl_kohya.safetensors": ("finished/lora_xl", "--format", "lora-kohya"),
    "lora_merged": ("finished/lora", "--merge", "--format", "diffusers"),
}
"""Arguments of ``export`` by what it writes."""
DRAWN = ("finished/full", "finished/lora", "finished/lora/final", "finished/lora_xl", "unfinished/in_backward")
"""What ``generate`` draws from: final models of runs, a LoRA by itself, a checkpoint."""


FIELDS_OF_BASE = {"base", "revision", "variant", "allow_pickle"}
LATER_IN_FINAL = ("README.md", "samples.jpg", "-lora-kohya.safetensors")


def machine() -> dict[str, str]:
    """Return what the last bits of a result depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    vendor = next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), platform.machine())
    return {"torch": torch.__version__, "vendor": vendor, "instructions": torch.backends.cpu.get_cpu_capability()}


def files_of(path: Path) -> dict[str, dict[str, str]]:
    """Return layout and bits of a file, or of all files below a folder."""
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    files = [file for file in files if file.name not in NEW_FILES]
    return {str(file.relative_to(path.parent)): _described(file) for file in files}


def metric_rows(run: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run without what differs from machine to machine."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in OF_THE_MACHINE} for row in rows]


def cache_of(root: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of each cached file; the index, which only serves messages, is left out."""
    files = [file for file in (root / "cache").rglob("*") if file.is_file() and not file.name.startswith("index-")]
    return {str(file.relative_to(root)): (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def pixels(file: Path) -> np.ndarray:
    """Return the pixels of a picture, signed so that they can be subtracted."""
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def _described(file: Path) -> dict[str, str]:
    if file.suffix == ".safetensors":
        return _weights(file)
    if file.suffix == ".json":
        content = json.loads(file.read_text())
        return {"layout": _digest({name: value for name, value in content.items() if name not in VERSIONS | PATHS})}
    return {"layout": hashlib.sha256(file.read_bytes()).hexdigest()}


def _weights(file: Path) -> dict[str, str]:
    bits = hashlib.sha256()
    layout: dict[str, Any] = {}
    with safe_open(file, framework="pt") as opened:
        for name in sorted(opened.keys()):
            tensor = opened.get_tensor(name)
            layout[name] = [str(tensor.dtype), list(tensor.shape)]
            bits.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        layout[""] = _read_metadata(opened.metadata() or {})
    return {"layout": _digest(layout), "bits": bits.hexdigest()}


def _read_metadata(metadata: dict[str, str]) -> dict[str, Any]:
    """Return metadata with its JSON read; later versions may say more, and name more fields of the model."""
    read: dict[str, Any] = {}
    is_of_kohya = "ss_network_module" in metadata
    for name, value in metadata.items():
        if name in NEW_METADATA or (is_of_kohya and name.startswith("modelspec.")):
            continue
        if name == "lowmem_db_base":
            read[name] = {field: said for field, said in json.loads(value).items() if field in FIELDS_OF_BASE}
            read[name]["allow_pickle"] = False  # later versions write no consent
            read[name]["base"] = "models" + read[name]["base"].partition("models")[2]  # absolute in later versions
            continue
        try:
            read[name] = json.loads(value)
        except ValueError:
            read[name] = value
    if isinstance(settings := read.get("lora_adapter_metadata"), dict):  # later versions say more to diffusers
        read["lora_adapter_metadata"] = {key: said for key, said in settings.items() if "rank_pattern" not in key}
    return _without_versions(read)


def _without_versions(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_versions(item) for name, item in value.items() if name not in VERSIONS}
    return value


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
