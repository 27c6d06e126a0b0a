"""What a cluster changes of the process that starts it, and puts back: environment, loggers, signals, temporaries."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tsclust_ooc.extras import load
from tsclust_ooc.progress import Listener

# distributed writes these into this process's environment as well; they are put back like the others.
_LEAKED = ("MALLOC_TRIM_THRESHOLD_", "PYTHONHASHSEED", "__DASK_PARENT_PID")
_LOGGERS = ("distributed", "distributed.client", "distributed.gc", "tornado", "tornado.application", "bokeh")


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """`variables` set while the block runs, for worker processes, also restarted ones; then all as it was before."""
    names = (*variables, *_LEAKED)
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


@contextlib.contextmanager
def temporaries_in(folder: Path) -> Iterator[None]:
    """New temporary files go to `folder`: ssl reads keys from files only, and the usual place may be a shared disk."""
    before = tempfile.gettempdir()
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """The cluster's own log is not printed: distributed, imported, gives each of these a handler on stderr."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger, logger.handlers[:], logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers[:], logger.propagate = [logging.NullHandler()], False
    try:
        yield
    finally:
        for logger, handlers, propagate in before:
            logger.handlers[:], logger.propagate = handlers, propagate


@contextlib.contextmanager
def told(names: tuple[str, ...], listener: Listener) -> Iterator[None]:
    """Warnings of the loggers `names` go to `listener` while the block runs."""

    def tell(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            listener.say(f"cluster: {record.getMessage()}")
        return True

    for name in names:
        logging.getLogger(name).addFilter(tell)
    try:
        yield
    finally:
        for name in names:
            logging.getLogger(name).removeFilter(tell)


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect when the block has ended; a second one does at once.

    SIGINT stays blocked in threads and processes born inside: a terminal sends Ctrl-C to the whole process group, and
    workers have to live until this process has saved its progress.
    """
    waiting: list[int] = []

    def note(number: int, frame: Any) -> None:
        if waiting:
            before[number](number, frame)
        waiting.append(number)

    # Only the main thread may set handlers; a signal that is ignored, or fatal, has none to put off.
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {int(number): handler for number in numbers if callable(handler := signal.getsignal(number))}
    # The first spawn would start it, and leave SIGINT unblocked in the thread that spawns.
    load("multiprocessing.resource_tracker").ensure_running()
    for number in before:
        signal.signal(number, note)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
    if waiting:
        signal.raise_signal(waiting[0])
