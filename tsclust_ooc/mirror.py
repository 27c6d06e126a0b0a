"""Copies of objects on scratch, so that what reads files can read what lies behind a URL.

Invariant: while an object is brought, its local file is whole, has the size and the modification time of its stamp, and
lies in a private folder of this process under a name made of a digest: no name of an object reaches the filesystem. The
folder is gone when the mirror is closed; what a killed process left is removed by the next mirror on the node.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from tsclust_ooc import files, locks
from tsclust_ooc.errors import CannotWrite, TryAgain
from tsclust_ooc.patience import PASSING
from tsclust_ooc.remote import IN_FLIGHT, Remote
from tsclust_ooc.units import format_bytes

FOLDER = "mirror"
MOST_BYTES = 32 * 2**30
"""A mirror keeps this much of what it brought, or half of what is free, if that is less."""
_MOST_COPIES = 100_000
GROUP_BYTES = 64 * 2**20
"""What is brought ahead at a time, at most."""


class Stamped(Protocol):
    """An object of a source as it was listed: an entry, a shard, or what `Asked` says."""

    @property
    def path(self) -> str:
        """Relative to the mirror's remote, or all of its URL as it is shown."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def mtime_ns(self) -> int:
        """The time in its stamp."""


class Asked(NamedTuple):
    """An object that a reader wants."""

    path: str
    size: int
    mtime_ns: int


@dataclass
class _Copy:
    """One object here, or on its way: `done` is set when it is one or the other."""

    file: Path
    size: int
    n_users: int = 0
    n_kept: int = 0
    failure: OSError | None = None
    done: threading.Event = field(default_factory=threading.Event)


class Mirror:
    """What this process has of a remote source; use it from many threads, and close it.

    To what reads shards it is the stage on which each has to be brought before it is opened. What is tried again is
    tried by the remote: a failure to bring an object is none that passes.

    What nobody uses stays, last used last to go, until more than `limit_bytes` are kept: a large shard is read by
    several partitions. What is in use at one time may be more than that, if the disk has room.
    """

    def __init__(self, remote: Remote, scratch: Path, limit_bytes: int | None = None) -> None:
        self.remote = remote
        place = scratch / FOLDER
        place.mkdir(mode=0o700, exist_ok=True)
        sweep(place)
        self._held = contextlib.ExitStack()
        self.folder = _claim(place, self._held)
        self.limit_bytes = min(MOST_BYTES, files.free_bytes(place) // 2) if limit_bytes is None else limit_bytes
        self.n_fetched = self.bytes_fetched = 0
        self._kept_bytes = 0
        self._copies: OrderedDict[tuple[str, int, int], _Copy] = OrderedDict()
        self._guard = threading.Lock()
        self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="mirror")  # of all its users together

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove every copy, and what killed processes left."""
        self._pool.shutdown(cancel_futures=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._held.close()
        sweep(self.folder.parent)

    def reads_directly(self, size: int) -> bool:  # noqa: ARG002 - as a stage is asked
        """Whether a shard of `size` bytes is read where it lies: never."""
        return False

    @contextlib.contextmanager
    def local(self, path: str, stamp: tuple[int, int]) -> Iterator[str]:
        """Where to read the object at `path` (its URL as it is shown; size and mtime_ns in `stamp`)."""
        with self.bring([Asked(path, *stamp)]) as file_of:
            yield file_of(path)

    @contextlib.contextmanager
    def ahead(self, entries: Callable[[], Sequence[Stamped]]) -> Iterator[None]:
        """Bring what will be read inside the block, all at once; where that is too much at a time, nothing."""
        wanted = entries()
        few = sum(entry.size for entry in wanted) <= GROUP_BYTES
        with self.bring(wanted if few else []):
            yield

    def give_back(self, wanted_bytes: int) -> None:
        """Drop what nobody uses where less than `wanted_bytes` are free."""
        if files.free_bytes(self.folder) < wanted_bytes:
            self._drop_idle(0)

    @contextlib.contextmanager
    def bring(self, entries: Sequence[Stamped]) -> Iterator[Callable[[str], str]]:
        """Have local files of `entries` inside the block; yields what gives the file of a path.

        For an object that could not be brought, or has changed since it was listed, that raises an OSError which no
        further try would mend. Raises CannotWrite when scratch has no room.
        """
        taken: dict[str, _Copy] = {}
        try:
            coming = self._take(entries, taken)
            self._fetch(coming)
            yield lambda path: _file_of(taken[path], path)
        finally:
            self._give_back(taken)

    def _take(self, entries: Sequence[Stamped], taken: dict[str, _Copy]) -> list[tuple[Stamped, _Copy]]:
        """Note that we use `entries`; returns those that nobody has begun to bring."""
        coming = []
        with self._guard:
            for entry in entries:
                key = entry.path, entry.size, entry.mtime_ns
                copy = self._copies.get(key)
                if copy is None or copy.failure is not None:  # a failure may have passed
                    copy = self._copies[key] = _Copy(self.folder / _name(key), entry.size)
                    coming.append((entry, copy))
                if entry.path not in taken:
                    copy.n_users += 1
                    taken[entry.path] = copy
                self._copies.move_to_end(key)
        return coming

    def _fetch(self, coming: Sequence[tuple[Stamped, _Copy]]) -> None:
        try:
            self._make_room(sum(copy.size for _, copy in coming))
            if len(coming) == 1:  # the caller is one of many threads
                self._bring(*coming[0])
                return
            for job in [self._pool.submit(self._bring, entry, copy) for entry, copy in coming]:
                job.result()
        finally:
            for _, copy in coming:  # where none of it came about, nobody waits for it
                if not copy.done.is_set():
                    copy.failure = OSError(errno.EINTR, "was not fetched")
                    copy.done.set()

    def _bring(self, entry: Stamped, copy: _Copy) -> None:
        try:
            copy.file.parent.mkdir(exist_ok=True)
            self._fetch_one(entry, copy.file)
            os.utime(copy.file, ns=(entry.mtime_ns, entry.mtime_ns))
            with self._guard:
                copy.n_kept = copy.size
                self._kept_bytes += copy.size
                self.n_fetched += 1
                self.bytes_fetched += copy.size
        except OSError as error:
            copy.failure = error
            copy.file.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._full(entry.size) from error
        finally:
            copy.done.set()

    def _fetch_one(self, entry: Stamped, file: Path) -> None:
        head, path = f"{self.remote}/", entry.path
        if path == str(self.remote):  # the URL of one object
            self.remote.parent().fetch(self.remote.name, entry.size, file)
        else:
            self.remote.fetch(path.removeprefix(head), entry.size, file)

    def _give_back(self, taken: dict[str, _Copy]) -> None:
        with self._guard:
            for copy in taken.values():
                copy.n_users -= 1
        self._drop_idle(self.limit_bytes)

    def _make_room(self, n_bytes: int) -> None:
        """Drop what nobody uses until `n_bytes` more fit; CannotWrite when they never will."""
        self._drop_idle(max(0, self.limit_bytes - n_bytes))
        if files.free_bytes(self.folder) < n_bytes:
            self._drop_idle(0)
        if (free := files.free_bytes(self.folder)) < n_bytes:
            raise self._full(n_bytes, free)

    def _full(self, n_bytes: int, free: int = 0) -> CannotWrite:
        return CannotWrite(
            f"scratch {self.folder} has {format_bytes(free)} free, and what is read next of {self.remote} has "
            f"{format_bytes(n_bytes)}. Use --scratch DIR with more room."
        )

    def _drop_idle(self, limit_bytes: int) -> None:
        """Remove copies that nobody uses, the one that was used longest ago first, until `limit_bytes` are kept."""
        with self._guard:
            going = []
            n_bytes, n_copies = self._kept_bytes, len(self._copies)
            for key, copy in self._copies.items():
                if n_bytes <= limit_bytes and n_copies <= _MOST_COPIES:
                    break
                if copy.n_users == 0 and copy.done.is_set():
                    going.append(key)
                    n_bytes, n_copies = n_bytes - copy.n_kept, n_copies - 1
            for key in going:
                # Inside the lock: whoever wants it again gets the same name.
                self._copies.pop(key).file.unlink(missing_ok=True)
            self._kept_bytes = n_bytes


def sweep(place: Path) -> None:
    """Remove the folders of mirrors whose process is gone."""
    for lock in place.glob("*.lock"):
        with contextlib.suppress(TryAgain, FileNotFoundError), locks.hold(lock, wait_seconds=0, busy="in use") as held:
            if held:
                shutil.rmtree(lock.with_suffix(".d"), ignore_errors=True)
                lock.with_suffix(".holder").unlink(missing_ok=True)
                lock.unlink(missing_ok=True)


def _claim(place: Path, held: contextlib.ExitStack) -> Path:
    """A new folder in `place`, ours as long as we live."""
    while True:
        lock = place / f"{secrets.token_hex(6)}.lock"
        with contextlib.suppress(TryAgain):  # somebody swept between two steps of ours
            held.enter_context(locks.hold(lock, wait_seconds=0, busy="in use"))
            for file in (lock.with_suffix(".holder"), lock):
                held.callback(file.unlink, missing_ok=True)
            folder = lock.with_suffix(".d")
            folder.mkdir(mode=0o700)
            return folder


def _name(key: tuple[str, int, int]) -> str:
    # Readers tell .npy from HDF5 by the name, so its end stays; a digest of a few thousand names a folder.
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
    end = os.path.splitext(key[0])[1].lower()
    return f"{digest[:2]}/{digest}{end if end.isascii() and end[1:].isalnum() and len(end) < 8 else ''}"


def _file_of(copy: _Copy, path: str) -> str:
    copy.done.wait()
    if copy.failure is not None:
        code = copy.failure.errno
        raise OSError(errno.EREMOTE if code in PASSING else code, copy.failure.strerror, path)
    return str(copy.file)
