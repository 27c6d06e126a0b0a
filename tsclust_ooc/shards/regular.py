"""Bytes of a regular file, opened without ever waiting for it.

Runs in a child process (`child`). Invariant: nothing but a regular file is read; what the disk or the network failed at
is an OSError with its number, never taken for what is in the file.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from io import FileIO

from tsclust_ooc.shards.schema import ShardError

IMAGE_BYTES = 16 * 2**20
"""Files up to this size are read whole and parsed in memory: one open and one read on a network filesystem."""

HEAD_BYTES = 16 * 2**10  # of a .npy file: numpy refuses longer headers too


@contextlib.contextmanager
def open_regular(path: str) -> Iterator[tuple[FileIO, int]]:
    """The unbuffered file at `path`, and its size; ShardError 'not-regular' for a FIFO, a device or a folder."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ShardError("not-regular", "not a regular file")
        with FileIO(fd, "rb", closefd=False) as file:
            yield file, found.st_size
    finally:
        os.close(fd)


def head_of(path: str) -> tuple[bytes, int]:
    """The first bytes of a regular file, and its size."""
    with open_regular(path) as (file, size):
        return _read(file, HEAD_BYTES), size


def bytes_of(path: str) -> tuple[bytes, int]:
    """All bytes of a regular file where it is small, else its first ones; and its size."""
    with open_regular(path) as (file, size):
        if size > IMAGE_BYTES:
            return _read(file, HEAD_BYTES), size
        image = file.readall()
        return image, len(image)


def _read(file: FileIO, n: int) -> bytes:
    """The next `n` bytes, fewer only at the end: a network filesystem may give them in pieces."""
    parts = []
    while n and (part := file.read(n)):
        parts.append(part)
        n -= len(part)
    return b"".join(parts)
