"""What a long command holds while it works: its result's name under a lock, its limits, scratch, a meter, a runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tsclust_ooc import budget, locks, scratch
from tsclust_ooc.budget import Budget
from tsclust_ooc.errors import CannotWrite, UsageError
from tsclust_ooc.mirror import Mirror
from tsclust_ooc.patience import Patience
from tsclust_ooc.pipeline.options import ComputeOptions
from tsclust_ooc.pipeline.origins import Origin
from tsclust_ooc.progress import Listener
from tsclust_ooc.provenance import Meter
from tsclust_ooc.remote import Remote
from tsclust_ooc.runtime import LEAST_WORKER_BYTES, ClusterSpec, Runtime, open_runtime, worker_bytes
from tsclust_ooc.shards.survey import Local, where_it_is
from tsclust_ooc.staging import Stage, Staging
from tsclust_ooc.units import format_bytes

_LOCK_SECONDS = 0.5


@dataclass(frozen=True)
class Session:
    """A command at work on `final`: open one with `session`. What it enters in `closing` is closed at its end."""

    final: Path
    options: ComputeOptions
    limits: Budget
    scratch: Path
    meter: Meter
    listener: Listener
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False, compare=False)
    mirrors: dict[str, Mirror] = field(default_factory=dict, repr=False, compare=False)

    def spec(self, n_workers: int | None = None) -> ClusterSpec:
        """What the options ask to run on, with as many workers as they allow or as given."""
        n = self.limits.n_workers if n_workers is None else n_workers
        if n_workers is None and self.options.scheduler == "slurm" and self.options.workers is None:
            n = self.options.jobs.n_cores  # the cores here say nothing about how many jobs to ask for
        options = self.options
        return ClusterSpec(options.scheduler, n, self.limits.memory_bytes, self.scratch, options.jobs, self.final)

    def workers_that_fit(self, bytes_each: int, what: str, besides: int = 0) -> int:
        """Workers that hold `bytes_each` of arrays side by side, while this process holds `besides`.

        CannotWrite when not even one does, saying what would do.
        """
        spec = self.spec()
        if spec.scheduler in ("threads", "local"):
            return self.limits.workers_that_fit(bytes_each, what, besides)
        self.limits.workers_that_fit(1, what, besides)
        if spec.scheduler == "slurm" and worker_bytes(spec) < LEAST_WORKER_BYTES + bytes_each:
            least = spec.jobs.n_cores * (LEAST_WORKER_BYTES + bytes_each) + spec.jobs.memory_bytes
            least -= spec.jobs.n_cores * worker_bytes(spec)
            raise CannotWrite(
                f"{what} needs {format_bytes(LEAST_WORKER_BYTES + bytes_each)} of memory in each worker, and "
                f"--job-memory leaves each {format_bytes(worker_bytes(spec))}. "
                f"Use: --job-memory {format_bytes(1.05 * least).replace(' ', '')}, or fewer --job-cores."
            )
        return spec.n_workers

    def local_for(self, source: Origin, patience: Patience) -> Local:
        """Where the survey of this command looks at shards."""
        return self._mirror(source, patience).local if isinstance(source, Remote) else where_it_is

    def stage_for(
        self, source: Origin, staging: Staging, root: str, patience: Patience
    ) -> contextlib.AbstractContextManager[Stage | Mirror]:
        """The stage on which this command reads shards below `root`."""
        if isinstance(source, Remote):
            return contextlib.nullcontext(self._mirror(source, patience))
        return staging.open(root)

    def _mirror(self, remote: Remote, patience: Patience) -> Mirror:
        """What the command has of its source, from its survey to its end."""
        if str(remote) not in self.mirrors:
            place = scratch.scratch_dir(self.options.scratch) if self.scratch == Path() else self.scratch  # a dry run
            mirror = Mirror(Remote(remote.url, patience), place)
            self.mirrors[str(remote)] = self.closing.enter_context(mirror)
        return self.mirrors[str(remote)]

    @contextlib.contextmanager
    def runtime(self, n_workers: int) -> Iterator[Runtime]:
        """Where tasks run."""
        with open_runtime(self.spec(n_workers), self.listener) as opened:
            yield opened


@contextlib.contextmanager
def session(final: Path, kind: str, doing: str, options: ComputeOptions, listener: Listener) -> Iterator[Session]:
    """The lock on `final` among commands of a `kind`, and what they need; TryAgain, `doing` in it, when it is held."""
    limits = budget.resolve(options.memory, options.workers)
    local = scratch.scratch_dir(options.scratch)
    busy = f"{final} is being {doing} by another process. Run the same command again when it is done."
    lock = locks.name_for(local, kind, final)
    holding = locks.hold(lock, wait_seconds=_LOCK_SECONDS, busy=busy, listener=listener)
    with holding, Meter() as meter, contextlib.ExitStack() as closing:
        yield Session(final, options, limits, local, meter, listener, closing)


def check_apart(final: Path, given: Path) -> None:
    """UsageError when a result would lie in what it is made of."""
    if final.resolve().is_relative_to(given.resolve()):
        raise UsageError(f"{final} lies in {given}, which is only read from. Choose another place.")
