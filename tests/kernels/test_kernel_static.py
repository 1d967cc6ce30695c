import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from lowmem_db_kernels._triton import jit, tl

triton = pytest.importorskip("triton")
static = import_module("tools.kernels_static.check")
ROOT = Path(__file__).parents[2]
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
speaks_to_compiler = pytest.mark.skipif(TRITON < (3, 3), reason="the tool knows the compiler of Triton 3.3 and later")


@pytest.fixture
def build():
    return static.Build(
        kernel="geglu", architecture=86, dtype="bf16", registers=40, stack=0, local=0, shared=0, atomics=0,
        loads={"128": 2}, stores={"128": 1}, instructions=400, per_element=50.0,
    )  # fmt: skip


def test_the_figures_of_a_good_build_break_no_bar(build):
    assert static.violations(build, static.SPECS["geglu"]) == []


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        ({"registers": 65}, "65 registers"),
        ({"stack": 8}, "stack of 8"),
        ({"local": 1}, "1 local"),
        ({"atomics": 1}, "1 atomics"),
        ({"shared": 20000}, "20000 bytes of shared"),
        ({"loads": {"128": 1, "16": 8}}, "1 loads of 128 bits"),
        ({"stores": {"64": 2}}, "0 stores of 128 bits"),
        ({"per_element": 900.0}, "900.0 instructions"),
    ],
)
def test_every_bar_can_break(build, change, clause):
    broken = static.violations(static.Build(**{**vars(build), **change}), static.SPECS["geglu"])
    assert any(clause in text for text in broken)


@jit
def attribute_of_a_number_kernel(result_ptr, count):
    tl.store(result_ptr, count.to(tl.float32))


@speaks_to_compiler
def test_an_attribute_of_an_integer_argument_is_noticed():
    """A launch makes a constant of an argument that is 1, and a constant has no such attribute."""
    spec = static.Spec(name="", kernel=attribute_of_a_number_kernel, constants={}, dtypes=("fp32",))
    assert static.compile_for(spec, 75, "fp32")
    assert "has no attribute 'to'" in (static.failure_with_ones(spec) or "")


def test_every_kernel_has_a_spec():
    """A kernel that is not compiled here would be found wrong on the first card only."""
    names = ("adamw8bit_triton", "diffusion_loss", "geglu", "group_norm_silu_kernels", "noise")
    kernels = {
        id(kernel)
        for name in names
        for attribute, kernel in vars(import_module(f"lowmem_db_kernels.{name}")).items()
        if attribute.endswith("_kernel") and hasattr(kernel, "arg_names")
    }
    assert len(kernels) >= 12
    assert kernels == {id(spec.kernel) for spec in static.SPECS.values()}


def figures(output, *arguments):
    command = [sys.executable, "-m", "tools.kernels_static", "--check", "--output", str(output), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    return json.loads(output.read_text())["builds"]


@speaks_to_compiler
def test_bars_hold_for_one_kernel_on_one_card(tmp_path):
    """`.ci/run` checks all of them, with `make kernels-static`."""
    builds = figures(tmp_path / "kernels.json", "--only", "geglu", "--architectures", "86", "--jobs", "1")
    assert {(build["kernel"], build["architecture"]) for build in builds} == {
        (name, 86) for name in static.SPECS if "geglu" in name
    }


@speaks_to_compiler
@pytest.mark.slow
def test_all_bars_hold_for_every_card(tmp_path):
    builds = figures(tmp_path / "kernels.json")
    assert {build["architecture"] for build in builds} == set(static.ARCHITECTURES)
    assert {build["kernel"] for build in builds} == set(static.SPECS)
