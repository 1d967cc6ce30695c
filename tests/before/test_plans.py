"""Every file in ``configs/`` is planned as it was before the code was rearranged."""

import json

import pytest

from tests.before.make_plans import CONFIGS, TABLE, plan

EXPECTED = json.loads(TABLE.read_text())
QUICK = "demo"


def test_table_has_every_configuration_that_says_how_memory_is_saved() -> None:
    """What the others do is up to the planner."""
    fixed = {file.stem for file in CONFIGS.glob("*.yaml") if "\nmemory:" in file.read_text() or file.stem == "demo"}
    assert EXPECTED.keys() == fixed


@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.long) for name in EXPECTED]
)
def test_configuration_is_planned_as_before(name: str) -> None:
    found, expected = plan(CONFIGS / f"{name}.yaml"), EXPECTED[name]
    came_later = {field for field in found["strategy"] if field not in expected["strategy"]}
    plain = (False, 0, "device")
    assert all(found["strategy"].pop(field) in plain for field in came_later), "a technique that the file does without"
    assert found.pop("seconds_per_step") > 0.0  # its rule has changed: launches by the host, copies beside the backward
    assert found == {field: value for field, value in expected.items() if field != "seconds_per_step"}
