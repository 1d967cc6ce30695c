"""Remarks and progress bars for people, on standard error; standard output holds only results."""

import errno
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_Item = TypeVar("_Item")
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


def printable(text: str) -> str:
    """Return a text with its control characters escaped: file names may contain some."""
    return _CONTROL_CHARACTERS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def quoted(path: Path) -> str:
    """Return a path as it is written in a command, in quotation marks if the shell needs them."""
    return subprocess.list2cmdline([str(path)]) if os.name == "nt" else shlex.quote(str(path))


def say(message: str) -> None:
    """Print one remark."""
    console.print(printable(message), markup=False)


def warn(message: str) -> None:
    """Print one warning."""
    console.print("warning: " + printable(message), markup=False, style="yellow")


def track(items: Iterable[_Item], description: str, total: int) -> Iterable[_Item]:
    """Yield items under a progress bar, which is shown only on a terminal."""
    with progress() as bar:
        yield from bar.track(items, total=total, description=description)


def progress(*extra: str) -> Progress:
    """Return a progress bar; ``extra`` are additional columns in rich's markup."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *(TextColumn(column) for column in extra),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
