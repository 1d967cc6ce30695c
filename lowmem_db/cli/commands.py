"""The list of commands. Nothing here imports torch."""

import logging

import typer

from lowmem_db import environment, nvidia
from lowmem_db.cli import bench, doctor, evaluate, export, generate, identifiers, plan, prepare, report, train
from lowmem_db.console import warn

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
app.command("report")(report.report)
app.command("doctor")(doctor.doctor)
app.command("bench")(bench.bench)


def run_command() -> None:
    """Run the command line, and show what the packages log."""
    environment.quiet_libraries()
    nvidia.set_variables()
    logging.getLogger("lowmem_db").addHandler(_WarningHandler())
    app()


class _WarningHandler(logging.Handler):
    """Shows what the packages log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record as a warning."""
        warn(record.getMessage())
