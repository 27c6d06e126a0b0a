"""Bring shards from shared storage to node scratch, once a node, and give them back.

Invariant: a file under its final name in scratch is whole: it was copied while its source did not change, and a copy
that another process (or a dead one) left is used only after its digest was checked. Decide is pure; fetch copies to
a temporary name beside the target under a node-local lock, then renames.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import xxhash

from tsclust_ooc import files, locks, scratch
from tsclust_ooc.errors import CannotWrite, TryAgain, UsageError
from tsclust_ooc.mirror import Asked, Mirror
from tsclust_ooc.patience import Patience
from tsclust_ooc.remote import Remote
from tsclust_ooc.shards.schema import ShardError
from tsclust_ooc.shards.templates import check_stamp
from tsclust_ooc.units import format_bytes

MODES = ("auto", "always", "never")
SMALL_BYTES = 16 * 2**20
"""Shards up to this size are read whole in one go: a copy on scratch would only cost a second read."""

_LOCK_WAIT_SECONDS = 3600.0
_COPY_BYTES = 4 * 2**20
_KEY = re.compile(r"[0-9a-f]{32}")


def decide(size: int, mode: str, *, on_network: bool) -> Literal["copy", "direct"]:
    """Whether a shard of `size` bytes is copied to scratch first, or read where it lies."""
    if mode not in MODES:
        raise UsageError(f"--stage {mode} is not known. Use one of: {', '.join(MODES)}.")
    if mode == "always" or (mode == "auto" and on_network and size > SMALL_BYTES):
        return "copy"
    return "direct"


@dataclass(frozen=True)
class Staging:
    """How a process stages, on whatever node it is: small and picklable.

    `here` is our scratch directory where it is known; else each process finds it, below `asked` if that is given. With
    a `remote` the shards are objects: they are always brought to scratch, whatever the mode.
    """

    mode: str
    here: Path | None = None
    asked: Path | None = None
    remote: Remote | None = None

    def open(self, source: str | Path, patience: Patience | None = None) -> Stage | Mirror:
        """This process's stage for shards below `source`; looks for scratch only where a shard could need it."""
        if self.remote is not None:
            remote = self.remote if patience is None else Remote(self.remote.url, patience)
            return Mirror(remote, self.here or scratch.scratch_dir(self.asked))
        source = Path(source)
        on_network = scratch.is_network(source)
        place = self.here
        if place is None and (self.mode == "always" or (self.mode == "auto" and on_network)):
            place = scratch.scratch_dir(self.asked)
        return Stage((place or Path("no-scratch")) / "stage", self.mode, on_network=on_network)


class Stage:
    """This process's use of a stage directory shared by the processes of a node; close it when done.

    A staged file stays while any process holds a lease on it (`KEY.HOST.PID.lease`). `close` gives up our leases and
    removes every file that nobody leases, also what dead processes left. With mode 'never' no folder is touched.
    """

    def __init__(self, folder: Path, mode: str, *, on_network: bool) -> None:
        self.folder, self.mode, self.on_network = folder, mode, on_network
        self.copied = self.reused = 0
        self._mine: dict[str, int] = {}  # key -> users inside this process
        self._whole: set[str] = set()  # keys whose copy we made or checked
        self._guard = threading.Lock()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def reads_directly(self, size: int) -> bool:
        """Whether a shard of `size` is read where it lies."""
        return decide(size, self.mode, on_network=self.on_network) == "direct"

    @contextlib.contextmanager
    def ahead(self, entries: Callable[[], Sequence[Asked]]) -> Iterator[None]:  # noqa: ARG002 - for a mirror
        """Be told of what will be read inside the block; each is staged when it is."""
        yield

    @contextlib.contextmanager
    def local(self, path: str, stamp: tuple[int, int]) -> Iterator[str]:
        """Where to read the shard at `path` (size and mtime_ns in `stamp`) inside the block."""
        if self.reads_directly(stamp[0]):
            yield path
            return
        key = hashlib.sha256(os.fsencode(f"{os.path.realpath(path)}\0{stamp}")).hexdigest()[:32]
        with self._guard:
            self._mine[key] = self._mine.get(key, 0) + 1
            whole = key in self._whole
        try:
            yield str(self._path(key) if whole else self._fetch(key, path, stamp))
        finally:
            with self._guard:
                self._mine[key] -= 1

    def close(self) -> None:
        """Give up all leases and remove what nobody needs."""
        if self.mode == "never" or not self.folder.is_dir():
            return
        self._mine.clear()
        self._whole.clear()
        # Also what has no copy: the lease and the partial file of a process that died while it copied.
        names = {path.name.lstrip(".").partition(".")[0] for path in self.folder.glob("??/*")}
        for key in filter(_KEY.fullmatch, names):
            self._give_up(key, wait_seconds=_LOCK_WAIT_SECONDS)

    def give_back(self, wanted_bytes: int) -> None:
        """Give up copies of ours that are not in use, until more than `wanted_bytes` are free."""
        with self._guard:
            idle = [key for key, users in self._mine.items() if users == 0]
        for key in idle:
            if files.free_bytes(self.folder) > wanted_bytes:
                return
            with self._guard:
                if self._mine.get(key) != 0:
                    continue
                del self._mine[key]
                self._whole.discard(key)
            with contextlib.suppress(TryAgain):  # somebody is at it, so it is not idle
                self._give_up(key, wait_seconds=0)

    def _fetch(self, key: str, path: str, stamp: tuple[int, int]) -> Path:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self._place(key).mkdir(mode=0o700, exist_ok=True)
        with locks.hold(self._lock(key), wait_seconds=_LOCK_WAIT_SECONDS, busy=f"{path} is being staged"):
            self._lease(key).touch()
            if self._usable(key, stamp):
                self.reused += 1
            else:
                self._make_room(stamp[0])
                self._copy(key, path, stamp)
                self.copied += 1
            with self._guard:
                self._whole.add(key)
        return self._path(key)

    def _usable(self, key: str, stamp: tuple[int, int]) -> bool:
        """Whether a copy is there, has the source's stamp, and its bytes have the digest noted when it was made."""
        try:
            found = self._path(key).stat()
            noted = self._digest(key).read_text()
        except FileNotFoundError:
            return False
        return (found.st_size, found.st_mtime_ns) == stamp and files.checksum(self._path(key)) == noted

    def _copy(self, key: str, path: str, stamp: tuple[int, int]) -> None:
        digest = xxhash.xxh3_128()
        target = self._path(key)
        self._digest(key).unlink(missing_ok=True)
        with files.naming_the_place(target), open(path, "rb", buffering=0) as source:
            found = os.fstat(source.fileno())
            check_stamp(stamp, (found.st_size, found.st_mtime_ns))
            with files.atomic_file(target) as copy:
                while block := source.read(_COPY_BYTES):
                    digest.update(block)
                    copy.write(block)
                found = os.fstat(source.fileno())
                check_stamp(stamp, (found.st_size, found.st_mtime_ns))
                if copy.tell() != stamp[0]:
                    raise ShardError("unstable", f"gave {copy.tell():,} of {stamp[0]:,} bytes")
            os.utime(target, ns=(stamp[1], stamp[1]))
        # The digest last: a copy without one is never used.
        files.write_atomic(self._digest(key), digest.hexdigest().encode())

    def _make_room(self, size: int) -> None:
        """Free our idle copies until `size` more bytes fit; CannotWrite when they never will."""
        self.give_back(2 * size)
        free = files.free_bytes(self.folder)
        if free < size:
            raise CannotWrite(
                f"scratch {self.folder} has {format_bytes(free)} free, the next shard needs {format_bytes(size)}. "
                "Use --scratch DIR with more room, or --stage never."
            )

    def _give_up(self, key: str, *, wait_seconds: float) -> None:
        """Give up our lease, and remove the file if nobody else alive has one."""
        with locks.hold(self._lock(key), wait_seconds=wait_seconds, busy="a shard is being staged"):
            with self._guard:
                if key in self._mine:  # another thread took it up meanwhile
                    return
            self._lease(key).unlink(missing_ok=True)
            leases = list(self._place(key).glob(f"{key}.*.lease"))
            for lease in [lease for lease in leases if _dead(lease)]:
                lease.unlink(missing_ok=True)
                leases.remove(lease)
            if not leases:
                for path in (self._digest(key), self._path(key), *self._place(key).glob(f".{key}.*.partial")):
                    path.unlink(missing_ok=True)

    def _lock(self, key: str) -> Path:
        # 256 lock files for all shards: a lock file cannot be removed safely, so there must not be one a shard.
        return self.folder / f"{key[:2]}.lock"

    def _place(self, key: str) -> Path:
        # Looking for the leases of one shard must not list those of all.
        return self.folder / key[:2]

    def _path(self, key: str) -> Path:
        return self._place(key) / f"{key}.shard"

    def _digest(self, key: str) -> Path:
        return self._place(key) / f"{key}.digest"

    def _lease(self, key: str) -> Path:
        return self._place(key) / f"{key}.{socket.gethostname()}.{os.getpid()}.lease"


NO_STAGE = Stage(Path("no-stage"), "never", on_network=False)
"""Every shard is read where it lies; owns nothing."""


def _dead(lease: Path) -> bool:
    """Whether the process that made a lease is gone from this node (scratch is node-local, so it was this node)."""
    pid = lease.name.split(".")[-2]
    return not Path(f"/proc/{pid}").exists()
