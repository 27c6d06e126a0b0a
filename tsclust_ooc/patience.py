"""Another try for what a network filesystem or an object store fails at now and then.

Invariant: what is tried again changes nothing when it is done twice (reads, listings); what is not a passing failure is
raised at once; the number of further tries is counted, for a person wants to know that their disk does this. A source
that is gone altogether is not waited for again and again.
"""

from __future__ import annotations

import errno
import itertools
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
_IN_VAIN = 20  # calls in a row that used up their tries: after them, others get one try until one succeeds

P = ParamSpec("P")
T = TypeVar("T")


class Patience:
    """Tries again what fails in passing, with longer and longer waits; counts how often. Use from any thread.

    When everything fails (20 calls in a row have used up their tries), further calls get one try each until one
    succeeds.
    """

    def __init__(self, tries: int = TRIES, first_wait_seconds: float = _FIRST_WAIT_SECONDS) -> None:
        self.tries, self._first = tries, first_wait_seconds
        self._guard, self._n, self._in_vain = threading.Lock(), 0, 0

    @property
    def n_retries(self) -> int:
        """Further tries so far, of all calls."""
        return self._n

    def add(self, n_retries: int) -> None:
        """Count tries that another process made for us."""
        with self._guard:
            self._n += n_retries

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`function(*args, **kwargs)`, again while it fails in passing.

        Raises its OSError: at once when it is not a passing one, else the last of them, whose `strerror` says which
        errno it was and how many tries there were.
        """
        try:
            given = function(*args, **kwargs)
        except OSError as error:
            return self.again(error, function, *args, **kwargs)
        self.succeeded()
        return given

    def succeeded(self) -> None:
        """A first try went well, which `call` was not asked for."""
        self._in_vain = 0

    def again(self, first: OSError, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `call`, when its first try was made already and failed with the error `first`."""
        self._bear(first, 1)
        for number in itertools.count(2):
            self._wait(number - 1)
            try:
                given = function(*args, **kwargs)
            except OSError as error:
                self._bear(error, number)
            else:
                self.succeeded()
                return given
        raise AssertionError("counting ended")

    def _wait(self, n_failed: int) -> None:
        # Not all at once: many threads that met one hiccup would make the next.
        time.sleep(self._first * _GROWTH ** (n_failed - 1) * random.uniform(0.5, 1.5))

    def _bear(self, error: OSError, number: int) -> None:
        """Count a further try after try `number` failed with `error`; raise it when there is to be none."""
        if error.errno not in PASSING:
            raise error
        with self._guard:
            if number < self.tries and self._in_vain < _IN_VAIN:
                self._n += 1
                return
            self._in_vain += 1
        tries = f"{number} {'try' if number == 1 else 'tries'}"
        raise OSError(
            error.errno, f"{error.strerror} ({errno.errorcode[error.errno]}, {tries})", error.filename
        ) from error
