import os
import shutil
import subprocess
import sys

import pytest
from lowmem_db_kernels import native
from lowmem_db_kernels.native import NativeUnavailableError

SOURCE = 'extern "C" int answer() { return 42; }\n'
NEEDS_COMPILER = pytest.mark.skipif(not any(map(shutil.which, native.COMPILERS)), reason="no C++ compiler")


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Let the package's sources and its cache lie in a temporary folder; return the path of a small source."""
    native.load.cache_clear()
    monkeypatch.setattr(native, "_SOURCES", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    yield path
    native.load.cache_clear()


@NEEDS_COMPILER
def test_a_library_is_compiled_once(source, monkeypatch):
    assert native.load("answer.cpp").answer() == 42
    native.load.cache_clear()
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))
    assert native.load("answer.cpp").answer() == 42
    assert [path.suffix for path in native.cache_folder().iterdir()] == [".so"]


@NEEDS_COMPILER
def test_another_source_or_flag_is_another_library(source, monkeypatch):
    native.load("answer.cpp")
    native.load.cache_clear()
    source.write_text(SOURCE.replace("42", "43"))
    assert native.load("answer.cpp").answer() == 43
    native.load.cache_clear()
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-DUNUSED"))
    native.load("answer.cpp")
    assert len(list(native.cache_folder().iterdir())) == 3


@NEEDS_COMPILER
def test_a_source_that_does_not_compile_is_named_with_the_compilers_words(source):
    source.write_text("this is no C++\n")
    with pytest.raises(NativeUnavailableError, match=r"answer\.cpp cannot .*: compile failed: .*error"):
        native.load("answer.cpp")
    assert list(native.cache_folder().iterdir()) == []


@NEEDS_COMPILER
def test_a_cache_that_cannot_be_written_is_a_reason(source, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))  # a file
    with pytest.raises(NativeUnavailableError, match=r"answer\.cpp cannot be compiled or loaded"):
        native.load("answer.cpp")


def test_no_compiler_is_a_reason(source, monkeypatch):
    monkeypatch.setenv("PATH", str(source.parent))
    with pytest.raises(NativeUnavailableError, match=r"no C\+\+ compiler found \(looked for c\+\+, g\+\+, clang\+\+\)"):
        native.load("answer.cpp")


def run_without_compiler(mode, tmp_path):
    program = (
        "import torch, lowmem_db_kernels as k\n"
        "param = torch.ones(5000)\n"
        "k.adamw8bit_step(param, torch.ones(5000), k.init_state(param), lr=1e-3, step=1)\n"
        "print(next(row for row in k.status('cpu') if row.op == 'adamw8bit_step'))\n"
    )
    environment = os.environ | {"PATH": str(tmp_path), "LOWMEM_DB_KERNELS": mode}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)


def test_the_package_works_without_a_compiler_and_says_so(tmp_path):
    run = run_without_compiler("auto", tmp_path)
    assert run.returncode == 0, run.stderr
    assert "backend='eager'" in run.stdout
    assert "no C++ compiler found" in run.stdout


def test_an_explicit_request_without_a_compiler_is_an_error(tmp_path):
    run = run_without_compiler("native", tmp_path)
    assert run.returncode == 1
    assert "LOWMEM_DB_KERNELS=native, but this is not possible for adamw8bit_step: no C++ compiler found" in run.stderr
