"""The stage ``bits``: what ends bit for bit alike under each technique.

First, a process that trains the small model of this package is killed (SIGKILL), and what goes on from its checkpoint
ends as what was never interrupted. Then a step of the large model is done twice from one saved state.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from lowmem_db.bench.killed import Process, kill_in_its_steps, started_ahead
from lowmem_db.bench.setting import Setting
from lowmem_db.bench.stage import Measurement, Row, Stage
from lowmem_db.bench.steps import Steps, first_difference
from lowmem_db.bench.strategies import TECHNIQUES, strategy, techniques
from lowmem_db.storage.run_folder import RunFolder

_RESOLUTION = 256


def _measurements(setting: Setting) -> Iterator[Measurement]:
    killed = techniques(setting)[: 1 if setting.tiny else None]
    with started_ahead(len(killed)) as process:
        for name in killed:
            yield f"{name}, killed", partial(_resumed, replace(setting, tiny=True), name, process)
    for name in techniques(setting):
        yield name, partial(_repeated, setting, name)


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


def _resumed(setting: Setting, name: str, process: Callable[[], Process]) -> Row:
    """Kill a process in its steps, go on from its newest checkpoint, and do as many steps without a break.

    Raises:
        RuntimeError: The process ended by itself.
        ValueError: A tensor differs; the message names the first.
    """
    make = partial(Steps, strategy(setting, name, TECHNIQUES[name]), setting.device)
    with TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        kill_in_its_steps(process(), setting, name, run)
        resumed = make()
        resumed.resume(run)
    saved = resumed.number
    resumed()
    unbroken = make()
    while unbroken.number < resumed.number:
        unbroken()
    if (differs := first_difference(unbroken.state(), resumed.state())) is not None:
        raise ValueError(f"{differs} differs after a kill behind step {saved}")
    return {"same_bits": True, "killed_behind_step": saved}


STAGE = Stage(name="bits", rows="strategies", limit_seconds=90.0, measurements=_measurements)
