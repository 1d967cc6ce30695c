"""The picture of the rooms shows the rooms as they are."""

from tools.rooms import ROOT, layers, purpose, render


def test_picture_is_up_to_date() -> None:
    assert (ROOT / "docs" / "images" / "rooms.svg").read_text(encoding="utf-8") == render(), (
        "draw it again: python -m tools.rooms docs/images/rooms.svg"
    )


def test_every_room_says_what_it_is_for() -> None:
    rooms = [room for layer in layers() for room in layer]
    assert all(purpose(room) for room in rooms)
    package = ROOT / "lowmem_db"
    there = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert set(rooms) == there - {"__init__", "__main__"}
