"""A folder without a manifest differs in nothing; one with another manifest says in what."""

from pathlib import Path

from lowmem_db.engine.manifest import differences, write_manifest


def test_what_differs_is_returned_with_both_values(tmp_path: Path) -> None:
    assert differences(tmp_path, {"seed": 1}) == {}
    write_manifest(tmp_path, {"seed": 1, "prompt": "a dog", "old": 3})
    assert differences(tmp_path, {"seed": 1, "prompt": "a dog"}) == {}
    assert differences(tmp_path, {"seed": 2, "new": 5}) == {"seed": (1, 2), "new": (None, 5)}
