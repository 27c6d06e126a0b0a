"""tsclust consolidate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from cyclopts import Parameter

from tsclust_ooc.cli.console import Output, OutputOptions, Place, Session, expand_place, expanded, session
from tsclust_ooc.errors import UsageError
from tsclust_ooc.pipeline import arrays
from tsclust_ooc.pipeline.arrays import Initialized, PartitionWritten
from tsclust_ooc.pipeline.consolidating import DEFAULTS, Consolidated, ConsolidateOptions, DryRun
from tsclust_ooc.pipeline.consolidating import consolidate as run
from tsclust_ooc.units import format_bytes, format_count, format_seconds, plural


@dataclass(frozen=True)
class Step:
    """One step of a consolidation by a job array, instead of all of it.

    Attributes
    ----------
    init
        Survey and plan, and print the commands of the next steps; write no data.
    partition
        Write this partition (0, 1, ...) of what --init planned, and nothing else.
    finalize
        Publish what the partitions wrote.
    one_based
        Count partitions from 1, for schedulers whose arrays do.
    """

    init: bool = False
    partition: int | None = None
    finalize: bool = False
    one_based: bool = False

    def __post_init__(self) -> None:
        given = [self.init and "--init", self.partition is not None and "--partition", self.finalize and "--finalize"]
        named = [name for name in given if name]
        if len(named) > 1:
            raise UsageError(f"{' and '.join(named)} are steps of their own. Give one of them.")
        if self.one_based and not named:
            raise UsageError("--one-based is about partitions. Give it with --init, --partition or --finalize.")


_WHOLE = Step()


def consolidate(
    source: Place,
    dataset: Place,
    /,
    *,
    options: Annotated[ConsolidateOptions, Parameter(name="*")] = DEFAULTS,
    step: Annotated[Step, Parameter(name="*", group="Job arrays")] = _WHOLE,
    output: Output = OutputOptions(),
) -> None:
    """Turn the shards of a source into one published dataset. Interrupted? The same command goes on.

    Parameters
    ----------
    source
        Folder of shards (train/, val/, test/ become splits), one HDF5 file, or a text file (.txt, .list) with a path a
        line; or the URL of a folder of an object store, like s3://bucket/folder. Never modified.
    dataset
        Directory to publish; it appears when it is complete. Or a URL: the dataset is made on scratch, then sent there.
    """
    options = expanded(options)
    with session(output) as show:
        done = _run(expand_place(source), expand_place(dataset), options, step, show)
        show.result(done, _lines(done, append=options.append))


def _run(
    source: str | Path, dataset: str | Path, options: ConsolidateOptions, step: Step, show: Session
) -> Consolidated | DryRun | Initialized | PartitionWritten:
    if step.init:
        return arrays.init(source, dataset, options, show, one_based=step.one_based)
    if step.partition is not None:
        return arrays.write_partition(source, dataset, step.partition, options, one_based=step.one_based)
    if step.finalize:
        return arrays.finalize(source, dataset, options, show, one_based=step.one_based)
    return run(source, dataset, options, show)


def _lines(done: Consolidated | DryRun | Initialized | PartitionWritten, *, append: bool) -> list[str]:
    match done:
        case DryRun():
            return _plan_lines(done, append=append)
        case Initialized():
            return _init_lines(done, append=append)
        case PartitionWritten():
            return [_partition_line(done)]
        case _:
            return _published_lines(done, append=append)


def _published_lines(done: Consolidated, *, append: bool) -> list[str]:
    left_out = f" · {plural(done.n_rejected, 'shard')} left out (rejected.json)" if done.n_rejected else ""
    dtype = np.dtype(done.dtype).name
    what = f"{plural(done.n_samples, 'sample')} {done.item_shape} {dtype} · {plural(done.n_chunks, 'chunk')}"
    splits = ", ".join(f"{name} {format_count(n)}" for name, n in done.splits.items())
    if done.reused and append:
        return [f"{done.dataset} has all good shards of the source already: {what}. Nothing to append."]
    if done.reused:
        return [f"{done.dataset} is there already, made from these shards and options: {what}. Nothing to do."]
    if done.n_appended_shards:
        new = f"{plural(done.n_appended, 'sample')} of {plural(done.n_appended_shards, 'shard')}"
        return [
            f"appended {new} to {done.dataset}   (now {what} · {format_bytes(done.bytes)}{left_out})",
            f"  {splits}   {format_seconds(done.seconds)}, peak {format_bytes(done.peak_bytes)}",
        ]
    return [
        f"published {done.dataset}   {what} · {format_bytes(done.bytes)}{left_out}",
        f"  {splits}   {format_seconds(done.seconds)}, peak {format_bytes(done.peak_bytes)}",
        f"  Next: tsclust cluster {done.dataset} RUN -k 6",
    ]


def _plan_lines(plan: DryRun, *, append: bool) -> list[str]:
    if append and not (plan.n_appended_shards or plan.n_new_partitions):
        return [f"would append nothing to {plan.dataset}: it has all good shards of the source already"]
    n_kept = plan.n_partitions - plan.n_new_partitions
    kept = f" ({format_count(n_kept)} of them there already)" if n_kept else ""
    new = f"{plural(plan.n_appended, 'sample')} of {plural(plan.n_appended_shards, 'shard')}"
    return [
        *([f"would append {new} to {plan.dataset}"] if plan.n_appended_shards else []),
        f"would publish {plan.dataset}   {plural(plan.n_samples, 'sample')} of {plural(plan.n_shards, 'shard')}, "
        f"{plural(plan.n_rejected, 'problem')}",
        f"  {plural(plan.n_partitions, 'partition')}{kept}, {plural(plan.n_chunks, 'chunk')}, "
        f"{format_bytes(plan.disk_bytes)} on disk, at most {format_bytes(plan.memory_bytes)} of memory "
        f"with {plural(plan.n_workers, 'worker')}",
    ]


def _init_lines(done: Initialized, *, append: bool) -> list[str]:
    what = f"{plural(done.n_samples, 'sample')} of {plural(done.n_shards, 'shard')}"
    if done.reused:
        made = "is there already, made from these shards and options"
        made = "has all good shards of the source already" if append else made
        return [f"{done.dataset} {made}: {what}. Nothing to do."]
    kept = done.n_partitions - done.n_pending
    written = f", {format_count(kept)} of them written already" if kept else ""
    each, last = done.commands
    return [
        f"planned {done.dataset}   {what}, {plural(done.n_partitions, 'partition')}{written}, "
        f"{format_bytes(done.total_bytes)} on disk",
        f"  a partition takes {format_bytes(done.disk_bytes)} on disk, at most {format_bytes(done.memory_bytes)} of "
        "memory",
        *([f"  Next, for each I of {done.array}:  {each}", f"  then:  {last}"] if done.array else [f"  Next: {last}"]),
    ]


def _partition_line(done: PartitionWritten) -> str:
    if done.published:
        return f"{done.dataset} is there already. Nothing to do."
    what = f"partition {done.partition} ({plural(done.n_partitions, 'partition')} in all)"
    where = f"{done.split} rows {format_count(done.start)} to {format_count(done.stop)}"
    if done.reused:
        return f"{what} is written already: {where}. Nothing to do."
    return f"wrote {what}   {where}   {format_seconds(done.seconds)}, peak {format_bytes(done.peak_bytes)}"
