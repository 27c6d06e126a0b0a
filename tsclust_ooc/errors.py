"""One exception tree: each error knows the exit code of the command it ends.

Invariant: everything a user can cause is a `TsclustError`; anything else that reaches the command line is our own
bug and keeps its traceback. A message names the thing, what was found, what was wanted and the next step.
"""

from __future__ import annotations


class TsclustError(Exception):
    """Base of all errors this package raises on purpose; ends a command with `exit_code`."""

    exit_code = 1


class UsageError(TsclustError):
    """An option or argument that cannot be meant: its value, and what would be accepted."""

    exit_code = 2


class BadInput(TsclustError):
    """The data are not what the command needs: unreadable shards, NaN rows, a directory that is no dataset."""

    exit_code = 65


class CannotWrite(TsclustError):
    """The result has no place: a full disk, no permission, a name that is taken, a budget it does not fit."""

    exit_code = 73


class TryAgain(TsclustError):
    """Interrupted with progress saved, or another process is at the same work: run the same command again."""

    exit_code = 75


class MissingExtra(TsclustError):
    """An optional part was asked for and its packages are not installed; the message holds the pip line."""
