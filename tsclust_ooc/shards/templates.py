"""The template proof: read a shard without HDF5, knowing that HDF5 would have read the same.

Shards of one source are written by one program, so their metadata bytes are identical. The first is parsed with HDF5,
which says where its contiguous, unfiltered data lie. A further shard of the same size whose bytes outside that region
all equal the template's would be parsed to the same thing, so its data are taken as they lie. This needs one more fact:
that HDF5 keeps no metadata inside the region, which `learn` (in the child) shows by parsing the template again with
the region overwritten. Anything unequal goes to HDF5, never to a shortcut.
"""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tsclust_ooc.shards.layouts import lies_as_given
from tsclust_ooc.shards.schema import Schema, ShardError

MAX_METADATA_BYTES = 64 * 2**10


@dataclass(frozen=True)
class Template:
    """A parsed shard's `size`, where dataset `member` has its `n_bytes` of `dtype` (`shape`), and all other bytes."""

    size: int
    member: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    n_bytes: int
    head: str  # base64 of the bytes before the data
    tail: str  # base64 of the bytes after them


class Matcher:
    """A template ready to compare: decoded once, used by many threads (it holds no buffer that is written)."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self.head = base64.b64decode(template.head)
        self.tail = base64.b64decode(template.tail)

    def metadata_equal(self, path: str) -> bool:
        """Whether all bytes of `path`, a file of the template's size, equal the template's outside the data region."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if os.pread(fd, len(self.head), 0) != self.head:
                return False
            after = self.template.size - len(self.tail)
            return not self.tail or os.pread(fd, len(self.tail), after) == self.tail
        finally:
            os.close(fd)

    def read_into(self, path: str, stamp: tuple[int, int], out: memoryview, start: int) -> bool:
        """Fill `out` with the data bytes from `start` on; False when the file is not proven equal to the template.

        `stamp` is the (size, mtime_ns) of the survey; ShardError 'unstable' when the file no longer has it.
        """
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            whole = start == 0 and len(out) == self.template.n_bytes
            equal = self._read_whole(fd, out) if whole else self._read_part(fd, out, start)
            found = os.fstat(fd)
        finally:
            os.close(fd)
        if found.st_mtime_ns != stamp[1] or found.st_size != stamp[0]:
            check_stamp(stamp, (found.st_size, found.st_mtime_ns))
        return equal

    def _read_whole(self, fd: int, out: memoryview) -> bool:
        """One system call: head, data (straight to their place) and tail, and one byte more to see the end."""
        head, tail = bytearray(len(self.head)), bytearray(len(self.tail) + 1)
        n = os.preadv(fd, (head, out, tail), 0)
        if n != self.template.size:
            # A short read in the middle is legal on a network filesystem: go on where it stopped, or give up.
            return n > 0 and n < self.template.size and self._read_part(fd, out, 0)
        return head == self.head and tail.startswith(self.tail)

    def _read_part(self, fd: int, out: memoryview, start: int) -> bool:
        if os.pread(fd, len(self.head), 0) != self.head:
            return False
        at, done = self.template.offset + start, 0
        while done < len(out):
            n = os.preadv(fd, [out[done:]], at + done)
            if n == 0:
                return False
            done += n
        after = self.template.size - len(self.tail)
        return os.pread(fd, len(self.tail) + 1, after) == self.tail


def holds_samples(template: Template, schema: Schema) -> bool:
    """Whether the data of a template are samples of `schema` as they are wanted, and nothing else of the file is."""
    fits = template.member == schema.key and template.dtype == schema.dtype
    return fits and lies_as_given(schema) and template.n_bytes % schema.item_bytes == 0


def matchers(templates: tuple[Template, ...]) -> dict[int, list[Matcher]]:
    """Matchers by file size."""
    by_size: dict[int, list[Matcher]] = {}
    for template in templates:
        by_size.setdefault(template.size, []).append(Matcher(template))
    return by_size


def check_stamp(surveyed: tuple[int, int], found: tuple[int, int]) -> None:
    """ShardError 'unstable' when (size, mtime_ns) of a file is not what the survey saw."""
    if surveyed != found:
        raise ShardError(
            "unstable",
            f"changed since it was surveyed: {surveyed[0]:,} bytes then, {found[0]:,} now, "
            f"modified {np.datetime64(found[1], 'ns').astype('M8[s]')}",
        )


def stamp_of(path: Path | str) -> tuple[int, int]:
    """(size, mtime_ns) of the file at `path`, links followed."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns
