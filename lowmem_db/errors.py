"""Errors that a user can fix, and the exit code of each.

Every message is one line that names the field or file, its value, what is allowed and the way out. Any other exception
is a bug and keeps its traceback.
"""


class LowmemDbError(Exception):
    """An error that a user can fix; the command line prints it without a traceback."""

    exit_code = 2


class ConfigError(LowmemDbError):
    """The configuration is wrong; the message holds every problem found, one per line."""


class DataError(LowmemDbError):
    """A photo, a caption or a folder cannot be used."""


class ModelError(LowmemDbError):
    """A model folder, hub id or weights file cannot be used."""


class CheckpointError(LowmemDbError):
    """A run folder or a checkpoint in it cannot be used."""


class DependencyError(LowmemDbError):
    """An optional library that was asked for is missing, or cannot be used on this machine."""


class StorageError(LowmemDbError):
    """The disk is full, or a file on it is damaged."""


class DiskFullError(StorageError):
    """The disk is full."""


class NonFiniteError(LowmemDbError):
    """A weight, an encoded picture or prompt, an image, a loss or a gradient is infinite or NaN."""


class BudgetError(LowmemDbError):
    """No strategy fits the budget; the message names the smallest budget that would be enough."""

    exit_code = 3


class RunInterrupted(BaseException):
    """The run was asked to stop; a checkpoint was saved first.

    Like :class:`KeyboardInterrupt` it is not an Exception, so that no library swallows it.
    """

    exit_code = 130
