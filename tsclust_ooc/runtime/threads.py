"""Tasks on threads of this process: no port, no pickling, memory shared."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsclust_ooc.progress import Listener
from tsclust_ooc.runtime.spec import ClusterSpec, Function, Runtime

AHEAD = 2  # tasks a worker: one running, one waiting, so that no worker idles while a result is consumed


@contextlib.contextmanager
def open_threads(spec: ClusterSpec, listener: Listener) -> Iterator[Runtime]:  # noqa: ARG001 - threads need no word
    """A pool of `spec.n_workers` threads."""
    pool = ThreadPoolExecutor(spec.n_workers, thread_name_prefix="tsclust")
    try:
        yield _Threads(pool, spec.n_workers)
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Threads:
    pool: ThreadPoolExecutor
    n_workers: int
    dashboard: str = ""

    def mapper(self, fn: Function, items: Iterable[Any]) -> Iterator[Any]:
        return in_order(lambda item: self.pool.submit(fn, item), Future.cancel, items, AHEAD * self.n_workers)

    def save_report(self, path: Path) -> None:
        """Threads leave no record of their tasks."""


def in_order(start: Function, drop: Function, items: Iterable[Any], limit: int) -> Iterator[Any]:
    """The results of the tasks that `start` makes of `items`, in order; never more than `limit` tasks at a time."""
    waiting: deque[Any] = deque()
    try:
        for item in items:
            waiting.append(start(item))
            if len(waiting) >= limit:
                yield waiting[0].result()
                drop(waiting.popleft())
        while waiting:
            yield waiting[0].result()
            drop(waiting.popleft())
    finally:
        for task in waiting:
            drop(task)
