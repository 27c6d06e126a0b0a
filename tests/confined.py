"""Commands run in a memory cgroup of their own, and what their process trees took.

Invariant: the group and everything in it is gone when `run` returns. Without the right to make a group the command
runs all the same, watched but not confined: `Taken.confined` says which.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_SAMPLE_SECONDS = 0.02
_PAGE = os.sysconf("SC_PAGE_SIZE")
# In a shell, so that not one byte of the command is counted elsewhere.
_ENTER = 'echo $$ > "$0" && exec "$@"'


@dataclass(frozen=True)
class Taken:
    """What a command took: peaks of resident and of anonymous bytes of all its processes together, sampled.

    `resident` counts pages that processes share once for each of them. `anonymous` is the cgroup's own count (with
    shared memory, without the page cache), as are `n_killed` (processes the kernel killed for memory) and `n_reclaims`
    (how often the group was full, cached files included); all three are 0 when not `confined`.
    """

    returncode: int
    out: str
    err: str
    seconds: float
    resident: int
    anonymous: int
    n_killed: int
    n_reclaims: int
    confined: bool


@dataclass(frozen=True)
class Group:
    """A memory cgroup, of version 1 or 2."""

    path: Path
    is_v1: bool

    def limit(self, n_bytes: int) -> None:
        """Set the most that it may hold, without swap."""
        names = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes") if self.is_v1 else ("memory.max",)
        for name in names:
            if (self.path / name).exists():
                (self.path / name).write_text(str(n_bytes))
        if not self.is_v1:
            with contextlib.suppress(OSError):
                (self.path / "memory.swap.max").write_text("0")

    def anonymous(self) -> int:
        """Bytes that are in no file: of processes, and in shared memory."""
        found = self._numbers("memory.stat")
        return sum(found[name] for name in (("total_rss", "total_shmem") if self.is_v1 else ("anon", "shmem")))

    def n_killed(self) -> int:
        """Processes that the kernel killed because the group was full."""
        return self._numbers("memory.oom_control" if self.is_v1 else "memory.events")["oom_kill"]

    def n_reclaims(self) -> int:
        """How often the group was full, which cached files alone do as well."""
        return int((self.path / "memory.failcnt").read_text()) if self.is_v1 else self._numbers("memory.events")["max"]

    def pids(self) -> list[int]:
        """Its processes."""
        return [int(line) for line in (self.path / "cgroup.procs").read_text().split()]

    def _numbers(self, name: str) -> dict[str, int]:
        lines = (line.split() for line in (self.path / name).read_text().splitlines())
        return {key: int(value) for key, value in lines}


def run(command: Sequence[str], limit: int, env: Mapping[str, str] | None = None) -> Taken:
    """Run `command` to its end in a group of `limit` bytes, where one can be made; else merely watch it."""
    began = time.perf_counter()
    with group(limit) as confinement:
        entered = ["/bin/sh", "-c", _ENTER, str(confinement.path / "cgroup.procs")] if confinement else []
        with subprocess.Popen(
            [*entered, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        ) as process:
            resident, anonymous = _watch(process, confinement)
            out, err = process.communicate()
        killed, reclaims = (confinement.n_killed(), confinement.n_reclaims()) if confinement else (0, 0)
    seconds = time.perf_counter() - began
    return Taken(
        process.returncode, out, err, seconds, resident, anonymous, killed, reclaims, confined=confinement is not None
    )


@contextlib.contextmanager
def group(limit: int) -> Iterator[Group | None]:
    """A fresh group below our own, with a limit; None where we may not make one."""
    made = _make()
    if made is None:
        yield None
        return
    try:
        made.limit(limit)
        yield made
    finally:
        for pid in made.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        _remove(made.path)


def _make() -> Group | None:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers == "memory":
            parent, is_v1 = Path("/sys/fs/cgroup/memory", name.lstrip("/")), True
        elif controllers == "" and Path("/sys/fs/cgroup/cgroup.controllers").exists():
            parent, is_v1 = Path("/sys/fs/cgroup", name.lstrip("/")), False
        else:
            continue
        made = Group(parent / f"tsclust-{os.getpid()}-{time.monotonic_ns()}", is_v1)
        try:
            if not is_v1:
                (parent / "cgroup.subtree_control").write_text("+memory")  # refused where the parent has processes
            made.path.mkdir()
        except OSError:
            continue
        return made
    return None


def _remove(path: Path) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            path.rmdir()
            return
        except OSError:  # its last process is on its way out
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _watch(process: subprocess.Popen[str], confinement: Group | None) -> tuple[int, int]:
    """Peaks of resident and anonymous bytes until the command ends. Its output must fit into pipes."""
    resident = anonymous = 0
    while process.poll() is None:
        pids = confinement.pids() if confinement else _tree(process.pid)
        resident = max(resident, sum(map(_resident, pids)))
        anonymous = max(anonymous, confinement.anonymous() if confinement else 0)
        time.sleep(_SAMPLE_SECONDS)
    return resident, anonymous


def _tree(pid: int) -> list[int]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    return []


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except OSError:  # it ended while we looked
        return 0
