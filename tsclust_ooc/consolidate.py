"""Shards into a published dataset: init, write_partition, finalize.

Invariant: a receipt is written after its data are durable, and the dataset appears by one rename of a directory that
holds everything, its manifest last. Any number of processes may do the same at once; at worst work is done twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tsclust_ooc import files, provenance, records
from tsclust_ooc.chunks import buffer, chunk_writer, make_arrays
from tsclust_ooc.dataset import (
    DATA,
    INDEX,
    MANIFEST,
    MANIFEST_VERSION,
    REJECTED,
    Manifest,
    Rejected,
    SplitEntry,
    content_digest,
    index_table,
    read_manifest,
    work_folders,
)
from tsclust_ooc.errors import BadInput, CannotWrite, TryAgain
from tsclust_ooc.files import FileEntry
from tsclust_ooc.plan import Partition, Plan, make_plan
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
    parquet_bytes,
    pending,
    receipt_of,
    record_bad,
    save_plan,
    work_root,
)

Mapper = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]

_SHARD_BYTES = 700  # of a plan in memory, for each shard: its record, its path, its place in the order (measured)


@dataclass(frozen=True)
class Done:
    """Result of one partition: rows written, and the shards of it that could not be read (then it has no receipt).

    `unproven` is a shard that is not what the survey presumed, '' if there is none (else, too, there is no receipt).
    """

    partition: Partition
    bad: tuple[BadShard, ...]
    unproven: str = ""


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
        return replace(work, plan=load_plan(work.root))
    with files.naming_the_place(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        _check_space(final, plan)
        make_folders(work)
        (work.dataset / INDEX).mkdir(exist_ok=True)
    make_arrays(work.dataset, plan)
    adopt(work)
    records.save(work.root / REJECTED, Rejected(tuple(problems)), MANIFEST_VERSION)
    save_plan(work)
    return work


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
        files.publish_dir(work.dataset, work.final, replace=replace_existing)
    except CannotWrite:
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
    """The plan for the same shards but those named in `bad`: what a survey that knows them to be bad would lead to."""
    left_out = {problem.path for problem in bad}
    shards = tuple(shard for shard in plan.shards if shard.path not in left_out)
    survey = Survey(plan.source, plan.schema, plan.reason, shards, tuple(bad), plan.templates, notes=(), n_other=0)
    return make_plan(survey, plan.options)


def array_bytes(plan: Plan) -> int:
    """Bytes one worker of a plan holds: a chunk, and zarr's copy of it when it is compressed."""
    return plan.largest_chunk_bytes * (3 if plan.options.codec else 2)


def plan_bytes(plan: Plan) -> int:
    """Bytes of memory that the plan itself takes in a process."""
    return len(plan.shards) * _SHARD_BYTES


def _check_space(final: Path, plan: Plan) -> None:
    free = files.free_bytes(final)
    if free < plan.disk_bytes * 1.02:
        raise CannotWrite(
            f"{final} needs {format_bytes(plan.disk_bytes * 1.02)}; {files.existing_parent(final)} has "
            f"{format_bytes(free)} free. Choose another place, or make room."
        )


def _write_partition(work: Work, reader: RowReader, partition: Partition) -> Done:
    plan, split = work.plan, partition.split
    store = DurableStore(work.dataset / DATA)
    write = chunk_writer(plan, split, store)
    ids, bad = Ids([], [], []), []
    for start, stop in plan.chunks_of(partition):
        chunk = buffer((plan.chunk_rows[split], *plan.schema.item_shape), plan.schema.dtype)
        found, problems = reader.read(split, start, stop, chunk[: stop - start])
        bad += [BadShard(s.shard.size, s.shard.mtime_ns, problem) for s, problem in problems]
        if not bad:
            write(start, stop, chunk)
            ids.extend(found)
    if bad:
        record_bad(work, partition, bad)
        return Done(partition, tuple(bad))
    entries = {f"{DATA}/{key}": FileEntry(*entry) for key, entry in store.written.items()}
    entries.update(_write_index(work, partition, ids))
    records.save(work.receipt(partition.index), Receipt(plan.inputs_digest(partition), entries), WORK_VERSION)
    return Done(partition, ())


def _write_index(work: Work, partition: Partition, ids: Ids) -> dict[str, FileEntry]:
    table = index_table(partition.split, partition.start, ids.shards, ids.shard_rows, ids.sample_ids)
    first = next(p.index for p in work.plan.partitions if p.split == partition.split)
    name = f"{INDEX}/{partition.split}-{partition.index - first:05d}.parquet"
    data = parquet_bytes(table)
    files.write_atomic(work.dataset / name, data)
    return {name: FileEntry(len(data), files.checksum_bytes(data))}


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
    rejected = records.load(work.root / REJECTED, Rejected, MANIFEST_VERSION)
    records.save(work.dataset / REJECTED, rejected, MANIFEST_VERSION)
    entries = {name: entry for _, receipt in receipts if receipt for name, entry in receipt.files.items()}
    for path in [work.dataset / REJECTED, *files.walk_files(work.dataset / DATA, lambda name: name == "zarr.json")]:
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
