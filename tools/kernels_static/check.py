"""Compile every kernel for every card without a GPU, and check what came out: `python -m tools.kernels_static`.

Triton compiles ahead of time for a named architecture and its wheel carries the disassembler, so registers, stack,
width of the accesses and instructions per element can be read, and held to bars, on any Linux machine. It says nothing
about time. Run it in a process of its own: the interpreter and the compiler exclude each other.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowmem_db_kernels._triton import FP_FUSION, HAS_TRITON, INTERPRETED, triton

from .specs import DTYPES, NUM_WARPS, SPECS, Spec

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
MAX_SHARED_BYTES = 16 * 1024
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)")
_WIDTH = re.compile(r"\.(U8|S8|U16|S16|64|128)(?:\.|$)")
_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}


@dataclass(frozen=True)
class Build:
    """What one kernel became on one architecture.

    Attributes:
        kernel: Name of the spec.
        architecture: Compute capability, two digits.
        dtype: Type of the tensors.
        registers: Per thread.
        stack: Bytes per thread.
        local: Bytes of local memory per thread, or local loads and stores.
        shared: Bytes per program.
        atomics: Atomic instructions.
        loads: Number of global loads by width in bits.
        stores: Number of global stores by width in bits.
        instructions: Instructions of one thread, loops counted once.
        per_element: Instructions for each element of a tile.
    """

    kernel: str
    architecture: int
    dtype: str
    registers: int
    stack: int
    local: int
    shared: int
    atomics: int
    loads: dict[str, int]
    stores: dict[str, int]
    instructions: int
    per_element: float


def compile_for(spec: Spec, architecture: int, dtype: str, *, ones: bool = False) -> bytes:
    """Compile one kernel ahead of time.

    Args:
        spec: The kernel and how it is launched.
        architecture: Compute capability, two digits.
        dtype: Type of the tensors.
        ones: Compile for integer arguments that are all 1, which a launch makes constants.

    Returns:
        The cubin.
    """
    signature, constants, attributes = spec.signature(dtype, ones=ones)
    source = triton.compiler.ASTSource(fn=spec.kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    options = {"num_warps": NUM_WARPS, "num_stages": 1, "enable_fp_fusion": FP_FUSION}
    return triton.compile(source, target=target, options=options).asm["cubin"]


def inspect(spec: Spec, architecture: int, dtype: str) -> Build:
    """Compile one kernel and read its cubin.

    Args:
        spec: The kernel and how it is launched.
        architecture: Compute capability, two digits.
        dtype: Type of the tensors.

    Returns:
        The figures.
    """
    cubin = compile_for(spec, architecture, dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        resources = _run("cuobjdump", "-res-usage", str(path))
        listing = _run("nvdisasm", "-c", str(path))
    opcodes = [match[1] for line in listing.splitlines() if (match := _INSTRUCTION.match(line))]
    opcodes = [opcode for opcode in opcodes if opcode != "NOP"]
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", resources)}
    local_accesses = sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes)
    return Build(
        kernel=spec.name,
        architecture=architecture,
        dtype=dtype,
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"] + local_accesses,
        shared=usage["SHARED"],
        atomics=sum(opcode.startswith(("ATOM", "RED.")) for opcode in opcodes),
        loads=_widths(opcodes, "LDG"),
        stores=_widths(opcodes, "STG"),
        instructions=len(opcodes),
        per_element=round(len(opcodes) / spec.elements_per_thread, 1),
    )


def failure_with_ones(spec: Spec) -> str | None:
    """Compile one kernel for integer arguments that are all 1: an attribute of a number that is none any more fails.

    Args:
        spec: The kernel and how it is launched.

    Returns:
        None, or what the compiler said.
    """
    try:
        compile_for(spec, ARCHITECTURES[0], (spec.dtypes or DTYPES)[0], ones=True)
    except triton.errors.TritonError as error:
        return str(error)
    return None


def violations(build: Build, spec: Spec) -> list[str]:
    """Say which bars a build breaks.

    Args:
        build: The figures.
        spec: The bars.

    Returns:
        One clause per broken bar.
    """
    narrow_loads, narrow_stores = (_count_below(widths, 64) for widths in (build.loads, build.stores))
    wide_loads, wide_stores = (widths.get("128", 0) for widths in (build.loads, build.stores))
    bars = [
        (build.stack == 0, f"stack of {build.stack} bytes"),
        (build.local == 0, f"{build.local} local accesses"),
        (build.atomics == 0, f"{build.atomics} atomics"),
        (build.shared <= MAX_SHARED_BYTES, f"{build.shared} bytes of shared memory"),
        (build.registers <= spec.max_registers, f"{build.registers} registers, {spec.max_registers} allowed"),
        (build.per_element <= spec.max_per_element, f"{build.per_element} instructions per element"),
        (wide_loads >= spec.wide_loads, f"{wide_loads} loads of 128 bits, {spec.wide_loads} expected"),
        (wide_stores >= spec.wide_stores, f"{wide_stores} stores of 128 bits, {spec.wide_stores} expected"),
        (narrow_loads <= spec.narrow_loads, f"{narrow_loads} loads below 64 bits, {spec.narrow_loads} allowed"),
        (narrow_stores <= spec.narrow_stores, f"{narrow_stores} stores below 64 bits, {spec.narrow_stores} allowed"),
    ]
    return [clause for holds, clause in bars if not holds]


def build_all(jobs: int, only: str = "", architectures: Sequence[int] = ARCHITECTURES) -> list[Build]:
    """Compile every spec for each architecture and dtype.

    Args:
        jobs: Processes.
        only: Compile the kernels whose name contains this.
        architectures: Compute capabilities, such as 86.

    Returns:
        The figures, in the order of the specs.
    """
    work = [
        (name, architecture, dtype)
        for name, spec in SPECS.items()
        if only in name
        for dtype in (spec.dtypes or DTYPES)
        for architecture in architectures
    ]
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(_inspect_named, *zip(*work, strict=True), chunksize=4))


def table(builds: list[Build]) -> str:
    """Format the range of each kernel's figures over the architectures.

    Args:
        builds: The figures.

    Returns:
        A Markdown table, a row per kernel and dtype.
    """
    rows = [
        "| kernel | dtype | registers | shared | loads | stores | instructions/element |",
        "|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((build.kernel, build.dtype) for build in builds):
        group = [build for build in builds if (build.kernel, build.dtype) == key]
        ampere = next((build for build in group if build.architecture == 86), group[0])
        figures = [_range(build.registers for build in group), _range(build.shared for build in group)]
        figures += [_format(ampere.loads), _format(ampere.stores), _range(build.per_element for build in group)]
        rows.append(f"| {key[0]} | {key[1]} | {' | '.join(figures)} |")
    return "\n".join(rows)


def main() -> int:
    """Build, print the table, write the file and, if asked, hold the figures to their bars.

    Returns:
        1 where a bar is broken and `--check` was given.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tools.kernels_static", description="Compile and check every kernel."
    )
    parser.add_argument("--check", action="store_true", help="fail where a bar is broken")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--only", default="", help="compile the kernels whose name contains this")
    parser.add_argument(
        "--architectures", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, metavar="SM",
        help=f"compile for these compute capabilities (default: {' '.join(map(str, ARCHITECTURES))})",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    if not HAS_TRITON or INTERPRETED:
        print("this needs Triton, and not as an interpreter (TRITON_INTERPRET)", file=sys.stderr)
        return 2
    builds = build_all(arguments.jobs, arguments.only, arguments.architectures)
    failures = {name: failure_with_ones(spec) for name, spec in SPECS.items() if arguments.only in name}
    print(table(builds))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(asdict(build)) for build in builds)
        arguments.output.write_text(f'{{"triton": "{triton.__version__}", "builds": [\n{lines}\n]}}\n')
    broken = [
        f"{build.kernel}, {build.dtype}, sm_{build.architecture}: {clause}"
        for build in builds
        for clause in violations(build, SPECS[build.kernel])
    ]
    broken += [f"{name}, integer arguments of 1: {failure}" for name, failure in failures.items() if failure]
    print(f"{len(builds)} builds, {len(broken)} bars broken", *broken, sep="\n")
    return 1 if broken and arguments.check else 0


def _inspect_named(name: str, architecture: int, dtype: str) -> Build:
    return inspect(SPECS[name], architecture, dtype)


def _run(tool: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def _widths(opcodes: list[str], prefix: str) -> dict[str, int]:
    """Count global accesses by width; an opcode that names none is of 32 bits."""
    widths = (_WIDTH.search(opcode) for opcode in opcodes if opcode.startswith(prefix))
    counts = Counter(_BITS[match[1]] if match else 32 for match in widths)
    return {str(width): counts[width] for width in sorted(counts, reverse=True)}


def _count_below(widths: dict[str, int], bits: int) -> int:
    return sum(count for width, count in widths.items() if int(width) < bits)


def _range(values: Any) -> str:
    values = list(values)
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)}-{max(values)}"


def _format(widths: dict[str, int]) -> str:
    return " ".join(f"{count}x{width}" for width, count in widths.items()) or "-"
