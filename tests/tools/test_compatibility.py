from pathlib import Path

from tools.compatibility import FEATURES, TECHNIQUES, render

DOCUMENT = Path(__file__).parents[2] / "docs" / "memory" / "compatibility.md"


def test_document_is_what_the_code_says() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == render()


def test_every_pair_is_answered_and_refusals_say_the_way_out() -> None:
    text = render()
    assert text.count("| yes ") + text.count("| no (") == len(TECHNIQUES) * len(FEATURES)
    notes = [line for line in text.splitlines() if line[:1].isdigit()]
    assert len(notes) >= 4
    assert all("use" in note or "set" in note or "allowed" in note for note in notes)
