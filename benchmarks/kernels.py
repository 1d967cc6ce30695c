"""Bytes and launches of each operator, eager and fused; on a CUDA device also times.

    python benchmarks/kernels.py                      # counts, on meta tensors
    python benchmarks/kernels.py --csv results.csv    # on a CUDA device: median and 20/80 percentiles in milliseconds
    python benchmarks/kernels.py --cpu benchmarks/results/adamw8bit_cpu.json    # the optimizer step on one CPU thread

Bytes are counted by watching every operation that is dispatched, not by a formula: each tensor it reads and each it
writes, once. Both group norms read their input twice, for the statistics and to apply them, so a card moves more. Bytes
divided by a card's bandwidth are an estimate of the least time a step can take, not a measurement.
"""

import argparse
import csv
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lowmem_db_kernels import (
    AdamW8bitState,
    NoiseCoefficients,
    adamw8bit_step,
    bias_corrections,
    diffusion_loss,
    geglu,
    group_norm_silu,
    init_state,
    noise,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BANDWIDTHS = {"T4": 320e9, "RTX 2060": 336e9, "RTX 3060": 360e9, "RTX 4090": 1008e9, "RTX 5090": 1792e9}
LATENTS = {"SD 1.5": (2, 4, 64, 64), "SDXL": (2, 4, 128, 128)}
FEATURES = {"SD 1.5": (2, 320, 64, 64), "SDXL": (2, 320, 128, 128)}
PACKED = {"SD 1.5": (2, 4096, 2 * 1280), "SDXL": (2, 4096, 2 * 2560)}
NUM_WEIGHTS = {"SD 1.5": 29_491_200, "SDXL": 29_491_200}
# The dispatcher sees a fused operator as one; it launches so many kernels.
LAUNCHES = {"diffusion_loss": 2, "group_norm_silu": 3, "group_norm_silu_backward": 3, "adamw8bit_step": 2}


class TrafficCounter(TorchDispatchMode):
    """Adds up what every operation but views reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes, self.num_launches = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        names = function._schema.name.split("::")[1]
        is_view = any(out.alias_info and not out.alias_info.is_write for out in function._schema.returns)
        if not is_view and not names.startswith(("empty", "new_empty", "detach")):
            written = [arg for spec, arg in zip(function._schema.arguments, args, strict=False) if _is_written(spec)]
            tensors = [x for x in tree_leaves([args, kwargs, result, written]) if isinstance(x, torch.Tensor)]
            self.num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.num_launches += LAUNCHES.get(names, 1)
        return result


def _is_written(spec: Any) -> bool:
    return spec.alias_info is not None and spec.alias_info.is_write


class Case(NamedTuple):
    """One operator: the plain way in PyTorch, and the fused one."""

    eager: Callable[[], Any]
    fused: Callable[[], Any]


def noise_case(size: str, device: str) -> Case:
    """Noise latents for an epsilon model, as diffusers' scheduler does."""
    latents = torch.empty(LATENTS[size], device=device, dtype=torch.bfloat16).normal_()
    timesteps = torch.tensor([1, 2], device=device)
    alphas = torch.linspace(0.99, 0.01, 1000, device=device)
    zeros, ones = torch.zeros(2, device=device), torch.ones(2, device=device)
    coefficients = NoiseCoefficients(alphas.sqrt()[timesteps], (1 - alphas).sqrt()[timesteps], zeros, ones)

    def eager() -> Any:
        drawn = torch.randn_like(latents)
        root = alphas.to(latents.dtype)[timesteps].sqrt().reshape(-1, 1, 1, 1)
        rest = (1 - alphas.to(latents.dtype)[timesteps]).sqrt().reshape(-1, 1, 1, 1)
        return root * latents + rest * drawn, drawn

    return Case(eager, lambda: noise(latents, coefficients, seed=1, step=1, sample_ids=timesteps))


def loss_case(size: str, device: str) -> Case:
    """Loss of one instance and one prior sample with a weight each, and its gradient."""
    prediction = torch.empty(LATENTS[size], device=device, dtype=torch.bfloat16).normal_().requires_grad_()
    target = torch.empty(LATENTS[size], device=device).normal_()
    weights = torch.ones(2, device=device)

    def eager() -> Any:
        losses = torch.nn.functional.mse_loss(prediction.float(), target, reduction="none").mean((1, 2, 3))
        instance, prior = (losses * weights).chunk(2)
        return torch.autograd.grad(instance.mean() + prior.mean(), prediction)

    def fused() -> Any:
        loss = diffusion_loss(prediction, target, weights, num_instance=1)
        return torch.autograd.grad(loss.total, prediction)

    return Case(eager, fused)


def norm_case(size: str, device: str) -> Case:
    """GroupNorm and SiLU, forward and backward."""
    x = torch.empty(FEATURES[size], device=device, dtype=torch.bfloat16).normal_().requires_grad_()
    weight, bias = (torch.ones(x.shape[1], device=device, dtype=x.dtype, requires_grad=True) for _ in range(2))
    grad_output = torch.ones_like(x)

    def run(function: Callable) -> Any:
        return torch.autograd.grad(function(x, 32, weight, bias), (x, weight, bias), grad_output)

    plain = lambda *args: torch.nn.functional.silu(torch.nn.functional.group_norm(*args))  # noqa: E731
    return Case(lambda: run(plain), lambda: run(group_norm_silu))


def geglu_case(size: str, device: str) -> Case:
    """GEGLU, forward and backward."""
    packed = torch.empty(PACKED[size], device=device, dtype=torch.bfloat16).normal_().requires_grad_()
    grad_output = torch.ones((*packed.shape[:-1], packed.shape[-1] // 2), device=device, dtype=packed.dtype)

    def plain(packed: torch.Tensor) -> torch.Tensor:
        hidden, gate = packed.chunk(2, dim=-1)
        return hidden * torch.nn.functional.gelu(gate)

    run = lambda function: torch.autograd.grad(function(packed), packed, grad_output)  # noqa: E731
    return Case(lambda: run(plain), lambda: run(geglu))


def adamw_case(size: str, device: str) -> Case:
    """Step bf16 weights with stochastic rounding: eager with bf16 moments, fused with 8-bit moments."""
    count = NUM_WEIGHTS[size]
    weight, grad, first, second = (torch.zeros(count, device=device, dtype=torch.bfloat16) for _ in range(4))
    codes = [torch.zeros(count, device=device, dtype=torch.uint8) for _ in range(2)]
    state = AdamW8bitState(*codes, *(torch.zeros(count // 256, device=device) for _ in range(2)))
    lr, step = torch.full((), 1e-6, device=device), torch.ones((), dtype=torch.int64, device=device)
    corrections = bias_corrections(step, (0.9, 0.999))

    def eager() -> None:
        first.lerp_(grad, 0.1)
        second.mul_(0.999).addcmul_(grad, grad, value=0.001)
        moved = weight.float().addcdiv_(first.float(), second.float().sqrt_().add_(1e-8), value=-1e-6)
        bits = torch.randint_like(moved, 0, 1 << 16, dtype=torch.int32).add_(moved.view(torch.int32))
        weight.copy_(bits.bitwise_and_(-65536).view(torch.float32))

    def fused() -> Any:
        return adamw8bit_step(weight, grad, state, lr=lr, step=step, corrections=corrections, rounding_seed=1)

    return Case(eager, fused)


CASES = {
    "noise": noise_case,
    "diffusion_loss": loss_case,
    "group_norm_silu": norm_case,
    "geglu": geglu_case,
    "adamw8bit_step": adamw_case,
}


def count(function: Callable[[], Any]) -> tuple[int, int]:
    """Return bytes moved and kernels launched."""
    with TrafficCounter() as counter:
        function()
    return counter.num_bytes, counter.num_launches


def print_counts() -> None:
    """Print bytes and launches, and what the bytes take at least on five cards."""
    print(
        "| size | operator | way | MiB | launches | "
        + " | ".join(f"{card}, µs, estimate" for card in BANDWIDTHS)
        + " |"
    )
    print("|---" * (5 + len(BANDWIDTHS)) + "|")
    for size in LATENTS:
        for name, build in CASES.items():
            for way, function in build(size, "meta")._asdict().items():
                num_bytes, launches = count(function)
                times = " | ".join(f"{num_bytes / bandwidth * 1e6:.1f}" for bandwidth in BANDWIDTHS.values())
                print(f"| {size} | {name} | {way} | {num_bytes / 2**20:.2f} | {launches} | {times} |")


def write_times(path: Path) -> None:
    """Time the fused, the eager and the compiled way on the CUDA device."""
    from triton.testing import do_bench

    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["device", "torch", "size", "operator", "provider", "p20_ms", "median_ms", "p80_ms"])
        for size in LATENTS:
            for name, build in CASES.items():
                case = build(size, "cuda")
                ways = {"triton": case.fused, "eager": case.eager, "torch.compile": torch.compile(case.eager)}
                for provider, function in ways.items():
                    times = do_bench(function, quantiles=[0.2, 0.5, 0.8])
                    writer.writerow([torch.cuda.get_device_name(), torch.__version__, size, name, provider, *times])


def cpu_ways(count: int) -> dict[str, Callable[[], Any]]:
    """Return every way to step fp32 weights with 8-bit states on a CPU, and torch's own AdamW with fp32 states."""
    generator = torch.Generator().manual_seed(0)
    weight, grad = torch.randn(count, generator=generator) * 0.03, torch.randn(count, generator=generator) * 1e-3
    state = init_state(weight)
    lr, step = torch.full((), 1e-6), torch.ones((), dtype=torch.int64)
    corrections = bias_corrections(step, (0.9, 0.999))

    def ours(mode: str) -> None:
        os.environ["LOWMEM_DB_KERNELS"] = mode
        adamw8bit_step(weight, grad, state, lr=lr, step=step, corrections=corrections)

    ways: dict[str, Callable[[], Any]] = {"native": lambda: ours("native"), "eager": lambda: ours("eager")}
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = grad
    ways["torch AdamW, fused, fp32 states"] = torch.optim.AdamW([parameter], lr=1e-6, fused=True).step
    try:
        import bitsandbytes
    except ImportError:
        print("bitsandbytes is not installed, so it is not in the table", file=sys.stderr)
    else:
        parameter = torch.nn.Parameter(weight.clone())
        parameter.grad = grad
        ways["bitsandbytes AdamW8bit"] = bitsandbytes.optim.AdamW8bit([parameter], lr=1e-6).step
    return ways


def write_cpu_times(path: Path, count: int, repeats: int) -> None:
    """Take the processor time of every way on one thread, in turns, and print and write it.

    Processor time and not wall time, because other work on the machine would otherwise be measured with it.
    """
    torch.set_num_threads(1)
    ways = cpu_ways(count)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for name in [*ways, *list(ways) * repeats]:
        start = time.process_time()
        ways[name]()
        times[name].append((time.process_time() - start) / count * 1e9)
    rows = []
    for name, (_, *seconds) in times.items():
        low, median, high = min(seconds), statistics.median(seconds), max(seconds)
        rows.append({"way": name, "ns_per_parameter": round(median, 2), "low": round(low, 2), "high": round(high, 2)})
        print(f"| {name} | {median:.2f} ns of processor time per parameter ({low:.2f} to {high:.2f}) |")
    versions = {name: sys.modules[name].__version__ for name in ("torch", "bitsandbytes") if name in sys.modules}
    environment = {"cpu": cpu_name(), "threads": 1, "parameters": count, "repeats": repeats, "versions": versions}
    path.write_text(json.dumps({"environment": environment, "times": rows}, indent=1) + "\n")


def cpu_name() -> str:
    """Return what the system calls its processor."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> int:
    """Count, and time where asked."""
    parser = argparse.ArgumentParser("python benchmarks/kernels.py", description="Bytes, launches and times.")
    parser.add_argument("--csv", type=Path, help="time on the CUDA device and write this file")
    parser.add_argument("--cpu", type=Path, help="time the optimizer step on one CPU thread and write this file")
    parser.add_argument("--size", type=int, default=NUM_WEIGHTS["SD 1.5"], help="parameters stepped on the CPU")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each way on the CPU")
    arguments = parser.parse_args()
    if arguments.cpu:
        write_cpu_times(arguments.cpu, arguments.size, arguments.repeats)
        return 0
    print_counts()
    if arguments.csv and not torch.cuda.is_available():
        print("no CUDA device: nothing was timed", file=sys.stderr)
        return 2
    if arguments.csv:
        os.environ["LOWMEM_DB_KERNELS"] = "triton"
        write_times(arguments.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
