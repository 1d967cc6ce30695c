"""``lowmem-db``: the exit codes of errors and signals. What takes time to import comes after signals are handled."""

import sys

from lowmem_db.errors import LowmemDbError, RunInterrupted
from lowmem_db.interruption import exit_on_signals, leave_at_once, was_asked


def main() -> None:
    """Run a command; an error that the user can mend, or a signal, ends it in one line and without a traceback."""
    try:
        exit_on_signals()
        app()
    except (LowmemDbError, RunInterrupted) as error:
        from lowmem_db.console import say

        for line in str(error).splitlines():
            say(f"error: {line}" if error.exit_code == 2 else line)
        sys.exit(error.exit_code)
    except Exception:
        if (message := was_asked()) is not None:  # what a library made of the interruption
            leave_at_once(message)
        raise


def app() -> None:
    """Run the command of the arguments."""
    from lowmem_db.cli.commands import run_command

    run_command()
