"""What people have from before the code was rearranged still works, and gives what it gave.

Everything here was written by ``make.py`` on commit 3706736. Bits are compared on a machine like the one that wrote
them (``record.json`` says which); on any other the rest is compared, and the test then skips itself and says why.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.before.records import (
    DRAWN,
    EVALUATED,
    EXPORTED,
    GENERATED,
    LATER_IN_FINAL,
    cache_of,
    files_of,
    machine,
    metric_rows,
    pixels,
)
from tests.cli.conftest import Run

LEVELS = 3  # of 255 that a pixel may differ where arithmetic rounds otherwise


def skip_bits_of_another_machine(record: dict[str, Any]) -> None:
    if machine() != record["machine"]:
        pytest.skip(f"the bits were written on {record['machine']}; this is {machine()}")


def without_bits(files: dict[str, dict[str, str]]) -> dict[str, str]:
    return {name: file["layout"] for name, file in files.items()}


def assert_drawn_as_before(found: Path, expected: Path, record: dict[str, Any]) -> None:
    allowed = 0 if machine() == record["machine"] else LEVELS
    names = sorted(file.name for file in expected.glob("*.png"))
    assert names
    assert sorted(file.name for file in found.glob("*.png") if file.name != "grid.png") == names
    for name in names:
        assert np.abs(pixels(found / name) - pixels(expected / name)).max() <= allowed, name


@pytest.mark.parametrize("case", ["in_backward", "full", "lora_xl", "lora"])
def test_killed_run_ends_as_the_whole_one_did(case: str, run: Run, root: Path, record: dict[str, Any]) -> None:
    folder, cache, expected = root / "unfinished" / case, cache_of(root), record["cases"][case]
    outcome = run("train", "--resume", f"unfinished/{case}/config.yaml")
    assert outcome.code == 0, outcome.err
    assert cache_of(root) == cache, "something was drawn or encoded again"
    rows = metric_rows(folder)
    assert len(rows) == 6
    for row, before in zip(rows, expected["metrics"], strict=True):
        assert row.keys() == before.keys()
        assert row["loss"] == pytest.approx(before["loss"], rel=1e-3)
    if (samples := root / "expected" / "samples" / case).is_dir():
        assert_drawn_as_before(folder / "samples" / "step-000006", samples, record)
    final = {name: found for name, found in files_of(folder / "final").items() if not name.endswith(LATER_IN_FINAL)}
    assert without_bits(final) == without_bits(expected["final"])
    skip_bits_of_another_machine(record)
    assert final == expected["final"]
    assert rows == expected["metrics"]


@pytest.mark.parametrize("case", ["full", "lora"])
def test_new_run_finds_the_cache(case: str, run: Run, root: Path) -> None:
    cache = cache_of(root)
    outcome = run("prepare", f"unfinished/{case}/config.yaml", "output_dir=another")
    assert outcome.code == 0, outcome.err
    assert cache_of(root) == cache


@pytest.mark.parametrize("source", DRAWN)
def test_images_are_drawn_as_before(source: str, run: Run, root: Path, record: dict[str, Any]) -> None:
    outcome = run("generate", source, *GENERATED, "-o", "drawn")
    assert outcome.code == 0, outcome.err
    assert_drawn_as_before(root / "drawn", root / "expected" / "generate" / source, record)


@pytest.mark.parametrize("case", ["full", "lora"])
def test_scores_are_as_before(case: str, run: Run, root: Path, record: dict[str, Any]) -> None:
    outcome = run("evaluate", f"finished/{case}", *EVALUATED, "-o", "evaluation")
    assert outcome.code == 0, outcome.err
    found, expected = json.loads(outcome.out)["metrics"], record["evaluate"][case]["metrics"]
    assert found.keys() == expected.keys()
    for name, score in expected.items():
        assert found[name]["num_pairs"] == score["num_pairs"]
        if score["value"] is not None:
            assert found[name]["value"] == pytest.approx(score["value"], rel=1e-3), name
    skip_bits_of_another_machine(record)
    assert found == expected


@pytest.mark.parametrize("name", EXPORTED)
def test_exported_file_is_as_before(name: str, run: Run, root: Path, record: dict[str, Any]) -> None:
    outcome = run("export", *EXPORTED[name], "--out", name)
    assert outcome.code == 0, outcome.err
    found = files_of(root / name)
    expected = {file: record["export"][file] for file in found}
    assert expected.keys() == {file for file in record["export"] if Path(file).parts[0] == name}
    assert without_bits(found) == without_bits(expected)
    if name == "lora_merged":
        skip_bits_of_another_machine(record)
    assert found == expected
