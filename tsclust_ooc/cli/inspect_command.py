"""tsclust inspect."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import numpy as np
from cyclopts import Parameter

from tsclust_ooc.cli.console import Output, OutputOptions, expand, session, table
from tsclust_ooc.pipeline.looking import Inspection, InspectOptions
from tsclust_ooc.pipeline.looking import inspect as look
from tsclust_ooc.units import format_bytes, format_count, format_seconds, plural

_SHOWN_PROBLEMS = 20


def inspect(
    source: Path,
    /,
    *,
    options: Annotated[InspectOptions, Parameter(name="*")] = InspectOptions(),
    output: Output = OutputOptions(),
) -> None:
    """Survey every shard of a source and say what it holds. Changes nothing.

    Parameters
    ----------
    source
        Folder of shards (searched with its sub-folders), or one HDF5 file.
    """
    began = time.perf_counter()
    with session(output) as show:
        found = look(expand(source), options, show)
        show.result(found, lines(found, time.perf_counter() - began))


def lines(found: Inspection, seconds: float) -> list[str]:
    """An inspection for a person."""
    return [
        f"{plural(found.n_shards, 'shard')} · {format_bytes(found.bytes)} · {plural(len(found.splits), 'split')}"
        f"   {format_seconds(seconds)}",
        *_split_table(found),
        f"  key {found.key or '(every dataset)'}   sample {found.item_shape} {np.dtype(found.dtype).name}   "
        f"{found.layout}: {found.reason}",
        *_meaning(found),
        f"  As a dataset: {format_bytes(found.dataset_bytes)} on disk in {plural(found.n_chunks, 'chunk')}; "
        + _memory(found),
        *[f"  note: {note}" for note in found.notes],
        *_problems(found),
        f"  Next: {found.next_command}",
    ]


def _split_table(found: Inspection) -> list[str]:
    rows = [("split", "shards", "samples", "first", "last", "gaps")]
    for name, split in found.splits.items():
        gaps = f"{', '.join(split.missing)}{', ...' if split.n_missing > len(split.missing) else ''} missing"
        rows.append((
            name, format_count(split.n_shards), format_count(split.n_samples), split.first, split.last,
            gaps if split.n_missing else "-",
        ))  # fmt: skip
    return table(rows, right=(1, 2))


def _meaning(found: Inspection) -> list[str]:
    """What the axes of a sample are, and how many rows each view gives."""
    n = found.n_samples
    if len(found.item_shape) == 1:
        return [f"  {found.item_shape[0]} = features.  As samples: {format_count(n)} rows x {found.item_shape[0]:,}."]
    variables, features = found.item_shape
    said = [
        f"  {variables} = variables, {features} = features (--view flatten takes both as columns).  "
        f"As samples: {format_count(n)} rows x {variables * features:,}.  "
        f"As variables: {format_count(n * variables)} rows x {features:,}."
    ]
    if variables > features:
        said.append(
            f"  The first axis ({variables}) is the longer one: if it holds the features, the shards are transposed."
        )
    return said


def _memory(found: Inspection) -> str:
    fits = "fits" if found.dataset_bytes < found.memory_bytes // 2 else "does not fit"
    return f"it {fits} the {format_bytes(found.memory_bytes)} of memory of this machine or job (and need not)."


def _problems(found: Inspection) -> list[str]:
    if not found.problems:
        return ["  no problems"]
    shown = [(ascii(p.path)[1:-1], p.code, p.detail) for p in found.problems[:_SHOWN_PROBLEMS]]
    more = len(found.problems) - len(shown)
    rest = [f"    ... and {more:,} more (--json lists all)"] if more else []
    return [f"  {plural(len(found.problems), 'problem')}", *[f"  {line}" for line in table(shown)], *rest]
