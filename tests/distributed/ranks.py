"""Several processes of one run, as a launcher starts them."""

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from lowmem_db.errors import DependencyError, LowmemDbError, RunInterrupted
from lowmem_db.memory import sharding

Fields = Mapping[str, Any]
_SECONDS = 300


def run_ranks(
    size: int, function: Callable[..., object], *arguments: Any, environment: Mapping[str, str] | None = None
) -> list[int | None]:
    """Call a function in processes of one world; return their exit codes, negative for signals."""
    launch = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(
            target=_in_rank,
            args=({**launch, "RANK": str(rank), "LOCAL_RANK": str(rank), **(environment or {})}, function, arguments),
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_SECONDS)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]


def skip_without_fsdp2() -> None:
    """Skip a test that shares a model out where torch is too old for it."""
    try:
        sharding.check()
    except DependencyError as error:
        pytest.skip(str(error))


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def rank() -> int:
    return int(os.environ["RANK"])


def arguments_of(fields: Fields) -> list[str]:
    import json

    return [f"{path}={json.dumps(value)}" for path, value in fields.items()]


def kill_myself() -> None:
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def _in_rank(environment: Mapping[str, str], function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    try:
        function(*arguments)
    except (LowmemDbError, RunInterrupted) as error:
        sys.stderr.write(f"rank {os.environ['RANK']}: {error}\n")
        sys.stderr.flush()
        os._exit(error.exit_code)
    os._exit(0)
