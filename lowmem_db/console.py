"""What a person sees: remarks and progress, on standard error, so that standard output holds results alone."""

import errno
import re
import sys
from collections.abc import Iterable
from typing import IO, Any, TypeVar, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_Item = TypeVar("_Item")
_TERMINAL_IS_GONE = {errno.EIO, errno.EPIPE, errno.EBADF, errno.ESHUTDOWN}
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]")


class _StandardError:
    """Standard error as it is now; what is written after its terminal was closed is lost, and the run goes on."""

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
    """Return standard error itself, also while a progress bar stands in its place."""
    return getattr(sys.stderr, "rich_proxied_file", sys.stderr)


console = Console(file=cast("IO[str]", _StandardError()), highlight=False, soft_wrap=True, emoji=False)


def printable(text: str) -> str:
    """Return a text with everything visible that would steer a terminal: names of files may hold it."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(message: str) -> None:
    """Print one remark."""
    console.print(printable(message), markup=False)


def warn(message: str) -> None:
    """Print one warning."""
    console.print("warning: " + printable(message), markup=False, style="yellow")


def track(items: Iterable[_Item], description: str, total: int) -> Iterable[_Item]:
    """Yield items under a progress bar; without a terminal, nothing but the items."""
    with progress() as bar:
        yield from bar.track(items, total=total, description=description)


def progress(*extra: str) -> Progress:
    """Return a progress bar; ``extra`` are further columns in rich's markup."""
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
