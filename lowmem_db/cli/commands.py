"""The list of commands. Nothing here imports torch."""

import logging
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from lowmem_db import __version__, environment, nvidia
from lowmem_db.cli import (
    bench,
    configs,
    doctor,
    evaluate,
    export,
    gallery,
    generate,
    identifiers,
    new,
    photos,
    plan,
    prepare,
    publish,
    report,
    train,
    ui,
)
from lowmem_db.console import warn
from lowmem_db.errors import ConfigError
from lowmem_db.launch import is_first


class _FreeCommand(TyperCommand):
    """A command that reads flags of other programs itself."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse a word that begins with one dash: ``-hflip`` would be read as ``-h``, and the help as success.

        Raises:
            ConfigError: There is one.
        """
        short = {option for parameter in self.params for option in parameter.opts if len(option) == 2}
        for word in args:
            if len(word) > 2 and word[0] == "-" and word[1].isalpha() and word[:2] not in short:
                raise ConfigError(
                    f"{word}: begins with one dash; flags begin with two (-{word}) and fields with none. If it is the "
                    f"value of the flag before it, join them with =, as in --output_dir={word}"
                )
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="lowmem-db",
    help="Full DreamBooth fine-tuning of diffusion models inside the memory of a gaming GPU.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_FREE_ARGUMENTS = {"ignore_unknown_options": True}
app.command("new")(new.new)
app.command("train", cls=_FreeCommand, context_settings=_FREE_ARGUMENTS)(train.train)
app.command("plan", cls=_FreeCommand, context_settings=_FREE_ARGUMENTS)(plan.plan)
app.command("prepare", cls=_FreeCommand, context_settings=_FREE_ARGUMENTS)(prepare.prepare)
app.command("photos", cls=_FreeCommand, context_settings=_FREE_ARGUMENTS)(photos.photos)
app.command("generate")(generate.generate)
app.command("evaluate")(evaluate.evaluate)
app.command("export")(export.export)
app.command("gallery")(gallery.gallery)
app.command("identifiers")(identifiers.identifiers)
app.command("publish")(publish.publish)
app.command("report")(report.report)
app.command("ui")(ui.ui)
app.command("doctor")(doctor.doctor)
app.command("bench")(bench.bench)
app.command("configs")(configs.configs)


def _show_version(is_asked: bool) -> bool:
    if is_asked:
        typer.echo(f"lowmem-db {__version__}")
        raise typer.Exit
    return is_asked


_OF_ALL_PROCESSES = {"train", "prepare", "generate"}


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Print the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Take the options that belong to no command; of several processes only the first one does most commands."""
    if context.invoked_subcommand not in _OF_ALL_PROCESSES and not is_first():
        raise typer.Exit


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
