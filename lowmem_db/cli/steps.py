"""Checkpoints on the command line: ``--step 400``, ``--steps 200,400,final``."""

from typing import TYPE_CHECKING

from lowmem_db.errors import ConfigError

if TYPE_CHECKING:
    from lowmem_db.engine.source import Step


def parse_step(text: str, option: str = "--step") -> "Step":
    """Return a step, or ``final``.

    Raises:
        ConfigError: It is neither.
    """
    text = text.strip()
    if text == "final":
        return "final"
    if not text.isdecimal():
        raise ConfigError(f"{option}: {text!r} is not a step; allowed: a number, such as 400, or final")
    return int(text)


def parse_steps(text: str | None) -> "list[Step]":
    """Return steps separated by commas, each once.

    Raises:
        ConfigError: One of them is not a step.
    """
    return list(dict.fromkeys(parse_step(part, "--steps") for part in text.split(","))) if text is not None else []
