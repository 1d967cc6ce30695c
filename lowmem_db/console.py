"""What a person sees: remarks and progress, on standard error, so that standard output holds results alone."""

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
_Item = TypeVar("_Item")


def say(message: str) -> None:
    """Print one remark."""
    console.print(message, markup=False)


def warn(message: str) -> None:
    """Print one warning."""
    console.print("warning: " + message, markup=False, style="yellow")


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
