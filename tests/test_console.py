"""What is printed steers no terminal, and a terminal that is gone ends no run."""

import errno
import io
import os
import signal
import sys
from pathlib import Path

import pytest
from rich.table import Table

from lowmem_db.cli.main import main
from lowmem_db.console import bar_of, console, printable, progress, results, say, warn
from lowmem_db.interruption import stop_signals


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


def test_a_terminal_breaks_lines_between_words_and_a_file_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    content, path = io.StringIO(), "/a/very/long/path/" + "x" * 30 + "/to-a-run"
    monkeypatch.setattr(sys, "stderr", content)
    monkeypatch.setattr(console, "_width", 40)
    said = f"the model of the run is in {path}; draw with it, or export it for another program"
    say(said)
    assert content.getvalue() == f"{said}\n"
    monkeypatch.setattr(console, "_force_terminal", True)
    content.truncate(0)
    say(said)
    lines = content.getvalue().strip("\0\n").splitlines()
    assert " ".join(lines) == said
    assert f"{path};" in lines
    assert max(len(line) for line in lines if path not in line) <= 40


@pytest.mark.parametrize(("encoding", "bar"), [("utf-8", "█" * 7), ("cp932", "#" * 7), ("cp1252", "#" * 7)])
def test_a_bar_is_plain_where_the_encoding_lacks_blocks(encoding: str, bar: str) -> None:
    assert bar_of(0.5, 14, encoding) == bar


@pytest.mark.parametrize("encoding", ["cp1252", "cp932"])
@pytest.mark.parametrize("arguments", [["configs"], ["--help"], ["train", "--help"], ["configs", "demo", "-o", "猫é"]])
def test_no_command_ends_with_a_traceback_in_a_narrow_console(
    tmp_path: Path, encoding: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "argv", ["lowmem-db", *arguments])
    handlers = {number: signal.getsignal(number) for number in stop_signals()}
    with pytest.raises(SystemExit) as ended:
        main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    out.flush()
    assert not ended.value.code
    assert out.buffer.getvalue()
    if arguments[-1] == "猫é":
        assert (tmp_path / "猫é" / "demo.yaml").is_file()


def test_results_take_names_as_they_are_and_escape_what_a_terminal_would_obey(
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = Table("name [red]", title="[bold]photos")
    table.add_row("a[/red]\x1b[31m.png")
    results().print(table)
    results().print(":smile: [link=x]\x07")
    shown = capsys.readouterr().out
    for part in ("name [red]", "[bold]photos", r"a[/red]\x1b[31m.png", r":smile: [link=x]\x07"):
        assert part in shown
    assert "\x1b" not in shown
