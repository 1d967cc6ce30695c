"""What is printed steers no terminal, and a terminal that is gone ends no run."""

import errno
import io
import os
import sys

import pytest

from lowmem_db.console import console, printable, progress, say, warn


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[bold]dog[/bold] :dog:", "[bold]dog[/bold] :dog:"), ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"), ("a\rb\bc", "a\\rb\\x08c"), ("\x9b31m", "\\x9b31m"),
        ("gpj\u202e.exe", "gpj\\u202e.exe"), ("na\udce9", "na\\udce9"), ("two\nlines", "two\nlines"),
        ("süß 犬 🐕", "süß 犬 🐕"), ("\x00", "\\x00"), ("[/]", "[/]"), ("{0} %s", "{0} %s"),
    ],
)  # fmt: skip
def test_what_steers_a_terminal_is_shown(text: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printable(text) == shown
    say(text)
    warn(text)
    assert capsys.readouterr().err == f"{shown}\nwarning: {shown}\n"


class Gone(io.StringIO):
    """A terminal that was closed."""

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def flush(self) -> None:
        self.write("")


def test_a_closed_terminal_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Gone())
    say("lost")
    with progress() as bar:
        bar.add_task("training", total=3)
        warn("lost too")


@pytest.mark.parametrize("encoding", ["cp1252", "cp932", "ascii"])
def test_a_narrow_encoding_shows_what_it_lacks(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(content, encoding=encoding))
    say("█ 猫 ü")
    sys.stderr.flush()
    shown = {"cp1252": "\\u2588 \\u732b ü\n", "cp932": "\\u2588 猫 \\xfc\n", "ascii": "\\u2588 \\u732b \\xfc\n"}
    assert content.getvalue().decode(encoding) == shown[encoding]


def test_remarks_beside_a_progress_bar_are_printed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.StringIO()
    monkeypatch.setattr(sys, "stderr", content)
    monkeypatch.setattr(console, "_force_terminal", True)
    with progress() as bar:
        bar.add_task("training", total=3)
        say("a remark")
        sys.stderr.write("from elsewhere\n")
    assert content.getvalue().count("a remark") == 1
    assert content.getvalue().count("from elsewhere") == 1
