"""A read-only filesystem that shows a folder as if it were far away: slow, and failing now and then.

Run it as a process of its own:

    python far.py SOURCE MOUNTPOINT COUNTERS [--delay-ms 2] [--fail-every 50 --errno ESTALE --match '*/7.h5']

Invariant: what it shows is what lies in SOURCE; only the time and the failures are its own. On SIGUSR1 and when it is
unmounted it writes what it served to COUNTERS (JSON, by one rename).

It must not be what is measured. So it speaks FUSE's protocol (linux/fuse.h) itself, from one event loop: a request that
takes 2 ms waits in a queue, not in a thread. The same by libfuse's threads and Python callbacks costs ten times as much
a shard. Names and attributes come with the listing and are cached by the kernel for an hour (as NFS does for a while),
and nothing is asked for on close.
"""

from __future__ import annotations

import argparse
import errno
import fnmatch
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from struct import Struct

IN = Struct("<IIQQIIII")  # length, opcode, unique, node, uid, gid, pid, extensions
OUT = Struct("<IiQ")  # length, -errno, unique
ATTRIBUTES = Struct("<6Q10I")
ENTRY = Struct("<4Q2I")  # node, generation, seconds that the entry and its attributes are valid, nanoseconds of both
ATTR_HEAD = Struct("<QII")
OPENED = Struct("<QIi")
READ = Struct("<QQI")
DIRENT = Struct("<QQII")
INIT_IN, INIT_OUT = Struct("<IIII"), Struct("<IIIIHHIIHHII24x")

LOOKUP, FORGET, GETATTR, READLINK, OPEN, READ_DATA, RELEASE = 1, 2, 3, 5, 14, 15, 18
INIT, OPENDIR, READDIR, RELEASEDIR, INTERRUPT, DESTROY, BATCH_FORGET, READDIRPLUS = 26, 27, 28, 29, 36, 38, 42, 44
SILENT = {FORGET, BATCH_FORGET, INTERRUPT}
NAMES = {LOOKUP: "stat", GETATTR: "stat", OPEN: "open", READ_DATA: "read", OPENDIR: "list"}

ASYNC_READ, DO_READDIRPLUS, PARALLEL_DIROPS, MAX_PAGES = 1, 1 << 13, 1 << 18, 1 << 22
KEEP_CACHE, NO_FLUSH = 2, 32
AN_HOUR = 3600
PAGES = 256


@dataclass
class Counters:
    """What was served; `busy_seconds` of all opens and reads together, from `began` to `ended`."""

    n_opens: int = 0
    n_reads: int = 0
    n_stats: int = 0
    n_lists: int = 0
    n_failed: int = 0
    n_bytes: int = 0
    most_in_flight: int = 0
    busy_seconds: float = 0.0
    began: float = 0.0
    ended: float = 0.0

    def save(self, path: str) -> None:
        """Write all numbers, and how many opens and reads were under way in the mean."""
        span = self.ended - self.began
        mean = self.busy_seconds / span if span > 0 else 0.0
        Path(path + ".new").write_text(json.dumps({**asdict(self), "mean_in_flight": mean}))
        os.replace(path + ".new", path)


@dataclass
class Failures:
    """Which operations fail: each `every`-th (0: none) of one kind ('any': open or read) on paths that match."""

    every: int
    number: int
    match: str
    operation: str
    count: int = 0

    def due(self, operation: str, path: bytes) -> bool:
        """Whether this operation is to fail."""
        wanted = operation in ("open", "read") if self.operation == "any" else operation == self.operation
        if not self.every or not wanted or not fnmatch.fnmatch(os.fsdecode(path), self.match):
            return False
        self.count += 1
        return self.count % self.every == 0


class Far:
    """The filesystem: nodes by number (1 is the root), open files and listings by handle."""

    def __init__(self, root: bytes, failures: Failures, counters: Counters) -> None:
        self.failures, self.counters = failures, counters
        self.paths, self.nodes = {1: root}, {root: 1}
        self.stale: set[int] = set()
        self.listings: dict[int, list[os.DirEntry[bytes]]] = {}
        self.numbers = itertools.count(2)
        self.answers: dict[int, Callable[[int, bytes], bytes]] = {
            INIT: self.init, LOOKUP: self.lookup, GETATTR: self.getattr, READLINK: self.readlink, OPEN: self.open,
            READ_DATA: self.read, RELEASE: self.release, OPENDIR: self.opendir, READDIR: self.readdir,
            READDIRPLUS: self.readdirplus, RELEASEDIR: self.releasedir, DESTROY: lambda node, body: b"",
        }  # fmt: skip

    def answer(self, opcode: int, node: int, body: bytes) -> bytes:
        """The answer's body; OSError for an error."""
        if opcode not in self.answers:
            raise OSError(errno.ENOSYS, "")
        name = NAMES.get(opcode)
        # The kernel asks for a page once more by itself when a read failed: a handle that failed stays so.
        if opcode == READ_DATA and READ.unpack_from(body)[0] in self.stale:
            raise OSError(self.failures.number, "")
        if name and self.failures.due(name, self.paths[node]):
            self.counters.n_failed += 1
            if opcode == READ_DATA:
                self.stale.add(READ.unpack_from(body)[0])
            raise OSError(self.failures.number, "")
        return self.answers[opcode](node, body)

    def init(self, _node: int, body: bytes) -> bytes:
        major, minor, ahead, _flags = INIT_IN.unpack_from(body)
        flags = ASYNC_READ | DO_READDIRPLUS | PARALLEL_DIROPS | MAX_PAGES
        # Reads through the page cache count as background; by default the kernel has 12 of them under way at most.
        return INIT_OUT.pack(major, min(minor, 31), ahead, flags, 1024, 1024, 4096, 1, PAGES, 0, 0, 0)

    def entry(self, path: bytes, found: os.stat_result) -> bytes:
        node = self.nodes.get(path)
        if node is None:
            node = self.nodes[path] = next(self.numbers)
            self.paths[node] = path
        return ENTRY.pack(node, 0, AN_HOUR, AN_HOUR, 0, 0) + attributes(found)

    def lookup(self, node: int, body: bytes) -> bytes:
        self.counters.n_stats += 1
        path = self.paths[node] + b"/" + body.partition(b"\0")[0]
        return self.entry(path, os.lstat(path))

    def getattr(self, node: int, _body: bytes) -> bytes:
        self.counters.n_stats += 1
        return ATTR_HEAD.pack(AN_HOUR, 0, 0) + attributes(os.lstat(self.paths[node]))

    def readlink(self, node: int, _body: bytes) -> bytes:
        return os.readlink(self.paths[node])

    def open(self, node: int, _body: bytes) -> bytes:
        return OPENED.pack(os.open(self.paths[node], os.O_RDONLY | os.O_CLOEXEC), KEEP_CACHE | NO_FLUSH, 0)

    def read(self, _node: int, body: bytes) -> bytes:
        fd, offset, size = READ.unpack_from(body)
        data = os.pread(fd, size, offset)
        self.counters.n_bytes += len(data)
        return data

    def release(self, _node: int, body: bytes) -> bytes:
        fd = READ.unpack_from(body)[0]
        self.stale.discard(fd)
        os.close(fd)
        return b""

    def opendir(self, node: int, _body: bytes) -> bytes:
        self.counters.n_lists += 1
        handle = next(self.numbers)
        self.listings[handle] = list(os.scandir(self.paths[node]))
        return OPENED.pack(handle, 0, 0)

    def readdir(self, _node: int, body: bytes) -> bytes:
        return self.listed(body, lambda entry: b"")

    def readdirplus(self, _node: int, body: bytes) -> bytes:
        return self.listed(body, lambda entry: self.entry(entry.path, entry.stat(follow_symlinks=False)))

    def listed(self, body: bytes, more: Callable[[os.DirEntry[bytes]], bytes]) -> bytes:
        handle, offset, room = READ.unpack_from(body)
        answer = bytearray()
        entries = self.listings[handle]
        for at in range(offset, len(entries)):
            entry = entries[at]
            head = DIRENT.pack(entry.inode(), at + 1, len(entry.name), 0) + entry.name
            one = more(entry) + head + bytes(-len(head) % 8)
            if len(answer) + len(one) > room:
                break
            answer += one
        return bytes(answer)

    def releasedir(self, _node: int, body: bytes) -> bytes:
        del self.listings[READ.unpack_from(body)[0]]
        return b""


class Server:
    """The event loop: takes requests from the kernel, lets opens and reads wait their time, answers."""

    def __init__(self, device: int, far: Far, delay_seconds: float) -> None:
        self.device, self.far, self.delay, self.counters = device, far, delay_seconds, far.counters
        self.waiting: deque[tuple[float, int, int, int, bytes]] = deque()  # all wait equally long: in order of arrival

    def serve(self, asked: int, save: Callable[[], None]) -> None:
        """Until it is unmounted; calls `save` whenever something comes on the descriptor `asked`."""
        while True:
            self.answer_due()
            try:
                request = os.read(self.device, 8192)
            except BlockingIOError:
                left = max(0.0, self.waiting[0][0] + self.delay - time.monotonic()) if self.waiting else None
                if asked in select.select([self.device, asked], [], [], left)[0]:
                    os.read(asked, 100)
                    save()
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                if error.errno not in (errno.ENOENT, errno.EINTR):  # a request that was withdrawn
                    raise
            else:
                self.take(request)

    def take(self, request: bytes) -> None:
        _, opcode, unique, node, *_ = IN.unpack_from(request)
        if opcode in (OPEN, READ_DATA):
            now = time.monotonic()
            self.counters.began = self.counters.began or now
            self.counters.n_opens += opcode == OPEN
            self.counters.n_reads += opcode == READ_DATA
            self.waiting.append((now, opcode, unique, node, request[IN.size :]))
            self.counters.most_in_flight = max(self.counters.most_in_flight, len(self.waiting))
        elif opcode not in SILENT:
            self.reply(opcode, unique, node, request[IN.size :])

    def answer_due(self) -> None:
        while self.waiting and (now := time.monotonic()) >= self.waiting[0][0] + self.delay:
            began, *request = self.waiting.popleft()
            self.reply(*request)
            self.counters.busy_seconds += now - began
            self.counters.ended = now

    def reply(self, opcode: int, unique: int, node: int, body: bytes) -> None:
        try:
            data, error = self.far.answer(opcode, node, body), 0
        except OSError as failed:
            data, error = b"", failed.errno or errno.EIO
        try:
            os.writev(self.device, [OUT.pack(OUT.size + len(data), -error, unique), data])
        except OSError as failed:
            if failed.errno not in (errno.ENOENT, errno.ENODEV):  # nobody waits for it any more
                raise


def attributes(found: os.stat_result) -> bytes:
    """A fuse_attr."""
    times = [divmod(ns, 10**9) for ns in (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns)]
    return ATTRIBUTES.pack(
        found.st_ino, found.st_size, found.st_blocks, *(seconds for seconds, _ in times), *(ns for _, ns in times),
        found.st_mode, found.st_nlink, found.st_uid, found.st_gid, 0, found.st_blksize, 0,
    )  # fmt: skip


def mount(mountpoint: str) -> int:
    """The mounted device; fusermount3 hands it over, so this needs no root."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        options = "ro,nosuid,nodev,default_permissions,fsname=far,subtype=far"
        command = ["fusermount3", "-o", options, "--", mountpoint]
        env = {**os.environ, "_FUSE_COMMFD": str(theirs.fileno())}
        subprocess.run(command, check=True, env=env, pass_fds=[theirs.fileno()])
        _, (device, *_), _, _ = socket.recv_fds(ours, 1, 1)
    os.set_blocking(device, False)
    return device


def main() -> None:
    """Mount, serve until unmounted, write the counters."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("source")
    options.add_argument("mountpoint")
    options.add_argument("counters")
    options.add_argument("--delay-ms", type=float, default=0.0)
    options.add_argument("--fail-every", type=int, default=0)
    options.add_argument("--errno", default="EIO")
    options.add_argument("--match", default="*")
    options.add_argument("--operation", choices=("open", "read", "any", "stat", "list"), default="any")
    given = options.parse_args()
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.fileno())
    signal.signal(signal.SIGUSR1, lambda number, frame: None)
    failures = Failures(given.fail_every, getattr(errno, given.errno), given.match, given.operation)
    counters = Counters()
    far = Far(os.fsencode(given.source), failures, counters)
    Server(mount(given.mountpoint), far, given.delay_ms / 1000).serve(
        ours.fileno(), lambda: counters.save(given.counters)
    )
    counters.save(given.counters)


if __name__ == "__main__":
    main()
