"""What this process may use: memory, cores and scratch, read from the limits that really bind it.

Invariant: nothing here trusts the size of the machine. A job in a cgroup or a Slurm allocation sees its own share.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tsclust_ooc.errors import CannotWrite, UsageError
from tsclust_ooc.units import format_bytes, parse_bytes

BASE_BYTES = 450 * 10**6
"""Resident memory of the interpreter with everything a long command imports, measured (zarr, dask, numba, pyarrow)."""


_ROOT = Path("/")
"""Where /proc and /sys are found."""


@dataclass(frozen=True)
class Budget:
    """Memory (bytes, whole process tree) and worker count that a command promises to stay within."""

    memory_bytes: int
    n_workers: int

    @property
    def working_bytes(self) -> int:
        """Bytes left for arrays after the interpreter and its libraries."""
        return self.memory_bytes - BASE_BYTES

    def workers_that_fit(self, bytes_each: int, what: str, besides: int = 0) -> int:
        """How many workers of `bytes_each` run side by side, at most `n_workers`, when the driver holds `besides`.

        CannotWrite if not even one does, saying what would do.
        """
        fit = (self.working_bytes - besides) // max(bytes_each, 1)
        if fit < 1:
            least = bytes_each + besides + BASE_BYTES
            raise CannotWrite(
                f"{what} needs {format_bytes(least)} of memory with one worker, "
                f"and --memory allows {format_bytes(self.memory_bytes)}. "
                f"Use: --memory {format_bytes(1.05 * least).replace(' ', '')}, or smaller chunks."
            )
        return int(min(fit, self.n_workers))


def resolve(memory: str | int | None = None, workers: int | None = None) -> Budget:
    """The budget for the options `--memory` and `--workers`; each default comes from this process's own limits."""
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers} leaves nobody to work. Use 1 or more.")
    memory_bytes = memory_limit() // 2 if memory is None else parse_bytes(memory)
    if memory_bytes <= BASE_BYTES:
        raise UsageError(
            f"--memory {format_bytes(memory_bytes)} is less than the libraries alone need. "
            f"Use at least {format_bytes(BASE_BYTES + 150 * 10**6)}."
        )
    return Budget(memory_bytes, workers or available_cores())


def available_cores() -> int:
    """Cores this process may run on: its affinity mask, and the quota of its cgroup (v1 or v2) where one is set."""
    cores = len(os.sched_getaffinity(0))
    for path in _cgroup_files("cpu", "cpu.max", "cpu.cfs_quota_us"):
        quota = _cpu_quota(path)
        if quota is not None:
            cores = min(cores, max(1, int(quota)))
    return cores


def memory_limit() -> int:
    """Bytes this process tree can hold: the least of its cgroups, its Slurm allocation, RLIMIT_AS and MemAvailable."""
    limits = [_mem_available()]
    limits += [n for path in _cgroup_files("memory", "memory.max", "memory.limit_in_bytes") if (n := _number(path))]
    slurm = _slurm_memory()
    if slurm is not None:
        limits.append(slurm)
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space)
    return min(limits)


def _slurm_memory() -> int | None:
    """Slurm's grant in bytes (its variables are in MiB), or None outside a job."""
    if per_node := _slurm_number("SLURM_MEM_PER_NODE"):
        return per_node * 2**20
    per_cpu, cpus = _slurm_number("SLURM_MEM_PER_CPU"), _slurm_number("SLURM_CPUS_ON_NODE")
    return per_cpu * cpus * 2**20 or None


def _slurm_number(name: str) -> int:
    """The number in a variable; 0 where it is not set, or is set to 0, which asks Slurm for all there is."""
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else 0


def _mem_available() -> int:
    for line in (_ROOT / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))


def _cgroup_files(controller: str, v2_name: str, v1_name: str) -> Iterator[Path]:
    """Limit files of this process's cgroup and all its ancestors, for both cgroup versions."""
    try:
        lines = (_ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, name = _ROOT / "sys/fs/cgroup", v2_name
        elif controller in controllers.split(","):
            root, name = _ROOT / "sys/fs/cgroup" / controller, v1_name
        else:
            continue
        here = root / group.lstrip("/")
        for folder in (here, *here.parents):
            yield folder / name
            if folder == root:
                break


def _number(path: Path) -> int | None:
    """The limit in `path`, or None where there is no file, no number ('max') or the kernel's 'no limit'."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < 2**60 else None


def _cpu_quota(path: Path) -> float | None:
    """Cores granted by `cpu.max` ('quota period') or `cpu.cfs_quota_us` (period beside it), or None without a limit."""
    try:
        words = path.read_text().split()
        if path.name == "cpu.cfs_quota_us":
            words.append(path.with_name("cpu.cfs_period_us").read_text().strip())
    except OSError:
        return None
    if len(words) < 2 or not words[0].isdigit():
        return None
    return int(words[0]) / int(words[1])
