"""``lowmem-db``: exit codes of errors and signals. Slow imports happen after the signal handlers are in place."""

import sys

from lowmem_db.errors import LowmemDbError, RunInterrupted
from lowmem_db.interruption import exit_on_signals, leave_at_once, was_asked


def main() -> None:
    """Run a command; an error that the user can fix, or a signal, ends it with one line and no traceback."""
    try:
        exit_on_signals()
        app()
    except (LowmemDbError, RunInterrupted) as error:
        from lowmem_db.console import say

        _leave_if_out_of_memory(error)
        for line in str(error).splitlines():
            say(f"error: {line}" if error.exit_code == 2 else line)
        sys.exit(error.exit_code)
    except Exception as error:
        if (message := was_asked()) is not None:  # a library wrapped the interruption in its own error
            leave_at_once(message)
        _leave_if_out_of_memory(error)
        raise


def _leave_if_out_of_memory(error: BaseException) -> None:
    """End the program with one line if memory ran out where nothing could be done about it.

    The error may be another one, such as that of a file that could not be read because of it.
    """
    from lowmem_db.errors import BudgetError
    from lowmem_db.out_of_memory import place_of, reason_of

    if not isinstance(error, BudgetError) and (place := place_of(error)) is not None:
        from lowmem_db.console import say

        say(f"out of memory on the {place} ({reason_of(error)}); free memory, or ask for less at once, and try again")
        sys.exit(BudgetError.exit_code)


def app() -> None:
    """Run the command line."""
    from lowmem_db.cli.commands import run_command
    from lowmem_db.console import no_encoding_errors

    no_encoding_errors()
    run_command()
