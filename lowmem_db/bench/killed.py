"""A process that trains until it is killed: ``python -m lowmem_db.bench.killed DEVICE TECHNIQUE FOLDER``."""

import subprocess
import sys
import time
from pathlib import Path

import torch

from lowmem_db.bench.setting import Setting
from lowmem_db.bench.steps import Steps
from lowmem_db.bench.strategies import TECHNIQUES, strategy
from lowmem_db.storage.run_folder import RunFolder

_NUM_SAVED = 2  # checkpoints before the kill
_MOST_STEPS = 100  # by which it ends if nobody kills it
_POLL_SECONDS = 0.02


def kill_in_its_steps(setting: Setting, technique: str, run: RunFolder) -> None:
    """Start such a process, and kill it when it has saved two checkpoints and goes on.

    Args:
        setting: Where it steps.
        technique: The name of a technique.
        run: Its checkpoints.

    Raises:
        RuntimeError: It ended before; the message has its last words.
    """
    command = [sys.executable, "-m", __name__, str(setting.device), technique, str(run.root)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while len(run.complete_steps()) < _NUM_SAVED and child.poll() is None:
            time.sleep(_POLL_SECONDS)
        ended = child.poll()
    finally:
        child.kill()
        _, said = child.communicate()
    if ended is not None:
        last = (said.strip().splitlines() or ["nothing"])[-1]
        raise RuntimeError(f"the process to be killed ended by itself with exit code {ended}, and said: {last}")


def _step_and_save(device: str, technique: str, folder: str) -> None:
    setting = Setting(torch.device(device), tiny=True)
    step = Steps(strategy(setting, technique, TECHNIQUES[technique]), setting.device)
    while step.number < _MOST_STEPS:
        step()
        step.save(RunFolder(Path(folder)))


if __name__ == "__main__":
    _step_and_save(*sys.argv[1:])
