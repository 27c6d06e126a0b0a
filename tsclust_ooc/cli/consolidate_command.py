"""tsclust consolidate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
from cyclopts import Parameter

from tsclust_ooc.cli.console import Output, OutputOptions, expand, expanded, session
from tsclust_ooc.pipeline.consolidating import Consolidated, ConsolidateOptions, DryRun
from tsclust_ooc.pipeline.consolidating import consolidate as run
from tsclust_ooc.units import format_bytes, format_count, format_seconds, plural


def consolidate(
    source: Path,
    dataset: Path,
    /,
    *,
    options: Annotated[ConsolidateOptions, Parameter(name="*")] = ConsolidateOptions(),
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
        done = run(expand(source), expand(dataset), options, show)
        show.result(done, _plan_lines(done) if isinstance(done, DryRun) else _lines(done))


def _lines(done: Consolidated) -> list[str]:
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
