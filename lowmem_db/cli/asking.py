"""Questions on a terminal; where nobody can answer, the error names the option to give instead."""

import sys

import typer

from lowmem_db.errors import ConfigError


def answer(question: str, *, default: str | None, ask: bool, option: str = "PHOTOS") -> str:
    """Return what the user answers.

    Args:
        question: The question.
        default: Taken if the answer is empty, or if nothing is to be asked.
        ask: Whether to ask.
        option: What to give instead on the command line.

    Raises:
        ConfigError: Nobody can be asked, and there is no default.
    """
    if ask and sys.stdin.isatty():
        return str(typer.prompt(question, default=default, err=True))
    if ask or default is None:
        raise ConfigError(
            f"{option}: is missing and nobody can be asked here; give it{', or --yes' if default else ''}"
        )
    return default


def confirmed(question: str, *, yes: bool) -> bool:
    """Ask a question that is answered with yes or no.

    Args:
        question: The question.
        yes: Do not ask: the answer is yes.

    Raises:
        ConfigError: Nobody can be asked.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise ConfigError("--yes: is missing and nobody can be asked here; give it to agree to what is listed above")
    return bool(typer.confirm(question, err=True))
