"""``lowmem-db``: exit codes of errors and signals. Slow imports happen after the signal handlers are in place."""

import sys

from lowmem_db.errors import LowmemDbError, RunInterrupted
from lowmem_db.interruption import exit_on_signals, leave_at_once, was_asked


def main() -> None:
    """Run a command; an error that the user can fix, or a signal, ends it with one line and no traceback."""
    try:
        exit_on_signals()
        from lowmem_db.out_of_memory import told

        with told():
            app()
    except (LowmemDbError, RunInterrupted) as error:
        from lowmem_db.console import complain

        for line in str(error).splitlines():
            complain(f"error: {line}" if error.exit_code == 2 else line)
        sys.exit(error.exit_code)
    except Exception:
        if (message := was_asked()) is not None:  # a library wrapped the interruption in its own error
            leave_at_once(message)
        raise


def app() -> None:
    """Run the command line."""
    from lowmem_db.cli.commands import run_command
    from lowmem_db.console import no_encoding_errors

    no_encoding_errors()
    run_command()
