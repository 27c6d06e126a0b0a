"""consolidate in steps, for job arrays: init, then each partition by a job of its own, then finalize.

Invariant: every step may run any number of times, from any node, also when the dataset is published already: then it
says so. Partitions need no order, no lock and no survey; two processes at the same partition write the same bytes.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tsclust_ooc import budget, files, records
from tsclust_ooc import consolidate as work_on
from tsclust_ooc import work as work_dir
from tsclust_ooc.budget import BASE_BYTES
from tsclust_ooc.dataset import MANIFEST_VERSION, REJECTED, Manifest, Rejected, read_manifest
from tsclust_ooc.errors import BadInput, TryAgain, UsageError
from tsclust_ooc.pipeline import origins
from tsclust_ooc.pipeline.consolidating import (
    DEFAULTS,
    Consolidated,
    ConsolidateOptions,
    Consolidation,
    check_ours,
    check_places,
    gathered,
    place_of,
)
from tsclust_ooc.pipeline.origins import Origin
from tsclust_ooc.pipeline.outcomes import result
from tsclust_ooc.pipeline.problems import bad_shards, leave_out, problem_lines
from tsclust_ooc.pipeline.session import session
from tsclust_ooc.plan import Partition, Plan
from tsclust_ooc.progress import Listener, silent
from tsclust_ooc.provenance import Meter
from tsclust_ooc.reading import RowReader
from tsclust_ooc.remote import Remote
from tsclust_ooc.shards.listing import is_list
from tsclust_ooc.shards.parsers import Parsers
from tsclust_ooc.shards.schema import Problem
from tsclust_ooc.units import plural
from tsclust_ooc.work import BadShard, Work

_SHOWN_PARTITIONS = 10
_STEPS = "--init, --partition and --finalize"
_MEND = "Mend them and begin again with --init, or leave them out: --finalize --on-bad skip"


@dataclass(frozen=True)
class Initialized:
    """Result of init.

    `n_pending` of the `n_partitions` are not written yet, `array` is their range as schedulers write it ('0-9,12').
    `disk_bytes` and `memory_bytes` are what one partition takes at most. `commands` are those of the next steps, the
    first with the number of a partition in place of I. When the dataset is there already all of this is 0 or empty.
    """

    dataset: str
    n_shards: int
    n_samples: int
    n_rejected: int
    n_partitions: int
    n_pending: int
    array: str
    disk_bytes: int
    memory_bytes: int
    total_bytes: int
    commands: tuple[str, ...]
    reused: bool


@dataclass(frozen=True)
class PartitionWritten:
    """Result of one partition: rows `start` to `stop` of `split`. `reused`: it was written already.

    `published`: so was the whole dataset, and nothing is known of the partition any more.
    """

    dataset: str
    partition: int
    n_partitions: int
    split: str
    start: int
    stop: int
    seconds: float
    peak_bytes: int
    reused: bool
    published: bool


def init(
    source: str | Path | Sequence[str | Path],
    dataset: str | Path,
    options: ConsolidateOptions = DEFAULTS,
    listener: Listener = silent,
    *,
    one_based: bool = False,
) -> Initialized:
    """Survey, plan, and make the work directory that partitions are written into; what is written already is kept.

    Shards that the survey finds bad are told to the listener; whether they are skipped is for `finalize` to say.

    Raises CannotWrite when something else lies at `dataset` or the disk is too small, TryAgain when another process
    is consolidating to `dataset`.
    """
    given, options = gathered(source, options)
    final = place_of(dataset, _STEPS)
    _refuse_dry_run(options)
    check_places(given, final, options)
    with session(final, "consolidate", "consolidated", options, listener) as held:
        with Parsers(budget.available_cores()) as parsers:
            job = Consolidation(held, given, parsers)
            plan, problems, manifest = job.look()
        if manifest is None:
            try:
                work = work_on.init(final, plan, problems)
                work_dir.mark_asked(work)
                return _initialized(given, work, problems, options, listener, one_based=one_based)
            except work_dir.Superseded:
                manifest = work_on.join_or_fail(final, plan)
        return _nothing_to_do(job.there_already(manifest))


def write_partition(
    source: str | Path | Sequence[str | Path],
    dataset: str | Path,
    number: int,
    options: ConsolidateOptions = DEFAULTS,
    *,
    one_based: bool = False,
) -> PartitionWritten:
    """Write the partition `number` of what `init` planned.

    The plan is taken as it is; options that were given and would have led to another one are refused.

    Raises
    ------
    BadShards
        Shards of it cannot be read; those whose content is bad are remembered for `finalize`.
    UsageError
        There is no partition of this number, or the options are not those of `init`.
    BadInput
        `init` has not run.
    TryAgain
        Another process took the work away.
    """
    given, options = gathered(source, options)
    final = place_of(dataset, _STEPS)
    _refuse_dry_run(options)
    with Meter() as meter:
        found = _find(given, final, options)
        if isinstance(found, Manifest):
            return _written(final, number, 0, None, meter, reused=True)
        one = _numbered(found.plan, number, one_based=one_based)
        done = partial(_written, final, number, len(found.plan.partitions), one, meter)
        if work_dir.receipt_of(found, one) is not None:
            return done(reused=True)
        try:
            bad = _write(given, found, one, options)
        except work_dir.Superseded:
            work_on.join_or_fail(final, found.plan)
            return _written(final, number, 0, None, meter, reused=True)
        if bad:
            raise bad_shards(given, found.plan, [b.problem for b in bad], _MEND)
        return done(reused=False)


def finalize(
    source: str | Path | Sequence[str | Path],
    dataset: str | Path,
    options: ConsolidateOptions = DEFAULTS,
    listener: Listener = silent,
    *,
    one_based: bool = False,
) -> Consolidated:
    """Publish what the partitions wrote.

    With `on_bad` 'skip', shards that turned out bad are left out: what that changes is written now, by this command.

    Raises
    ------
    TryAgain
        Partitions were not written yet, or another process is consolidating to `dataset`.
    BadShards
        There are bad shards and `on_bad` is 'fail'.
    BadInput
        `init` has not run.
    """
    given, options = gathered(source, options)
    final = place_of(dataset, _STEPS)
    _refuse_dry_run(options)
    if options.overwrite:
        check_ours(final)
    found = _find(given, final, options)
    enough = options if isinstance(found, Manifest) else _with_enough_memory(options, found.plan)
    parsers = Parsers(budget.available_cores())
    with session(final, "consolidate", "consolidated", enough, listener) as held, parsers:
        if isinstance(found, Manifest):
            files.sweep(final.parent, final.name)
            return result(found, final, held.meter, dashboard="")
        job = Consolidation(held, given, parsers)
        try:
            return _finalize(job, found, one_based=one_based)
        except work_dir.Superseded:
            return job.there_already(work_on.join_or_fail(final, found.plan))


def _finalize(job: Consolidation, work: Work, *, one_based: bool) -> Consolidated:
    if work_on.spent(work):
        return job.there_already(work_on.join_or_fail(work.final, work.plan))
    with work_dir.noticing_others(work.root):
        problems = list(records.load(work.root / REJECTED, Rejected, MANIFEST_VERSION).rejected)
    missing = work_dir.pending(work)
    bad = {one.index: [b.problem for b in work_dir.recorded_bad(work, one)] for one in missing}
    found = [problem for some in bad.values() for problem in some]
    not_run = [index + one_based for index, some in bad.items() if not some]
    if not_run:
        raise _not_run(job.source, work, not_run, found)
    if job.options.on_bad == "fail" and (blamed := job.blamed(work.plan, [*problems, *found])):
        raise bad_shards(job.source, work.plan, blamed, _MEND)
    if not found:
        job.check_free(work.plan)
        return job.publish(work)
    plan, problems = leave_out(job.source, work.plan, problems, found)
    manifest = None if job.options.overwrite else work_on.published(work.final, plan)
    if manifest is not None:
        return job.there_already(manifest)
    job.check_free(plan)
    job.listener.say(f"leaving out {plural(len(found), 'bad shard')}: writing anew what that changes")
    return job.finish(plan, problems)


def _not_run(source: Origin, work: Work, numbers: Sequence[int], bad: Sequence[Problem]) -> TryAgain:
    shown = ", ".join(map(str, numbers[:_SHOWN_PARTITIONS])) + (", ..." if len(numbers) > _SHOWN_PARTITIONS else "")
    met = f"\nThe others met {plural(len(bad), 'bad shard')}:\n" + "\n".join(problem_lines(source, bad)) if bad else ""
    return TryAgain(
        f"{work.final}: {plural(len(numbers), 'partition')} of {len(work.plan.partitions):,} not written yet: {shown}. "
        f"Run those partitions (--partition I), then --finalize again.{met}"
    )


def _write(given: Origin, work: Work, one: Partition, options: ConsolidateOptions) -> tuple[BadShard, ...]:
    if options.memory is not None:
        budget.resolve(options.memory, 1).workers_that_fit(_array_bytes(work.plan), "a partition")
    staging = origins.staging_for(given, options.stage, asked=options.scratch)
    with Parsers(1) as parsers, staging.open(work.plan.source, parsers.patience) as stage:
        return work_on.write_partition(work, RowReader(work.plan, parsers, stage), one).bad


def _find(given: Origin, final: Path, options: ConsolidateOptions) -> Work | Manifest:
    """The work that `init` made for `final`, or the dataset where it is published already."""
    complaint = partial(_complaint, given, final, options)
    try:
        return work_dir.open_work(final, complaint)
    except (BadInput, UsageError, work_dir.Superseded) as error:
        try:
            manifest = read_manifest(final)
        except (FileNotFoundError, NotADirectoryError, BadInput):
            manifest = None
        if manifest is not None and not complaint(manifest):
            return manifest
        if isinstance(error, work_dir.Superseded):
            raise TryAgain(f"another process took away the work for {final}. Run the same command again.") from error
        raise


def _complaint(given: Origin, final: Path, options: ConsolidateOptions, made: Plan | Manifest) -> str:
    """What of the source and the options given now is not what a plan was made from, '' if nothing; unset ones fit."""
    appends = options.append or (isinstance(made, Plan) and made.base is not None)
    same = origins.is_source(made.source, given, options.also)
    if not (same or (appends and _all_below(made.source, given, options.also))):
        return f"{final} was initialized from {made.source}, not from {given}. Give that source, or run --init again."
    if (other := options.differing(made.schema, made.options)) is None:
        return ""
    flag, now, then = other
    return (
        f"--{flag} {now}: {final} was initialized with {then}. Give every step the same options, or leave "
        f"--{flag} to --init; or run --init again."
    )


def _all_below(root: str, given: Origin, also: Sequence[Path]) -> bool:
    """Whether an append may be of these: they lie in the source of the dataset, or are lists, which are not read."""
    if isinstance(given, Remote):
        return str(given).startswith(f"{root}/")
    top = Path(os.path.realpath(root))
    return all(is_list(one) or Path(os.path.realpath(one)).is_relative_to(top) for one in (given, *also))


def _numbered(plan: Plan, number: int, *, one_based: bool) -> Partition:
    index, n = number - one_based, len(plan.partitions)
    if not 0 <= index < n:
        first, last = int(one_based), n - 1 + one_based
        raise UsageError(f"--partition {number}: the plan has {plural(n, 'partition')}. Use {first} to {last}.")
    return plan.partitions[index]


def _written(
    final: Path, number: int, n_partitions: int, one: Partition | None, meter: Meter, *, reused: bool
) -> PartitionWritten:
    return PartitionWritten(
        dataset=str(final), partition=number, n_partitions=n_partitions, split=one.split if one else "",
        start=one.start if one else 0, stop=one.stop if one else 0, seconds=round(meter.elapsed(), 3),
        peak_bytes=meter.peak_bytes, reused=reused, published=one is None,
    )  # fmt: skip


def _initialized(
    given: Origin, work: Work, problems: Sequence[Problem], options: ConsolidateOptions, listener: Listener, *,
    one_based: bool,
) -> Initialized:  # fmt: skip
    if problems:
        lines = "\n".join(problem_lines(given, problems))
        listener.say(
            f"{plural(len(problems), 'bad shard')}: with --on-bad skip --finalize leaves them out, without it it "
            f"publishes nothing:\n{lines}"
        )
    plan = work.plan
    left = [one.index + one_based for one in work_dir.pending(work)]
    return Initialized(
        dataset=str(work.final), n_shards=len(plan.shards), n_samples=plan.n_rows, n_rejected=len(problems),
        n_partitions=len(plan.partitions), n_pending=len(left), array=_ranges(left),
        disk_bytes=max((_disk_bytes(plan, one) for one in plan.partitions), default=0),
        memory_bytes=BASE_BYTES + _array_bytes(plan), total_bytes=plan.disk_bytes,
        commands=tuple(_commands(given, work.final, options, one_based=one_based)), reused=False,
    )  # fmt: skip


def _nothing_to_do(there: Consolidated) -> Initialized:
    return Initialized(
        dataset=there.dataset, n_shards=there.n_shards, n_samples=there.n_samples, n_rejected=there.n_rejected,
        n_partitions=0, n_pending=0, array="", disk_bytes=0, memory_bytes=0, total_bytes=there.bytes, commands=(),
        reused=True,
    )  # fmt: skip


def _array_bytes(plan: Plan) -> int:
    return work_on.array_bytes(plan) + work_on.plan_bytes(plan)


def _disk_bytes(plan: Plan, one: Partition) -> int:
    """Bytes of a partition's chunks, uncompressed; zarr pads the last of a split."""
    return len(list(plan.chunks_of(one))) * plan.chunk_rows[one.split] * plan.schema.item_bytes


def _with_enough_memory(options: ConsolidateOptions, plan: Plan) -> ConsolidateOptions:
    """By default half of what this job may use, as always; but what one worker needs, where the job was given no more.

    A job array asks for what `init` says a partition takes, and its last job has the same limit.
    """
    if options.memory is not None or options.scheduler != "threads":
        return options
    limit = budget.memory_limit()
    return replace(options, memory=str(max(limit // 2, min(limit, BASE_BYTES + _array_bytes(plan)))))


def _ranges(numbers: Sequence[int]) -> str:
    """Rising numbers as schedulers write them: '0-9,12'."""
    starts = [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n - 1]
    ends = [n for i, n in enumerate(numbers) if i + 1 == len(numbers) or numbers[i + 1] != n + 1]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _commands(given: Origin, final: Path, options: ConsolidateOptions, *, one_based: bool) -> Iterator[str]:
    """The command lines of the next steps, for any working directory."""
    options = replace(options, also=tuple(one.absolute() for one in options.also))
    words = ["tsclust", "consolidate", origins.spelled(given), str(final), *_flags(options)]
    words += ["--one-based"] if one_based else []
    yield f"{shlex.join(words)} --partition I"
    yield f"{shlex.join(words)} --finalize"


def _flags(record: Any) -> Iterator[str]:
    """The flags of all fields that are not at their defaults, each with its value in the same word."""
    for field in fields(record):
        value, flag = getattr(record, field.name), f"--{field.name.replace('_', '-')}"
        if is_dataclass(value):
            yield from _flags(value)
        elif value == field.default:
            continue
        elif isinstance(value, bool):
            yield flag
        else:
            yield from (f"{flag}={one}" for one in (value if isinstance(value, tuple) else (value,)))


def _refuse_dry_run(options: ConsolidateOptions) -> None:
    if options.dry_run:
        raise UsageError("--dry-run shows what the whole command would do; it has no steps. Use --init, or leave it.")
