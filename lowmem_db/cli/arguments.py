"""From the arguments of ``train`` and ``prepare`` to a configuration."""

from collections.abc import Sequence
from pathlib import Path

from lowmem_db.config.flags import parse_arguments
from lowmem_db.config.loading import load_config
from lowmem_db.config.schema import Config
from lowmem_db.console import say
from lowmem_db.errors import ConfigError


def read_arguments(arguments: Sequence[str]) -> tuple[Config, bool]:
    """Return the configuration, and whether a flag asks for a resume.

    Raises:
        ConfigError: With every problem found, one per line.
    """
    parsed = parse_arguments(arguments)
    if len(parsed.positional) > 1:
        raise ConfigError(
            f"{' '.join(parsed.positional[1:])}: only one configuration file can be given; the rest "
            "must be section.key=value"
        )
    for note in parsed.notes:
        say(note)
    path = Path(parsed.positional[0]) if parsed.positional else None
    return load_config(path, parsed.overrides), parsed.resume
