"""``lowmem-db``: the commands, and the exit codes of their errors. Nothing here imports torch."""

import logging
import signal
import sys
from types import FrameType

import typer

from lowmem_db import environment
from lowmem_db.cli import doctor, evaluate, export, generate, identifiers, plan, prepare, train
from lowmem_db.console import console, warn
from lowmem_db.errors import LowmemDbError, RunInterrupted

app = typer.Typer(
    name="lowmem-db",
    help="Full DreamBooth fine-tuning of diffusion models inside the memory of a gaming GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_FREE_ARGUMENTS = {"ignore_unknown_options": True}
app.command("train", context_settings=_FREE_ARGUMENTS)(train.train)
app.command("plan", context_settings=_FREE_ARGUMENTS)(plan.plan)
app.command("prepare", context_settings=_FREE_ARGUMENTS)(prepare.prepare)
app.command("generate")(generate.generate)
app.command("evaluate")(evaluate.evaluate)
app.command("export")(export.export)
app.command("identifiers")(identifiers.identifiers)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Run a command; an error that the user can mend is printed without a traceback."""
    environment.quiet_libraries()
    logging.getLogger("lowmem_db").addHandler(_WarningHandler())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        app()
    except (LowmemDbError, RunInterrupted) as error:
        for line in str(error).splitlines():
            console.print(f"error: {line}" if error.exit_code == 2 else line, markup=False)
        sys.exit(error.exit_code)


class _WarningHandler(logging.Handler):
    """Shows what the packages log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record as a warning."""
        warn(record.getMessage())


def _interrupt(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    raise RunInterrupted(f"{name}: stopped; run the same command again, with --resume where there is a checkpoint")
