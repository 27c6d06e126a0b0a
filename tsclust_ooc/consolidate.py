"""Shards into a published dataset: init, write_partition, finalize.

Invariant: a receipt is written after its data are durable, and the dataset appears by one rename of a directory that
holds everything, its manifest last. Any number of processes may do the same at once; at worst work is done twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tsclust_ooc import appending, files, provenance, records
from tsclust_ooc.chunks import buffer, chunk_writer, make_arrays
from tsclust_ooc.dataset import (
    DATA,
    INDEX,
    MANIFEST,
    MANIFEST_VERSION,
    REJECTED,
    SHARDS,
    Manifest,
    Rejected,
    SplitEntry,
    content_digest,
    read_manifest,
    work_folders,
)
from tsclust_ooc.errors import BadInput, CannotWrite, TryAgain
from tsclust_ooc.files import FileEntry
from tsclust_ooc.indexing import ROW_BYTES, index_name, index_writer
from tsclust_ooc.plan import Partition, Plan, Segment, make_plan
from tsclust_ooc.reading import Ids, RowReader, Unproven
from tsclust_ooc.shards.schema import Problem
from tsclust_ooc.shards.survey import Survey
from tsclust_ooc.store import DurableStore
from tsclust_ooc.units import format_bytes, plural
from tsclust_ooc.work import (
    WORK_VERSION,
    BadShard,
    Receipt,
    Work,
    adopt,
    load_plan,
    make_folders,
    noticing_others,
    pending,
    receipt_of,
    record_bad,
    save_plan,
    work_root,
)

Mapper = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
Rows = np.ndarray[Any, np.dtype[Any]]
Read = Callable[[str, int, int, Rows], tuple[Ids, list[tuple[Segment, Problem]]]]

_SHARD_BYTES = 700  # of a plan in memory, for each shard: its record, its path, its place in the order (measured)


@dataclass(frozen=True)
class Done:
    """Result of one partition: rows written, and the shards of it that could not be read (then it has no receipt).

    `unproven` is a shard that is not what the survey presumed, '' if there is none (else, too, there is no receipt).
    `n_retries` are reads that another process tried again for it.
    """

    partition: Partition
    bad: tuple[BadShard, ...]
    unproven: str = ""
    n_retries: int = 0


def init(final: Path, plan: Plan, problems: Sequence[Problem]) -> Work:
    """Make (or find) the work directory of a plan: empty arrays, the plan, and what earlier work can be kept.

    Idempotent: any number of processes may do it at once. Raises CannotWrite when the disk will not hold the dataset,
    Superseded when another process takes the directory away meanwhile.
    """
    work = Work(final, work_root(final, plan), plan)
    with noticing_others(work.root):
        return _init(work, problems)


def _init(work: Work, problems: Sequence[Problem]) -> Work:
    final, plan = work.final, work.plan
    if spent(work):
        files.retire(work.root)
    if (work.root / "plan.json").exists():
        # The plan is that of the good shards alone: which bad ones are left out may be known better by now.
        records.save(work.root / REJECTED, Rejected(tuple(problems)), MANIFEST_VERSION)
        work = replace(work, plan=load_plan(work.root))
        take_over(work)
        return work
    with files.naming_the_place(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        _check_space(final, plan)
        make_folders(work)
        (work.dataset / INDEX).mkdir(exist_ok=True)
    make_arrays(work.dataset, plan)
    adopt(work)
    take_over(work)
    records.save(work.root / REJECTED, Rejected(tuple(problems)), MANIFEST_VERSION)
    save_plan(work)
    return work


def take_over(work: Work) -> None:
    """Link what stays of the dataset that a plan appends to, where that is not done: its partitions get receipts."""
    plan = work.plan
    waiting = [one for one in pending(work) if one.start < plan.n_committed(one.split)]
    if not waiting:
        return
    kept = appending.link_base(work.final, work.root, plan)
    files.fsync_tree(work.root)
    for one in waiting:
        if one.index in kept:
            receipt = Receipt(plan.inputs_digest(one), kept[one.index])
            records.save(work.receipt(one.index), receipt, WORK_VERSION)


def write_partition(work: Work, reader: RowReader, partition: Partition) -> Done:
    """Write one partition's chunks and index file, then its receipt. Idempotent, in any order, by any process.

    Shards that cannot be read are in the result and in `problems/`; then there is no receipt. Raises Superseded when
    the work directory is gone.
    """
    with noticing_others(work.root):
        try:
            return _write_partition(work, reader, partition)
        except Unproven as error:
            return Done(partition, (), str(error))


def finalize(work: Work, *, replace_existing: bool, seconds: float = 0.0) -> Manifest:
    """Publish: every receipt checked, leftovers swept, directories synced, manifest written, one rename.

    Raises
    ------
    TryAgain
        Partitions are missing; names the first of them. Or the work is gone, and this is not what was published.
    CannotWrite
        Something else already lies at the final name and `replace_existing` is not set.
    """
    if work.dataset.is_dir():
        with noticing_others(work.root):
            manifest = _publish(work, _complete(work, seconds), replace_existing=replace_existing)
    else:
        manifest = join_or_fail(work.final, work.plan)
    sweep(work.final)
    return manifest


def _publish(work: Work, manifest: Manifest, *, replace_existing: bool) -> Manifest:
    """The rename; or what lies there, where another process published just this meanwhile."""
    try:
        if work.plan.base is not None:
            appending.publish(work.root, work.final, work.plan)
        else:
            files.publish_dir(work.dataset, work.final, replace=replace_existing)
    except (CannotWrite, TryAgain):
        theirs = published(work.final, work.plan)
        if theirs is None:
            raise
        return theirs
    # What another process was writing moved along; it cannot be finished, for its writer knows the old name only.
    files.sweep_partials(work.final)
    return manifest


def published(final: Path, plan: Plan) -> Manifest | None:
    """The manifest at `final` if it is the dataset of just this plan, else None."""
    try:
        manifest = read_manifest(final)
    except (FileNotFoundError, NotADirectoryError, BadInput):
        return None
    return manifest if manifest.plan == plan.digest else None


def spent(work: Work) -> bool:
    """Whether the dataset left this work for its final name, and maybe the one it replaced came back by the exchange.

    A crash may leave both; sizes cannot tell the old chunks from the new, so none of them are taken for finished work.
    """
    gone = not work.dataset.is_dir()
    swapped = (work.dataset / MANIFEST).exists() and published(work.final, work.plan) is not None
    return (work.root / "plan.json").exists() and (gone or swapped)


def sweep(final: Path) -> None:
    """Remove the work directories of a dataset that is now published, and what killed runs left beside it."""
    for root in work_folders(final):
        files.retire(root)
    files.sweep(final.parent, final.name)


def run(
    work: Work,
    write: Callable[[Partition], Done],
    mapper: Mapper,
    on_done: Callable[[Done], None] = lambda done: None,
) -> list[BadShard]:
    """Write every pending partition by `write`, through `mapper`; returns the shards that could not be read.

    Raises Unproven when a shard is not what the survey presumed: survey again, in full.
    """
    bad: list[BadShard] = []
    for done in mapper(write, pending(work)):
        if done.unproven:
            raise Unproven(done.unproven)
        bad += done.bad
        on_done(done)
    return bad


def without(plan: Plan, bad: Sequence[Problem]) -> Plan:
    """The plan for the same shards but those named in `bad`: what a survey that knows them to be bad would lead to.

    Those of the dataset that is appended to are none of them.
    """
    left_out = {problem.path for problem in bad}
    shards = tuple(shard for shard in plan.shards if shard.path not in left_out)
    survey = Survey(plan.source, plan.schema, plan.reason, shards, tuple(bad), plan.templates, notes=(), n_other=0)
    return replace(make_plan(survey, plan.options), base=plan.base)


def recover(final: Path) -> None:
    """Put right what a killed end of an append left at `final`; whoever works at that name calls it first."""
    for root in work_folders(final):
        with contextlib.suppress(BadInput, FileNotFoundError):
            appending.recover(root, final, records.load(root / "plan.json", Plan, WORK_VERSION))


def array_bytes(plan: Plan) -> int:
    """Bytes one worker holds: a chunk, zarr's copies of it when it is compressed or committed before, and its index."""
    copies = 2 + bool(plan.options.codec) + bool(plan.base)
    return plan.largest_chunk_bytes * copies + max(plan.chunk_rows.values()) * ROW_BYTES


def plan_bytes(plan: Plan) -> int:
    """Bytes of memory that the plan itself takes in a process."""
    return len(plan.shards) * _SHARD_BYTES


def _check_space(final: Path, plan: Plan) -> None:
    free, wanted = files.free_bytes(final), plan.new_bytes * 1.02
    if free < wanted:
        raise CannotWrite(
            f"{final} needs {format_bytes(wanted)}; {files.existing_parent(final)} has "
            f"{format_bytes(free)} free. Choose another place, or make room."
        )


def _write_partition(work: Work, reader: RowReader, partition: Partition) -> Done:
    plan, split = work.plan, partition.split
    store = DurableStore(work.dataset / DATA)
    bad: list[BadShard] = []
    read, name = _reading(work, reader, partition), index_name(plan, partition)
    with chunk_writer(plan, partition, store) as write, index_writer(work.dataset / name, partition) as note:
        for start, stop in plan.chunks_of(partition):
            chunk = buffer((plan.chunk_rows[split], *plan.schema.item_shape), plan.schema.dtype)
            found, problems = read(split, start, stop, chunk[: stop - start])
            bad += [BadShard(s.shard.size, s.shard.mtime_ns, problem) for s, problem in problems]
            if not bad:
                write(start, stop, chunk)
                note(found)
            del found  # names of narrow rows are large, and the next ones come before these would go
    if bad:
        record_bad(work, partition, bad)
        return Done(partition, tuple(bad))
    entries = {f"{DATA}/{key}": FileEntry(*entry) for key, entry in store.written.items()}
    entries[name] = files.entry_of(work.dataset / name)
    records.save(work.receipt(partition.index), Receipt(plan.inputs_digest(partition), entries), WORK_VERSION)
    return Done(partition, ())


def _reading(work: Work, reader: RowReader, partition: Partition) -> Read:
    """What reads the rows of a partition: out of shards, but for those that the dataset has already."""
    n_committed = work.plan.n_committed(partition.split)
    if partition.start >= n_committed:
        return reader.read
    committed = appending.CommittedRows(work.root, work.plan)

    def read(split: str, start: int, stop: int, out: Rows) -> tuple[Ids, list[tuple[Segment, Problem]]]:
        middle = max(start, min(stop, n_committed))
        ids, problems = Ids([], [], []), list[tuple[Segment, Problem]]()
        if middle > start:
            ids.extend(committed.read(split, start, middle, out[: middle - start]))
        if stop > middle:
            more, problems = reader.read(split, middle, stop, out[middle - start :])
            ids.extend(more)
        return ids, problems

    return read


def _complete(work: Work, seconds: float) -> Manifest:
    """Check that everything is there, sweep what is not ours, and write the manifest into the work's dataset."""
    receipts = [(p, receipt_of(work, p)) for p in work.plan.partitions]
    missing = [p.index for p, receipt in receipts if receipt is None]
    if missing:
        shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise TryAgain(
            f"{work.final}: {plural(len(missing), 'partition')} of {len(receipts)} not written yet: {shown}. "
            "Run those partitions, then finalize again."
        )
    files.write_atomic(work.dataset / SHARDS, (work.root / SHARDS).read_bytes())
    rejected = records.load(work.root / REJECTED, Rejected, MANIFEST_VERSION)
    records.save(work.dataset / REJECTED, rejected, MANIFEST_VERSION)
    entries = {name: entry for _, receipt in receipts if receipt for name, entry in receipt.files.items()}
    metadata = files.walk_files(work.dataset / DATA, lambda name: name == "zarr.json")
    for path in [work.dataset / REJECTED, work.dataset / SHARDS, *metadata]:
        entries[str(path.relative_to(work.dataset))] = files.entry_of(path)
    _sweep_unknown(work.dataset, entries)
    files.fsync_tree(work.dataset)
    manifest = _manifest(work.plan, dict(sorted(entries.items())), len(rejected.rejected), seconds)
    records.save(work.dataset / MANIFEST, manifest, MANIFEST_VERSION)
    return manifest


def _manifest(plan: Plan, entries: dict[str, FileEntry], n_rejected: int, seconds: float) -> Manifest:
    item = plan.schema.item_shape
    splits = {
        s.name: SplitEntry(s.n_shards, (s.n_rows, *item), plan.schema.dtype, (plan.chunk_rows[s.name], *item))
        for s in plan.splits
    }
    return Manifest(
        digest=content_digest(plan.schema, plan.options, splits, entries), plan=plan.digest, source=plan.source,
        schema=plan.schema, reason=plan.reason, options=plan.options, splits=splits, n_rejected=n_rejected,
        files=entries, seconds=seconds, provenance=provenance.here_and_now(),
    )  # fmt: skip


def _sweep_unknown(dataset: Path, entries: dict[str, FileEntry]) -> None:
    """Remove files that no receipt names: partial files of killed writers, chunks of an earlier, longer plan."""
    for path in list(files.walk_files(dataset)):
        if str(path.relative_to(dataset)) not in entries:
            path.unlink(missing_ok=True)


def join_or_fail(final: Path, plan: Plan) -> Manifest:
    """After Superseded: the dataset if another process published the same plan meanwhile, else TryAgain."""
    manifest = published(final, plan)
    if manifest is None:
        raise TryAgain(f"another process replaced the work for {final}. Run the same command again.")
    return manifest
