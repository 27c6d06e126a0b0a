"""Another try for what a network filesystem or an object store fails at now and then.

Invariant: what is tried again changes nothing when it is done twice (reads, listings); what is not a passing failure is
raised at once; the number of further tries is counted, for a person wants to know that their disk does this.
"""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

PASSING = frozenset({
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.ECONNRESET, errno.ECONNABORTED,
    errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET,
    errno.EREMOTEIO, errno.ENOTCONN, errno.EPIPE, errno.ENOBUFS,
})  # fmt: skip
"""Error numbers that a server, its client or the wire give, and may not give again a moment later."""

TRIES = 5
_FIRST_WAIT_SECONDS = 0.05
_GROWTH = 4.0  # 0.05, 0.2, 0.8, 3.2 s

P = ParamSpec("P")
T = TypeVar("T")


class Patience:
    """Tries again what fails in passing, with longer and longer waits; counts how often. Use from any thread."""

    def __init__(self, tries: int = TRIES, first_wait_seconds: float = _FIRST_WAIT_SECONDS) -> None:
        self.tries, self._first = tries, first_wait_seconds
        self._guard, self._n = threading.Lock(), 0

    @property
    def n_retries(self) -> int:
        """Further tries so far, of all calls."""
        return self._n

    def add(self, n_retries: int) -> None:
        """Count tries that another process made for us."""
        with self._guard:
            self._n += n_retries

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`function(*args, **kwargs)`, again while it fails in passing; its last OSError when the tries are used up."""
        wait = self._first
        for left in reversed(range(self.tries)):
            try:
                return function(*args, **kwargs)
            except OSError as error:
                if error.errno not in PASSING or not left:
                    raise
                self.add(1)
            # Not all at once: many threads that met one hiccup would make the next.
            time.sleep(wait * random.uniform(0.5, 1.5))
            wait *= _GROWTH
        raise AssertionError("a patience of no tries")
