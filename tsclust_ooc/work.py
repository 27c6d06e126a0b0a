"""The work directory: an unpublished consolidation, what lies where in it, and what is done.

Invariant: it is named after its plan, so that two commands with different plans never share a file, and two with the
same plan only ever write the same bytes. A partition is done when its receipt says so, and a receipt counts only for
the inputs it names.

    .NAME.PLAN.wip/plan.json      the plan; written last by init          dataset/   what will be published
                   shards.parquet its shards, in row order                receipts/  I.json, one a partition
                   rejected.json  shards the survey left out              problems/  I.json, bad shards met
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tsclust_ooc import columns, files, records
from tsclust_ooc.dataset import work_folders
from tsclust_ooc.errors import BadInput
from tsclust_ooc.files import FileEntry
from tsclust_ooc.plan import Partition, Plan
from tsclust_ooc.shards.schema import Problem, Shard
from tsclust_ooc.units import plural

WORK_VERSION = 1
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
def noticing_others(work: Work) -> Iterator[None]:
    """Raise Superseded when what should be in the work directory is gone: only another process takes it away.

    It published the work, swept it, or removed a file of ours that was not finished while it was publishing.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        # zarr's own error names no file; it reads nowhere but in the work directory.
        if error.filename is not None and not Path(error.filename).is_relative_to(work.root):
            raise
        raise Superseded(str(work.root)) from error
    except BadInput as error:  # receipts may be missing because everything is
        if work.dataset.is_dir():
            raise
        raise Superseded(str(work.root)) from error


def work_root(final: Path, plan: Plan) -> Path:
    """Where the work for `plan` lies: beside the final name, on the same filesystem."""
    return final.with_name(f".{final.name}.{plan.digest[:12]}.wip")


def known_bad(final: Path) -> Callable[[str, int, int], Problem | None]:
    """What earlier reads of the data found, as the `known_bad` of a survey: by path and stamp."""
    found: dict[tuple[str, int, int], Problem] = {}
    for root in work_folders(final):
        for path in sorted((root / "problems").glob("*.json")):
            with contextlib.suppress(BadInput, FileNotFoundError):
                for bad in records.load(path, BadShards, WORK_VERSION).shards:
                    found[bad.problem.path, bad.size, bad.mtime_ns] = bad.problem
    return lambda path, size, mtime_ns: found.get((path, size, mtime_ns))


def open_work(final: Path, root: Path | None = None) -> Work:
    """The initialized work for `final` (job arrays: in another process than `init`).

    Raises BadInput when there is none, or several and `root` does not say which.
    """
    roots = [r for r in work_folders(final) if (r / "plan.json").exists()] if root is None else [root]
    if len(roots) != 1:
        raise BadInput(f"{final}: {plural(len(roots), 'initialized consolidation')} found, wanted one. Run --init.")
    return Work(final, roots[0], load_plan(roots[0]))


def pending(work: Work) -> list[Partition]:
    """Partitions without a receipt for their inputs."""
    return [p for p in work.plan.partitions if receipt_of(work, p) is None]


def record_bad(work: Work, partition: Partition, bad: Sequence[BadShard]) -> None:
    """Remember shards whose content is bad; what the disk or a changing file did may be gone next time."""
    lasting = tuple(b for b in bad if b.problem.code not in PASSING)
    if lasting:
        records.save(work.problem(partition.index), BadShards(lasting), WORK_VERSION)


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
    files.write_atomic(work.root / "shards.parquet", parquet_bytes(_shard_table(work.plan.shards)))
    records.save(work.root / "plan.json", work.plan, WORK_VERSION)


def parquet_bytes(table: pa.Table) -> bytes:
    """`table` as a parquet file in memory."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _shard_table(shards: Sequence[Shard]) -> pa.Table:
    return columns.table({
        "path": columns.text([records.path_to_text(s.path) for s in shards]),
        "split": columns.text([s.split for s in shards]),
        "size": columns.numbers([s.size for s in shards]),
        "mtime_ns": columns.numbers([s.mtime_ns for s in shards]),
        "n_samples": columns.numbers([s.n_samples for s in shards]),
    })  # fmt: skip


def load_plan(root: Path) -> Plan:
    """The plan of a work directory, with its shards."""
    plan = records.load(root / "plan.json", Plan, WORK_VERSION)
    with (root / "shards.parquet").open("rb") as file:  # pyarrow would not say in its error which file is gone
        told = pq.read_table(file).to_pydict()
    paths = [records.text_to_path(path) for path in told.pop("path")]
    return replace(plan, shards=tuple(map(Shard, paths, *told.values())))
