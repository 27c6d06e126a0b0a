"""Writing a partition as a task of a worker process, on this node or another.

Invariant: a task is small, whatever the number of shards; a worker opens what it needs once and keeps it from task to
task: the plan, a parser, its stage. It closes them when it ends or had nothing to do for a while; of one that is killed
the parser ends with its pipe, and its leases in scratch are swept by the next who closes a stage there.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tsclust_ooc.consolidate import Done, write_partition
from tsclust_ooc.plan import Partition
from tsclust_ooc.reading import RowReader
from tsclust_ooc.shards.parsers import Parsers
from tsclust_ooc.staging import Staging
from tsclust_ooc.work import Work, load_plan, noticing_others

_IDLE_SECONDS = 60.0
_PARSERS = 1  # a worker does one task at a time


@dataclass(frozen=True)
class WriteTask:
    """`write_partition` for worker processes: where the work lies and how to stage, for a plan of many shards is large.

    Call it with a partition. Superseded when the work directory is gone.
    """

    final: Path
    root: Path
    plan_digest: str
    staging: Staging
    task_name: str
    presumed: bool = False

    def __call__(self, partition: Partition) -> Done:
        """Write `partition`, with this process's bench."""
        with _bench_for(self) as bench:
            done = write_partition(bench.work, bench.reader, partition)
            bench.tidy()
            return replace(done, n_retries=bench.new_retries())


def write_task(work: Work, staging: Staging, *, presumed: bool = False) -> WriteTask:
    """The task that writes partitions of `work`; its name says whether it may copy shards to scratch first.

    `presumed`: the plan comes from a survey that presumed, and what a task reads must prove it.

    The copy is part of the task, not one before it: on several nodes the two could run on different ones.
    """
    copies = staging.remote is not None
    if not copies:
        stage = staging.open(work.plan.source)
        copies = any(not stage.reads_directly(shard.size) for shard in work.plan.shards)
    name = "stage-write-chunk" if copies else "write-chunk"
    return WriteTask(work.final, work.root, work.plan.digest, staging, name, presumed)


class _Bench:
    """What a worker process keeps from task to task."""

    def __init__(self, task: WriteTask) -> None:
        with noticing_others(task.root):
            self.work = Work(task.final, task.root, load_plan(task.root))
        self.n_users = 0
        self.closing: threading.Timer | None = None
        self._parsers = Parsers(_PARSERS)
        self.patience, self._told_retries = self._parsers.patience, 0
        self._stage = task.staging.open(self.work.plan.source, self.patience)
        self._largest = max((shard.size for shard in self.work.plan.shards), default=0)
        self.reader = RowReader(self.work.plan, self._parsers, self._stage, presumed=task.presumed)

    def tidy(self) -> None:
        """Where scratch gets full, give back the copies that are not in use: other workers here need room too."""
        self._stage.give_back(4 * self._largest)

    def new_retries(self) -> int:
        """Reads that were tried again since this was asked last."""
        told, self._told_retries = self._told_retries, self.patience.n_retries
        return self._told_retries - told

    def close(self) -> None:
        if self.closing is not None:
            self.closing.cancel()
        self._parsers.__exit__()
        self._stage.close()


_benches: dict[tuple[Path, str, bool], _Bench] = {}
_guard = threading.Lock()


@contextlib.contextmanager
def _bench_for(task: WriteTask) -> Iterator[_Bench]:
    """This process's bench for the work of `task`; one that nobody uses any more gives way to another work's."""
    key = task.root, task.plan_digest, task.presumed
    with _guard:
        if key not in _benches:
            _close(lambda other: other.n_users == 0)
            _benches[key] = _Bench(task)
        bench = _benches[key]
        bench.n_users += 1
        if bench.closing is not None:
            bench.closing.cancel()
    try:
        yield bench
    finally:
        with _guard:
            bench.n_users -= 1
            if bench.n_users == 0:
                # A cluster that somebody else started lives on when our work is done.
                bench.closing = threading.Timer(_IDLE_SECONDS, _close_idle, [bench])
                bench.closing.daemon = True
                bench.closing.start()


def _close_idle(bench: _Bench) -> None:
    with _guard:
        _close(lambda other: other is bench and other.n_users == 0)


def _close(wanted: Callable[[_Bench], bool] = lambda bench: True) -> None:
    for key in [key for key, bench in _benches.items() if wanted(bench)]:
        _benches.pop(key).close()


atexit.register(_close)
