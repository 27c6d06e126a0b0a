"""Many reads under way at one time, where reads wait: on a network each of them takes its round trips. And one at a
time where they do not: what is in memory already is read fastest by a single thread, for only one runs Python.

Invariant: how many there are is decided by how long reads were seen to wait, never by what a filesystem is called; the
results and their order do not depend on it, and no thread outlives the call that started it.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

MOST = 64
"""Reads under way at one time, of all callers of a Pace together, about."""

SLOW_SECONDS = 0.001
"""A source whose reads wait as long, in the median, is slow. Waits for other threads of ours are a tenth of it."""

CACHED_SECONDS = 0.0001
"""A source whose reads wait less, in the median, is in memory. A fast disk takes about as long."""

_TRIAL = 5  # reads, one after another, that decide
_TRIAL_EVERY = 16  # calls while the source is slow: it may have been the cache that was cold

T = TypeVar("T")
R = TypeVar("R")


class Pace:
    """Maps a read over items: one after another where the source is quick, many at a time where it is slow.

    Of a source that lies in memory, callers read in turn: side by side they would wait for Python again and again.

    Use it from many threads, for one source.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most, self._guard = most, threading.Lock()
        self._n_callers = self._n_calls = 0
        self._slow, self._cached, self._turn = False, True, threading.Lock()

    def each(self, read: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`read` of every item, in order; what the first to fail raises, when the others under way have ended."""
        with self._counted() as (n_callers, trial):
            done: list[R] = []
            if self._cached:
                with self._turn:
                    if self._cached:
                        done = self._tried(read, items[:_TRIAL])
                        if self._cached:
                            return done + [read(item) for item in items[len(done) :]]
            elif trial:
                done = self._tried(read, items[:_TRIAL])
            left = items[len(done) :]
            n = min(len(left), max(1, self._most // n_callers)) if self._slow else 1
            return done + (_many(read, left, n) if n > 1 else [read(item) for item in left])

    @contextlib.contextmanager
    def _counted(self) -> Iterator[tuple[int, bool]]:
        """How many callers there are now, and whether this one is to try how slow the source is."""
        with self._guard:
            self._n_callers += 1
            trial = not self._slow or self._n_calls % _TRIAL_EVERY == 0
            self._n_calls += 1
            counted = self._n_callers, trial
        try:
            yield counted
        finally:
            with self._guard:
                self._n_callers -= 1

    def _tried(self, read: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`read` of the items, one after another; judges the source by the time that they did not compute."""
        done, waits = [], []
        for item in items:
            began, worked = time.perf_counter(), time.thread_time()
            done.append(read(item))
            waits.append(time.perf_counter() - began - (time.thread_time() - worked))
        if len(waits) == _TRIAL:
            wait = statistics.median(waits)
            self._slow = wait > SLOW_SECONDS
            self._cached = not self._slow and wait < CACHED_SECONDS
        return done


def _many(read: Callable[[T], R], items: Sequence[T], n: int) -> list[R]:
    """`read` of the items by `n` threads, each taking the next that nobody has taken."""
    results: list[Any] = [None] * len(items)
    left = deque(enumerate(items))

    def take() -> tuple[int, T] | None:
        with contextlib.suppress(IndexError):
            return left.popleft()
        return None

    def work() -> None:
        while taken := take():
            i, item = taken
            results[i] = read(item)

    with ThreadPoolExecutor(n, thread_name_prefix="reads") as pool:
        try:
            for one in [pool.submit(work) for _ in range(n)]:
                one.result()
        except BaseException:
            left.clear()  # the others end after what they have under way
            raise
    return results
