"""tsclust consolidate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from cyclopts import Parameter

from tsclust_ooc.cli.console import Output, OutputOptions, Session, expand, expanded, session
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
    source: Path,
    dataset: Path,
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
        Folder of shards (train/, val/, test/ become splits), or one HDF5 file. Never modified.
    dataset
        Directory to publish; it appears when it is complete.
    """
    options = expanded(options)
    with session(output) as show:
        done = _run(expand(source), expand(dataset), options, step, show)
        show.result(done, _lines(done))


def _run(
    source: Path, dataset: Path, options: ConsolidateOptions, step: Step, show: Session
) -> Consolidated | DryRun | Initialized | PartitionWritten:
    if step.init:
        return arrays.init(source, dataset, options, show, one_based=step.one_based)
    if step.partition is not None:
        return arrays.write_partition(source, dataset, step.partition, options, one_based=step.one_based)
    if step.finalize:
        return arrays.finalize(source, dataset, options, show, one_based=step.one_based)
    return run(source, dataset, options, show)


def _lines(done: Consolidated | DryRun | Initialized | PartitionWritten) -> list[str]:
    match done:
        case DryRun():
            return _plan_lines(done)
        case Initialized():
            return _init_lines(done)
        case PartitionWritten():
            return [_partition_line(done)]
        case _:
            return _published_lines(done)


def _published_lines(done: Consolidated) -> list[str]:
    left_out = f" · {plural(done.n_rejected, 'shard')} left out (rejected.json)" if done.n_rejected else ""
    dtype = np.dtype(done.dtype).name
    what = f"{plural(done.n_samples, 'sample')} {done.item_shape} {dtype} · {plural(done.n_chunks, 'chunk')}"
    splits = ", ".join(f"{name} {format_count(n)}" for name, n in done.splits.items())
    if done.reused:
        return [f"{done.dataset} is there already, made from these shards and options: {what}. Nothing to do."]
    return [
        f"published {done.dataset}   {what} · {format_bytes(done.bytes)}{left_out}",
        f"  {splits}   {format_seconds(done.seconds)}, peak {format_bytes(done.peak_bytes)}",
        f"  Next: tsclust cluster {done.dataset} RUN -k 6",
    ]


def _plan_lines(plan: DryRun) -> list[str]:
    return [
        f"would publish {plan.dataset}   {plural(plan.n_samples, 'sample')} of {plural(plan.n_shards, 'shard')}, "
        f"{plural(plan.n_rejected, 'problem')}",
        f"  {plural(plan.n_partitions, 'partition')}, {plural(plan.n_chunks, 'chunk')}, "
        f"{format_bytes(plan.disk_bytes)} on disk, at most {format_bytes(plan.memory_bytes)} of memory "
        f"with {plural(plan.n_workers, 'worker')}",
    ]


def _init_lines(done: Initialized) -> list[str]:
    what = f"{plural(done.n_samples, 'sample')} of {plural(done.n_shards, 'shard')}"
    if done.reused:
        return [f"{done.dataset} is there already, made from these shards and options: {what}. Nothing to do."]
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
