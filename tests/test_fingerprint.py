"""Content keys are equal exactly where the content is."""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_db import fingerprint

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def test_key_of_a_file_is_that_of_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_CHUNK_BYTES", 7)
    for length in (0, 6, 7, 8, 100):
        content = bytes(range(length))
        (tmp_path / "a").write_bytes(content)
        assert fingerprint.of_file(tmp_path / "a") == hashlib.blake2b(content, digest_size=16).hexdigest()


def test_key_of_files_holds_names_and_bytes_in_any_order(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("1")
    two.write_text("2")
    key = fingerprint.of_files([one, two])
    assert fingerprint.of_files([two, one]) == key
    assert fingerprint.of_files(iter([one])) != key
    one.write_text("2")
    two.write_text("1")
    assert fingerprint.of_files([one, two]) != key
    one.write_text("1")
    two.write_text("2")
    assert fingerprint.of_files([one, two]) == key
    assert fingerprint.of_files([one, two.rename(tmp_path / "three")]) != key


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fingerprint.of_file(tmp_path / "nothing")


def same(one: object, other: object) -> bool:
    """Compare as JSON does: true is not 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@given(one=JSON, other=JSON)
def test_keys_of_values_are_equal_where_the_values_are(one: object, other: object) -> None:
    assert (fingerprint.of_values(one) == fingerprint.of_values(other)) == same(one, other)


def test_order_of_keys_does_not_count_and_order_of_values_does() -> None:
    assert fingerprint.of_values({"a": 1, "b": 2}) == fingerprint.of_values({"b": 2, "a": 1})
    assert fingerprint.of_values(1, 2) != fingerprint.of_values(2, 1)
    assert fingerprint.of_values("ab", "c") != fingerprint.of_values("a", "bc")
    assert fingerprint.of_values() != fingerprint.of_values(None)


def test_what_is_no_json_value_is_refused() -> None:
    with pytest.raises(TypeError):
        fingerprint.of_values(Path("a"))
