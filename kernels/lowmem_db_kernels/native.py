"""Compile a C++ source of this package on first use, and cache the library by its content.

Only a plain C interface is compiled, with the system's compiler and without torch's headers; this takes a second or
two, once. The key is made of the source, the flags and all macros that the compiler predefines, which include its
version and the processor's instruction set.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

COMPILERS = ("c++", "g++", "clang++")
# Without contraction or any flag that changes arithmetic: results are compared bit for bit. The last two only drop
# errno and floating-point exceptions, which would prevent vector instructions.
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC",
)  # fmt: skip
_LINK_FLAGS = ("-shared", "-pthread")
_TIMEOUT_SECONDS = 300
_SOURCES = Path(__file__).parent


class NativeUnavailableError(RuntimeError):
    """A native library cannot be compiled or loaded on this machine."""


def cache_folder() -> Path:
    """Return the folder of compiled libraries.

    Returns:
        `lowmem_db_kernels` in the environment's `XDG_CACHE_HOME`, or in `~/.cache`.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowmem_db_kernels"


@lru_cache
def load(source_name: str) -> ctypes.CDLL:
    """Load a library, compiling it if it is not in the cache.

    Args:
        source_name: Name of a C++ file of this package.

    Returns:
        The library.

    Raises:
        NativeUnavailableError: There is no compiler, or it fails, or the library cannot be written or loaded.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NativeUnavailableError(f"no C++ compiler found (looked for {', '.join(COMPILERS)})")
    source = _SOURCES / source_name
    try:
        library = cache_folder() / f"{source.stem}-{_content_key(compiler, source)}.so"
        if not library.exists():
            _compile(compiler, source, library)
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError) as error:
        raise NativeUnavailableError(f"{source_name} cannot be compiled or loaded: {error}") from error


def _content_key(compiler: str, source: Path) -> str:
    macros = _run(compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull)
    content = "\0".join((source.read_text(encoding="utf-8"), *FLAGS, *_LINK_FLAGS, macros))
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _compile(compiler: str, source: Path, library: Path) -> None:
    """Compile to a temporary file and rename it, so that another process never loads an incomplete one."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        output = Path(folder) / library.name
        _run(compiler, *FLAGS, *_LINK_FLAGS, str(source), "-o", str(output))
        output.replace(library)


def _run(*command: str) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{command[0]} did not finish within {_TIMEOUT_SECONDS} s") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"compile failed: {command[0]}: {error.stderr.strip()[-500:]}") from error
    return run.stdout
