"""The stage ``bandwidth``: bytes per second of each kernel and of PCIe, beside a plain copy."""

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from lowmem_db_kernels import (
    NoiseCoefficients,
    adamw8bit_step,
    bias_corrections,
    diffusion_loss,
    geglu,
    group_norm_silu,
    init_state,
    noise,
)
from torch import Tensor

from lowmem_db.bench.setting import Setting
from lowmem_db.bench.stage import Measurement, Row, Stage

_GB = 1e9
_NUM_REPEATS = 5


def _measurements(setting: Setting) -> Iterator[Measurement]:
    count = 2**22 if setting.tiny else 2**26
    copy = partial(_copy, setting, count)
    yield "copy", lambda: {"gb_per_second": copy()}
    for name, make in _KERNELS.items():
        yield name, partial(_beside_copy, setting, make, count, copy)
    for name, make in _CROSSINGS.items():
        yield name, partial(_crossing, setting, make, count)


def _beside_copy(
    setting: Setting,
    make: Callable[[torch.device, int], tuple[Callable[[], object], int]],
    count: int,
    copy: Callable[[], float],
) -> Row:
    run, num_bytes = make(setting.device, count)
    rate = _rate(setting, run, num_bytes)
    return {"gb_per_second": rate, "share_of_copy": rate / copy()}


def _copy(setting: Setting, count: int) -> float:
    source = torch.zeros(count, device=setting.device)
    target = torch.empty_like(source)
    return _rate(setting, lambda: target.copy_(source), 2 * source.nbytes)


def _rate(setting: Setting, run: Callable[[], object], num_bytes: int) -> float:
    """Return GB per second of the fastest of a few runs, the first of which does not count."""
    seconds: list[float] = []
    for _ in range(_NUM_REPEATS + 1):
        setting.synchronize()
        started = time.perf_counter()
        run()
        setting.synchronize()
        seconds.append(time.perf_counter() - started)
    return num_bytes / _GB / max(min(seconds[1:]), 1e-9)


def _adamw8bit_step(device: torch.device, count: int) -> tuple[Callable[[], object], int]:
    weight, gradient = (torch.full((count,), 0.01, device=device, dtype=torch.bfloat16) for _ in range(2))
    state = init_state(weight)
    rate, step = torch.full((), 1e-6, device=device), torch.ones((), dtype=torch.int64, device=device)
    corrections = bias_corrections(step, (0.9, 0.999))

    def run() -> None:
        adamw8bit_step(weight, gradient, state, lr=rate, step=step, corrections=corrections, rounding_seed=1)

    # The weight and two moments are read and written, the gradient is read.
    return run, 2 * weight.nbytes + gradient.nbytes + 4 * count


def _noise(device: torch.device, count: int) -> tuple[Callable[[], object], int]:
    latents = torch.ones(2, 4, count // 8, device=device)
    ones, ids = torch.ones(2, device=device), torch.arange(2, device=device)
    coefficients = NoiseCoefficients(ones, ones, ones, ones)
    return lambda: noise(latents, coefficients, seed=1, step=1, sample_ids=ids), 3 * latents.nbytes


def _diffusion_loss(device: torch.device, count: int) -> tuple[Callable[[], object], int]:
    prediction = torch.ones(2, 4, count // 8, device=device)
    target, weights = torch.zeros_like(prediction), torch.ones(2, device=device)
    return lambda: diffusion_loss(prediction, target, weights, num_instance=1), 2 * prediction.nbytes


def _group_norm_silu(device: torch.device, count: int) -> tuple[Callable[[], object], int]:
    pictures = torch.ones(2, 32, count // 64, 1, device=device)
    scale = torch.ones(32, device=device)
    # The input is read twice: for its statistics, and to apply them.
    return lambda: group_norm_silu(pictures, 32, scale, scale), 3 * pictures.nbytes


def _geglu(device: torch.device, count: int) -> tuple[Callable[[], object], int]:
    packed = torch.ones(2, count // 1024, 512, device=device)
    return lambda: geglu(packed), packed.nbytes * 3 // 2


_KERNELS: dict[str, Callable[[torch.device, int], tuple[Callable[[], object], int]]] = {
    "adamw8bit_step": _adamw8bit_step,
    "noise": _noise,
    "diffusion_loss": _diffusion_loss,
    "group_norm_silu": _group_norm_silu,
    "geglu": _geglu,
}


def _crossing(setting: Setting, make: Callable[[Tensor, Tensor], Callable[[], object]], count: int) -> Row:
    if not setting.is_cuda:
        return {"gb_per_second": None, "skipped": "there is no card"}
    on_host = torch.empty(count, pin_memory=True)
    on_device = torch.empty(count, device=setting.device)
    return {"gb_per_second": _rate(setting, make(on_host, on_device), on_host.nbytes)}


def _both_ways(on_host: Tensor, on_device: Tensor) -> Callable[[], object]:
    streams = [torch.cuda.Stream(on_device.device) for _ in range(2)]
    halves = on_host.chunk(2), on_device.chunk(2)

    def run() -> None:
        for stream, (host, device, to_host) in zip(
            streams, [(halves[0][0], halves[1][0], False), (halves[0][1], halves[1][1], True)], strict=True
        ):
            with torch.cuda.stream(stream):
                if to_host:
                    host.copy_(device, non_blocking=True)
                else:
                    device.copy_(host, non_blocking=True)

    return run


_CROSSINGS: dict[str, Callable[[Tensor, Tensor], Callable[[], object]]] = {
    "host_to_device": lambda host, device: lambda: device.copy_(host, non_blocking=True),
    "device_to_host": lambda host, device: lambda: host.copy_(device, non_blocking=True),
    "both_ways": _both_ways,
}
STAGE = Stage(name="bandwidth", rows="measurements", limit_seconds=20.0, measurements=_measurements)
