"""The stage ``bits``: a step that is done twice from one saved state ends bit for bit alike, under each technique."""

from collections.abc import Iterator
from functools import partial

from lowmem_db.bench.setting import Setting
from lowmem_db.bench.stage import Measurement, Row, Stage
from lowmem_db.bench.steps import Steps, first_difference
from lowmem_db.bench.strategies import TECHNIQUES, strategy, techniques

_RESOLUTION = 256


def _measurements(setting: Setting) -> Iterator[Measurement]:
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
    if (name := first_difference(saved, step.state()) or "") != "":
        raise ValueError(f"{name} is not what was saved")
    step()
    if (name := first_difference(once, step.state()) or "") != "":
        raise ValueError(f"{name} differs between two identical steps")
    return {"same_bits": True}


STAGE = Stage(name="bits", rows="strategies", limit_seconds=70.0, measurements=_measurements)
