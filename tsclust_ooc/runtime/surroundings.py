"""What a cluster changes of the process that starts it, and puts back: environment, loggers, temporaries."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

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
