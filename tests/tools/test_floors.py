"""``constraints-floors.txt`` holds the oldest version of every package that ``pyproject.toml`` allows."""

import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
ROOT = Path(__file__).parents[2]


def oldest(requirements: Iterable[str]) -> set[tuple[str, Version]]:
    """Return every package with its oldest version; a package with two of them is there twice."""
    found = set()
    for requirement in map(Requirement, requirements):
        if requirement.name != "lowmem-db":  # an extra that holds others
            versions = [Version(one.version) for one in requirement.specifier if one.operator in {">=", "=="}]
            assert len(versions) == 1, f"{requirement}: has no oldest version"
            found.add((requirement.name, versions[0]))
    return found


def lines() -> list[str]:
    text = (ROOT / "constraints-floors.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if not line.startswith("#")]


def test_floors_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    pinned = [line.partition("  # ")[0] for line in lines()]
    assert all("==" in line for line in pinned)
    assert oldest(pinned) == oldest(requirement for one in lists for requirement in one)


def test_each_says_what_it_is_for() -> None:
    assert [line for line in lines() if not line.partition("  # ")[2]] == []


def test_one_extra_serves_every_command_on_a_card() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert "lowmem-db[8bit,evaluation,heic,lora,t5]" in extras["cuda"]
