"""How long work tells what it is doing, without printing: the core calls, an edge listens.

Invariant: a listener never changes a result; with `silent` everything runs the same.
"""

from __future__ import annotations

from typing import Protocol


class Listener(Protocol):
    """Told about stages of work, from one thread at a time or from many."""

    def advance(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` units of `stage` are finished."""

    def say(self, message: str) -> None:
        """One line a person should see: a decision taken, a warning, a finished pass."""


class Silent:
    """The listener that hears nothing."""

    def advance(self, stage: str, done: int, total: int) -> None:
        """Ignore it."""

    def say(self, message: str) -> None:
        """Ignore it."""


silent: Listener = Silent()
