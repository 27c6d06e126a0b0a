"""The lock inside a node: one process at a time at a name, released by the kernel when its holder dies.

Invariant: nothing depends on a lock for its correctness, only for not doing work twice. The lock file lies on
node-local scratch (flock is no lock across nodes on many cluster filesystems), and a filesystem that cannot lock
costs a warning, never the run.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from tsclust_ooc.errors import TryAgain
from tsclust_ooc.progress import Listener, silent

_CANNOT_LOCK = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EIO}


@contextlib.contextmanager
def hold(path: Path, *, wait_seconds: float, busy: str, listener: Listener = silent) -> Iterator[bool]:
    """Hold the lock file `path` inside the block; yields whether it really is held.

    Raises TryAgain with the message `busy` when another process still holds it after `wait_seconds`.
    """
    # Without flock filelock would turn to a mere file, which outlives a killed holder and waits for a human.
    lock = FileLock(path, fallback_to_soft=False)
    held = True
    try:
        lock.acquire(timeout=wait_seconds)
    except Timeout as error:
        raise TryAgain(busy + _holder(path)) from error
    except OSError as error:
        if error.errno not in _CANNOT_LOCK:
            raise
        held = False
        listener.say(f"no file locks at {path.parent} ({error.strerror}): going on without; work may be done twice")
    try:
        if held:
            _note_holder(path)
        yield held
    finally:
        if held:
            lock.release()


def name_for(scratch: Path, purpose: str, target: Path) -> Path:
    """The lock file in `scratch` for `target`, the same for every spelling of its path on this node."""
    return scratch / f"{purpose}-{hashlib.sha256(os.fsencode(target.resolve())).hexdigest()[:24]}.lock"


def _note_holder(path: Path) -> None:
    # Beside the lock file, not inside it: filelock truncates the file it locks.
    with contextlib.suppress(OSError):
        path.with_suffix(".holder").write_text(f"process {os.getpid()} on {socket.gethostname()}")


def _holder(path: Path) -> str:
    try:
        return f" (held by {path.with_suffix('.holder').read_text()})"
    except OSError:
        return ""
