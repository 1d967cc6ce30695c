"""Options that make another command of a command, such as ``evaluate --tally``."""

from collections.abc import Collection

import typer

from lowmem_db.errors import ConfigError


def refuse_others(context: typer.Context, mode: str, allowed: Collection[str]) -> None:
    """Refuse what was given and has no effect beside such an option.

    Args:
        context: The command as it was given.
        mode: The option.
        allowed: Names of the parameters that have an effect beside it, the option's own included.

    Raises:
        ConfigError: There are others.
    """
    given = [
        max(parameter.opts, key=len) if parameter.param_type_name == "option" else parameter.name.upper()
        for parameter in context.command.params
        if parameter.name is not None
        and parameter.name not in allowed
        and str(context.get_parameter_source(parameter.name)).endswith("COMMANDLINE")
    ]
    if given:
        raise ConfigError(f"{', '.join(given)}: no effect with {mode}; leave it out, or give two commands")
