"""The reference of the fields is the one that the code makes."""

from pathlib import Path

from lowmem_db.config.loading import field_paths
from tools.reference import render

REFERENCE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_reference_is_up_to_date() -> None:
    assert REFERENCE.read_text(encoding="utf-8") == render()


def test_reference_explains_every_field() -> None:
    rows = [line.split(" | ") for line in render().splitlines() if line.startswith("| `")]
    rows = [row for row in rows if not row[0].startswith("| `--")]
    explained = {row[0].strip("| `") for row in rows if len(row) == 3 and len(row[2]) > 10}
    assert explained == set(field_paths())
