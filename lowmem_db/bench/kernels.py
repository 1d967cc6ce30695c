"""The stage ``kernels``: the self-test of every kernel, what serves each operator here, and the contract tests."""

from collections.abc import Iterator
from functools import partial

import lowmem_db_kernels

from lowmem_db.bench.contract import contract_tests
from lowmem_db.bench.setting import Setting
from lowmem_db.bench.stage import Measurement, Row, Stage


def _measurements(setting: Setting) -> Iterator[Measurement]:
    for operator in lowmem_db_kernels.registry:
        yield operator, partial(_tested, operator, setting)
    yield "contract tests", partial(contract_tests, setting)


def _tested(operator: str, setting: Setting) -> Row:
    """Let the dispatcher choose, which runs the self-test of what it would choose.

    Raises:
        AssertionError: The self-test failed, or nothing can serve.
    """
    status = next(each for each in lowmem_db_kernels.status(setting.device) if each.op == operator)
    if status.backend == "unavailable" or "self-test failed" in status.reason:
        raise AssertionError(status.reason)
    return {"backend": status.backend, "reason": status.reason}


STAGE = Stage(name="kernels", rows="kernels", limit_seconds=60.0, measurements=_measurements)
