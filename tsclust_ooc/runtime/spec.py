"""What to run on, and what a runtime gives: the words the other modules of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tsclust_ooc.budget import BASE_BYTES
from tsclust_ooc.errors import CannotWrite, UsageError
from tsclust_ooc.units import format_bytes, parse_bytes, plural

SCHEDULERS = ("threads", "local", "slurm")
"""What `ClusterSpec.scheduler` accepts besides the address of a running scheduler."""

ADDRESS = "tls://"
"""How the address of a running scheduler begins; other protocols are not encrypted."""

LEAST_WORKER_BYTES = 350 * 10**6
"""A worker process with zarr, numba and dask.array loaded is 250 MB (measured); below this it would die at once."""

_NANNY_BYTES = 120 * 10**6  # the process that watches a job's workers, measured

Function = Callable[[Any], Any]


@dataclass(frozen=True)
class Jobs:
    """What a batch scheduler is asked for, and how its jobs reach this process.

    Attributes
    ----------
    queue
        Partition (Slurm) or queue of the jobs. Default: the site's.
    account
        Account or project the jobs are charged to. Default: yours.
    walltime
        Most time of a job, like 04:00:00. Default: the site's.
    job_memory
        Memory of one job, like 8GB. Default: 4GB for workers (--scheduler slurm), the site's for submitted jobs.
    job_cores
        Cores of one job; with --scheduler slurm also its worker processes. Default: 1, or the site's.
    min_workers
        With --scheduler slurm: fewest worker processes kept while there is little to do; --workers is the most.
        Default: as many as that.
    interface
        Network interface that scheduler and workers listen on, like ib0. Needed by --scheduler slurm: nothing
        listens beyond it.
    tls
        Directory with ca.pem, cert.pem and key.pem for --scheduler tls://... Default: what dask's configuration says.
    directives
        A further directive of the jobs, as the scheduler writes it, dashes and all; may be given several times.
    """

    queue: str | None = None
    account: str | None = None
    walltime: str | None = None
    job_memory: str | None = None
    job_cores: int | None = None
    min_workers: int | None = None
    interface: str | None = None
    tls: Path | None = None
    directives: tuple[str, ...] = ()

    @property
    def memory_bytes(self) -> int:
        """Memory of one job."""
        return parse_bytes(self.job_memory or "4GB")

    @property
    def n_cores(self) -> int:
        """Cores of one job."""
        return self.job_cores or 1


@dataclass(frozen=True)
class ClusterSpec:
    """What to run on: `scheduler` (one of SCHEDULERS, or tls://HOST:PORT), workers, bytes, directories.

    `memory_bytes` is what the process tree here may use, `scratch` a private directory of this node. Workers of other
    nodes are given to `jobs`, and read their keys from a private directory made in `shared` (slurm).

    Raises UsageError for a scheduler that is not known or for less than one worker.
    """

    scheduler: str
    n_workers: int
    memory_bytes: int
    scratch: Path
    jobs: Jobs = Jobs()
    shared: Path | None = None

    def __post_init__(self) -> None:
        if self.scheduler not in SCHEDULERS and not self.scheduler.startswith(ADDRESS):
            raise UsageError(
                f"--scheduler {self.scheduler} is not known. Use one of: {', '.join(SCHEDULERS)}, "
                f"or the address of a running one, {ADDRESS}HOST:PORT."
            )
        if self.n_workers < 1:
            raise UsageError(f"--workers {self.n_workers} leaves nobody to work. Use 1 or more.")
        if not 1 <= self.least_workers <= self.n_workers:
            raise UsageError(
                f"--min-workers {self.jobs.min_workers} is not between 1 and --workers {self.n_workers}. "
                "Use one that is, or leave it away."
            )
        if self.jobs.n_cores < 1:
            raise UsageError(f"--job-cores {self.jobs.job_cores} leaves nobody to work. Use 1 or more.")

    @property
    def least_workers(self) -> int:
        """Workers that are kept even while there is little to do."""
        return self.n_workers if self.jobs.min_workers is None else self.jobs.min_workers

    @property
    def threaded(self) -> bool:
        """Whether the work is done by threads of this process, which share its memory."""
        return self.scheduler == "threads"


class Runtime(Protocol):
    """Somewhere to run tasks, open until its block ends."""

    @property
    def n_workers(self) -> int:
        """Tasks that run side by side."""

    @property
    def dashboard(self) -> str:
        """URL of the live dashboard, '' where there is none."""

    def mapper(self, fn: Function, items: Iterable[Any]) -> Iterator[Any]:
        """`fn` of each item, in order, like builtin `map`; at most two tasks a worker run ahead of the consumer.

        An error of a task is raised at its place and the tasks behind it are cancelled. Tasks are named after
        `fn.task_name` or else `fn.__name__`.
        """

    def save_report(self, path: Path) -> None:
        """Write what the cluster did as one HTML page that opens offline; never fails, tells the listener instead."""


def worker_bytes(spec: ClusterSpec) -> int:
    """Memory limit of each worker process of a cluster that is started.

    Local ones get an equal share of what this process itself leaves of `memory_bytes`, those of a job an equal share
    of the job's. Raises CannotWrite when that is less than a worker needs to live.
    """
    if spec.scheduler == "slurm":
        return _job_share(spec.jobs)
    share = (spec.memory_bytes - BASE_BYTES) // spec.n_workers
    if share < LEAST_WORKER_BYTES:
        fit = (spec.memory_bytes - BASE_BYTES) // LEAST_WORKER_BYTES
        enough = format_bytes(BASE_BYTES + spec.n_workers * LEAST_WORKER_BYTES + 5 * 10**6).replace(" ", "")
        raise CannotWrite(
            f"a local cluster of {plural(spec.n_workers, 'worker')} needs {format_bytes(LEAST_WORKER_BYTES)} a worker "
            f"and {format_bytes(BASE_BYTES)} besides, and --memory allows {format_bytes(spec.memory_bytes)}. "
            f"Use: --memory {enough}, " + (f"--workers {fit}, " if fit > 0 else "") + "or --scheduler threads."
        )
    return share


def _job_share(jobs: Jobs) -> int:
    share = (jobs.memory_bytes - _NANNY_BYTES) // jobs.n_cores
    if share < LEAST_WORKER_BYTES:
        enough = format_bytes(1.01 * (_NANNY_BYTES + jobs.n_cores * LEAST_WORKER_BYTES)).replace(" ", "")
        raise CannotWrite(
            f"a job of {plural(jobs.n_cores, 'worker')} needs "
            f"{format_bytes(LEAST_WORKER_BYTES)} for each and {format_bytes(_NANNY_BYTES)} besides, and --job-memory "
            f"allows {format_bytes(jobs.memory_bytes)}. Use: --job-memory {enough}, or fewer --job-cores."
        )
    return share
