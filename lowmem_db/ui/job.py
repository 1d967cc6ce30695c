"""A process that runs commands of this package one after the other, whatever becomes of the page that started it.

python -m lowmem_db.ui.job FOLDER
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from filelock import FileLock

COMMANDS, ENDED, LOCK, LOG, STOP = "commands.json", "ended.json", ".lock", "log.txt", "stop"
STARTED = "started"
_EVERY_SECONDS = 0.2


def run_job(folder: Path) -> None:
    """Run the commands that stand in a folder; write their output, and how the last one ended, into it."""
    with FileLock(folder / LOCK):
        (folder / STARTED).touch()
        code = 0
        for number, command in enumerate(json.loads((folder / COMMANDS).read_text(encoding="utf-8"))):
            if (code := _run(folder, number, command)) != 0:
                break
        temporary = folder / "ended.new"
        temporary.write_text(json.dumps({"code": code}), encoding="utf-8")
        temporary.replace(folder / ENDED)


def _run(folder: Path, number: int, command: list[str]) -> int:
    with output_file(folder, number).open("wb") as out, (folder / LOG).open("ab") as log:
        started = subprocess.Popen(
            [sys.executable, "-m", "lowmem_db", *command], stdin=subprocess.DEVNULL, stdout=out, stderr=log
        )
        is_asked = False
        while (code := started.poll()) is None:
            time.sleep(_EVERY_SECONDS)
            if not is_asked and (folder / STOP).exists():
                started.terminate()
                is_asked = True
        return code


def output_file(folder: Path, number: int) -> Path:
    """Return the file with the standard output of a command."""
    return folder / f"output-{number}.txt"


if __name__ == "__main__":
    run_job(Path(sys.argv[1]))
