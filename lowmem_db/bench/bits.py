"""The stage ``bits``: a step that is done twice from one saved state ends bit for bit alike, under each technique.

Last, a process that trains the small model of this package is killed (SIGKILL), and what goes on from its checkpoint
ends as what was never interrupted.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from lowmem_db.bench.killed import kill_in_its_steps
from lowmem_db.bench.setting import Setting
from lowmem_db.bench.stage import Measurement, Row, Stage
from lowmem_db.bench.steps import Steps, first_difference
from lowmem_db.bench.strategies import TECHNIQUES, strategy, techniques
from lowmem_db.storage.run_folder import RunFolder

_RESOLUTION = 256
_KILLED = ("in_backward", "streamed", "offloaded")


def _measurements(setting: Setting) -> Iterator[Measurement]:
    for name in techniques(setting):
        yield name, partial(_repeated, setting, name)
    for name in _KILLED[:1] if setting.is_small else _KILLED:
        yield f"{name}, killed", partial(_resumed, replace(setting, tiny=True), name)


def _repeated(setting: Setting, name: str) -> Row:
    """Step, save, step, restore, step again.

    Raises:
        ValueError: A tensor differs; the message names the first.
    """
    resolution = None if setting.tiny else _RESOLUTION
    step = Steps(strategy(setting, name, TECHNIQUES[name], resolution=resolution), setting.device)
    step()
    saved = step.state()
    step()
    once = step.state()
    step.restore(saved)
    if (differs := first_difference(saved, step.state())) is not None:
        raise ValueError(f"{differs} is not what was saved")
    step()
    if (differs := first_difference(once, step.state())) is not None:
        raise ValueError(f"{differs} differs between two identical steps")
    return {"same_bits": True}


def _resumed(setting: Setting, name: str = _KILLED[0]) -> Row:
    """Kill a process in its steps, go on from its newest checkpoint, and do as many steps without a break.

    Raises:
        RuntimeError: The process ended by itself.
        ValueError: A tensor differs; the message names the first.
    """
    make = partial(Steps, strategy(setting, name, TECHNIQUES[name]), setting.device)
    unbroken = make()
    with TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        kill_in_its_steps(setting, name, run)
        resumed = make()
        resumed.resume(run)
    saved = resumed.number
    resumed()
    while unbroken.number < resumed.number:
        unbroken()
    if (differs := first_difference(unbroken.state(), resumed.state())) is not None:
        raise ValueError(f"{differs} differs after a kill behind step {saved}")
    return {"same_bits": True, "killed_behind_step": saved}


STAGE = Stage(name="bits", rows="strategies", limit_seconds=70.0, measurements=_measurements)
