"""The work directory: an unpublished consolidation, what lies where in it, and what is done.

Invariant: it is named after its plan, so that two commands with different plans never share a file, and two with the
same plan only ever write the same bytes. A partition is done when its receipt says so, and a receipt counts only for
the inputs it names. Nobody but its owner can look into it (mode 0700); what will be published has the modes that the
umask gives.

    .NAME.PLAN.wip/plan.json      the plan; written last by init          dataset/   what will be published
                   shards.parquet its shards, in row order                receipts/  I.json, one a partition
                   rejected.json  shards the survey left out              problems/  I.json, bad shards met
                   asked          made anew by each --init: the youngest is the work that --partition is about
                   base/ leaving.* old/  of work that appends to a dataset: see `appending`
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tsclust_ooc import files, records
from tsclust_ooc.dataset import SHARDS, read_shards, shard_table, work_folders
from tsclust_ooc.errors import BadInput, TryAgain, UsageError
from tsclust_ooc.files import FileEntry
from tsclust_ooc.plan import Partition, Plan
from tsclust_ooc.shards.schema import Problem
from tsclust_ooc.store import make_dirs
from tsclust_ooc.units import plural

WORK_VERSION = 3
_ASKED = "asked"
PASSING = ("unreadable", "unstable", "timeout")
"""Codes of problems that the next run may not meet: the disk, the network or a writer did them, not the content."""


@dataclass(frozen=True)
class Work:
    """An initialized consolidation: where its files lie, and its plan."""

    final: Path
    root: Path
    plan: Plan

    @property
    def dataset(self) -> Path:
        """The directory that will become the dataset."""
        return self.root / "dataset"

    def receipt(self, index: int) -> Path:
        """The receipt of a partition."""
        return self.root / "receipts" / f"{index}.json"

    def problem(self, index: int) -> Path:
        """The shards of a partition that could not be read."""
        return self.root / "problems" / f"{index}.json"


@dataclass(frozen=True)
class Receipt:
    """A partition is written: the digest of its inputs, and the files it made."""

    inputs: str
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class BadShard:
    """A shard whose data turned out to be bad, with the stamp it had."""

    size: int
    mtime_ns: int
    problem: Problem


@dataclass(frozen=True)
class BadShards:
    """What is in a file of `problems/`."""

    shards: tuple[BadShard, ...]


class Superseded(Exception):
    """The work directory went away under us: another process published or replaced this work."""


@contextlib.contextmanager
def noticing_others(root: Path) -> Iterator[None]:
    """Raise Superseded when what should be in work directory `root` is gone: only another process takes it away.

    It published the work, swept it, or removed a file of ours that was not finished while it was publishing.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        # zarr's own error names no file; it reads nowhere but in the work directory.
        if error.filename is not None and not Path(error.filename).is_relative_to(root):
            raise
        raise Superseded(str(root)) from error
    except (BadInput, TryAgain) as error:  # receipts may be missing because everything is
        if (root / "dataset").is_dir():
            raise
        raise Superseded(str(root)) from error


def work_root(final: Path, plan: Plan) -> Path:
    """Where the work for `plan` lies: beside the final name, on the same filesystem."""
    return files.work_name(final, records.digest([plan.digest, plan.base]) if plan.base else plan.digest)


def known_bad(final: Path) -> Callable[[str, int, int], Problem | None]:
    """What earlier reads of the data found, as the `known_bad` of a survey: by path and stamp."""
    found: dict[tuple[str, int, int], Problem] = {}
    for root in work_folders(final):
        for path in sorted((root / "problems").glob("*.json")):
            with contextlib.suppress(BadInput, FileNotFoundError):
                for bad in records.load(path, BadShards, WORK_VERSION).shards:
                    found[bad.problem.path, bad.size, bad.mtime_ns] = bad.problem
    return lambda path, size, mtime_ns: found.get((path, size, mtime_ns))


def make_folders(work: Work) -> None:
    """The directories of `work`, its own for nobody else: what is not published is not whole, and not for other eyes.

    What will be published gets the modes that the umask gives, like any other directory.
    """
    work.root.mkdir(mode=0o700, exist_ok=True)
    for folder in (work.dataset, work.root / "receipts", work.root / "problems"):
        folder.mkdir(exist_ok=True)


def mark_asked(work: Work) -> None:
    """Note that `work` is what --init was asked for last, of all the work for its name."""
    with noticing_others(work.root):
        files.write_atomic(work.root / _ASKED, b"")


def open_work(final: Path, complaint: Callable[[Plan], str] = lambda plan: "") -> Work:
    """The initialized work for `final` (job arrays: in another process than `init`).

    Of several it is the one that --init made last. `complaint` says what about a plan is not as the caller wants it,
    '' if all is; it sees the plan without its shards.

    Raises
    ------
    BadInput
        There is none, or several that --init did not make.
    UsageError
        There is none that `complaint` has nothing to say about; with what it says of the one that --init made last.
    """
    plans = {root: plan for root in work_folders(final) if (plan := _plan_alone(root)) is not None}
    told = {root: complaint(plan) for root, plan in plans.items()}
    roots = sorted((root for root in plans if not told[root]), key=_asked_ns, reverse=True)
    if plans and not roots:
        raise UsageError(told[max(plans, key=_asked_ns)])
    if not roots or (len(roots) > 1 and _asked_ns(roots[0]) == _asked_ns(roots[1])):
        raise BadInput(
            f"{final}: {plural(len(roots), 'initialized consolidation')} found, wanted one. Run the same command with "
            "--init first: of several, the one it was run for last is meant."
        )
    with noticing_others(roots[0]):
        return Work(final, roots[0], load_plan(roots[0]))


def _plan_alone(root: Path) -> Plan | None:
    """The plan of a work directory without its shards; None where there is none, or one of another version."""
    with contextlib.suppress(BadInput, FileNotFoundError):
        return records.load(root / "plan.json", Plan, WORK_VERSION)
    return None


def _asked_ns(root: Path) -> int:
    """When --init was last run for a work directory, on the clock of its filesystem; 0 if it never was."""
    with contextlib.suppress(FileNotFoundError):
        return (root / _ASKED).stat().st_mtime_ns
    return 0


def pending(work: Work) -> list[Partition]:
    """Partitions without a receipt for their inputs."""
    return [p for p in work.plan.partitions if receipt_of(work, p) is None]


def record_bad(work: Work, partition: Partition, bad: Sequence[BadShard]) -> None:
    """Remember shards whose content is bad; what the disk or a changing file did may be gone next time."""
    lasting = tuple(b for b in bad if b.problem.code not in PASSING)
    if lasting:
        records.save(work.problem(partition.index), BadShards(lasting), WORK_VERSION)


def recorded_bad(work: Work, partition: Partition) -> tuple[BadShard, ...]:
    """The bad shards of a partition that a read of it remembered."""
    try:
        return records.load(work.problem(partition.index), BadShards, WORK_VERSION).shards
    except (FileNotFoundError, BadInput):
        return ()


def adopt(work: Work) -> None:
    """Keep the partitions of earlier work whose inputs are the same, by hard links (files are never changed in place).

    So nothing is lost when one shard was repaired, or the bad ones are now skipped. Where links are not possible the
    partitions are written again.
    """
    receipts: dict[str, tuple[Path, Receipt]] = {}
    for root in work_folders(work.final):
        if root != work.root:
            for path in (root / "receipts").glob("*.json"):
                with contextlib.suppress(BadInput, FileNotFoundError):
                    receipt = records.load(path, Receipt, WORK_VERSION)
                    receipts[receipt.inputs] = (root / "dataset", receipt)
    for partition in work.plan.partitions if receipts else ():
        inputs = work.plan.inputs_digest(partition)
        if inputs in receipts and receipt_of(work, partition) is None:
            origin, receipt = receipts[inputs]
            with contextlib.suppress(OSError):
                for name in receipt.files:
                    make_dirs(work.dataset, (work.dataset / name).parent)
                    with contextlib.suppress(FileExistsError):
                        os.link(origin / name, work.dataset / name)
                    files.fsync_dir((work.dataset / name).parent)
                if whole(work, receipt):
                    records.save(work.receipt(partition.index), receipt, WORK_VERSION)


def whole(work: Work, receipt: Receipt) -> bool:
    """Whether every file of a receipt is there with its size."""
    return all((work.dataset / name).stat().st_size == entry.n_bytes for name, entry in receipt.files.items())


def receipt_of(work: Work, partition: Partition) -> Receipt | None:
    """The receipt of a partition, if it is for the plan's inputs and its files are all there with their sizes."""
    try:
        receipt = records.load(work.receipt(partition.index), Receipt, WORK_VERSION)
        if receipt.inputs == work.plan.inputs_digest(partition) and whole(work, receipt):
            return receipt
    except (FileNotFoundError, BadInput):
        pass
    return None


def save_plan(work: Work) -> None:
    """Write the plan and its shards; the plan last, it says that the directory is ready."""
    files.write_atomic(work.root / SHARDS, parquet_bytes(shard_table(work.plan.shards)))
    records.save(work.root / "plan.json", work.plan, WORK_VERSION)


def parquet_bytes(table: pa.Table) -> bytes:
    """`table` as a parquet file in memory."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def load_plan(root: Path) -> Plan:
    """The plan of a work directory, with its shards."""
    plan = records.load(root / "plan.json", Plan, WORK_VERSION)
    return replace(plan, shards=read_shards(root / SHARDS))
