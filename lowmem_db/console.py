"""Remarks and progress bars for people, on standard error; standard output holds only results."""

import errno
import io
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from lowmem_db.launch import is_first, name_of_process

_Item = TypeVar("_Item")
_listeners: list[Callable[[str, int, int], None]] = []
_TERMINAL_IS_GONE = {errno.EIO, errno.EPIPE, errno.EBADF, errno.ESHUTDOWN}
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]")


class _StandardError:
    """Current standard error; output after its terminal was closed is dropped, and the run continues."""

    def write(self, text: str) -> int:
        try:
            return _stream().write(text)
        except OSError as error:
            if error.errno not in _TERMINAL_IS_GONE:
                raise
            return len(text)
        except UnicodeEncodeError:
            encoding = _stream().encoding
            return _stream().write(text.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self) -> None:
        try:
            _stream().flush()
        except OSError as error:
            if error.errno not in _TERMINAL_IS_GONE:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(_stream(), name)


def _stream() -> Any:
    """Return standard error itself, even while a progress bar replaces it."""
    return getattr(sys.stderr, "rich_proxied_file", sys.stderr)


console = Console(file=cast("IO[str]", _StandardError()), highlight=False, soft_wrap=True, emoji=False)


class _Results(Console):
    """Standard output for tables and texts in which names of files and of cards stand: they are no markup."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def results(*, soft_wrap: bool = False) -> Console:
    """Return standard output for what a command found."""
    return _Results(highlight=False, markup=False, emoji=False, soft_wrap=soft_wrap)


def printable(text: str) -> str:
    """Return a text with its control characters escaped: file names may contain some."""
    return _CONTROL_CHARACTERS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def quoted(path: Path | str) -> str:
    """Return a path or a name as it is written in a command, in quotation marks if the shell needs them."""
    return subprocess.list2cmdline([str(path)]) if os.name == "nt" else shlex.quote(str(path))


def say(message: str) -> None:
    """Print one remark; of several processes only the first one prints any."""
    if is_first():
        _print(printable(message))


def warn(message: str) -> None:
    """Print one warning; of several processes only the first one prints any."""
    if is_first():
        _print("warning: " + printable(message), "yellow")


def complain(message: str) -> None:
    """Print why this process ends."""
    _print(name_of_process() + printable(message))


def _print(text: str, style: str = "") -> None:
    """Print a text; a terminal breaks its lines between words, and never a path or a command in two."""
    if console.is_terminal:
        text = "\n".join(_wrapped(line) for line in text.splitlines())
    console.print(Text(text, style), soft_wrap=True)


def _wrapped(line: str) -> str:
    return textwrap.fill(line, console.width, break_long_words=False, break_on_hyphens=False, replace_whitespace=False)


def no_encoding_errors() -> None:
    """Let standard output and error escape what their encoding lacks, as cp1252 lacks kanji."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def bar_of(fraction: float, width: int, encoding: str) -> str:
    """Return a bar of characters, of plain ones if the encoding lacks blocks."""
    filled = round(fraction * width)
    try:
        "\u2588".encode(encoding)
    except UnicodeEncodeError:
        return "#" * filled
    return "\u2588" * filled


def track(items: Iterable[_Item], description: str, total: int) -> Iterable[_Item]:
    """Yield items under a progress bar, which is shown only on a terminal; listeners hear of it everywhere."""
    with progress() as bar:
        for done, item in enumerate(bar.track(items, total=total, description=description)):
            for listener in _listeners:
                listener(description, done, total)
            yield item


@contextmanager
def listening(listener: Callable[[str, int, int], None]) -> Iterator[None]:
    """Return a context in which a function hears of each item under a progress bar: label, items done, all items."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class TwoLines(Progress):
    """A progress bar (step, percent, time left), and under it a line that the caller sets."""

    details = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the lines, each cut to the width of the terminal."""
        yield from super().get_renderables()
        if self.details:
            yield Text(self.details, no_wrap=True, overflow="ellipsis")


def progress() -> TwoLines:
    """Return a progress bar, which is shown only on a terminal."""
    return TwoLines(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
        transient=True,
        expand=True,
        disable=not (console.is_terminal and is_first()),
    )
