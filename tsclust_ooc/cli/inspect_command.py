"""tsclust inspect."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np
from cyclopts import Parameter

from tsclust_ooc.census import Distribution
from tsclust_ooc.cli.console import Output, OutputOptions, Place, expand, expand_place, session, table
from tsclust_ooc.pipeline.examining import Copies, Duplicates, Examination, SplitContent
from tsclust_ooc.pipeline.looking import Inspection, InspectOptions
from tsclust_ooc.pipeline.looking import inspect as look
from tsclust_ooc.units import format_bytes, format_count, format_seconds, plural

_SHOWN_PROBLEMS = 20
_SHOWN_GROUPS, _SHOWN_NAMES = 10, 5
_ALIKE = 4  # sizes that are listed one by one; of more the range tells as much


def inspect(
    source: Place,
    /,
    *,
    options: Annotated[InspectOptions, Parameter(name="*")] = InspectOptions(),
    output: Output = OutputOptions(),
) -> None:
    """Survey every shard of a source and say what it holds. Changes nothing.

    Parameters
    ----------
    source
        Folder of shards (searched with its sub-folders), one HDF5 file, or a text file (.txt, .list) with a path a
        line: shards or folders, relative to the file's own folder; their order means nothing. Or a URL, like
        s3://bucket/folder.
    """
    began = time.perf_counter()
    with session(output) as show:
        found = look(expand_place(source), replace(options, also=tuple(map(expand, options.also))), show)
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
        *_kinds(found),
        *_distributions(found),
        *_estimate(found),
        *[f"  note: {note}" for note in found.notes],
        *_problems(found),
        *(_examined(found.deep) if found.deep is not None else []),
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
    return [
        f"  {variables} = variables, {features} = features (--view flatten takes both as columns).  "
        f"As samples: {format_count(n)} rows x {variables * features:,}.  "
        f"As variables: {format_count(n * variables)} rows x {features:,}."
    ]


def _kinds(found: Inspection) -> list[str]:
    """What the shards hold that do not fit; the usual kind is told by the line of the key."""
    return [f"  {plural(k.n_shards, 'shard')} not: {k.value}   {_names(k.first, k.n_shards)}" for k in found.kinds[1:]]


def _distributions(found: Inspection) -> list[str]:
    shown = [f"  shards   {_spread(found.sizes, format_bytes, 'of')}"]
    if found.samples_a_shard.n_distinct > 1:
        shown.append(f"  samples a shard   {_spread(found.samples_a_shard, format_count, 'with')}")
    return shown


def _spread(d: Distribution, text: Callable[[int], str], word: str) -> str:
    """A distribution in one line: its values where they are few, else its range; and the odd shards by name."""
    if d.n_distinct == 1:
        return f"all {word} {text(d.least)}"
    if d.n_distinct <= _ALIKE:
        said = ", ".join(f"{format_count(n)} {word} {text(value)}" for value, n in d.common)
    else:
        value, n = d.common[0]
        said = (
            f"{text(d.least)} to {text(d.most)}, half of them at most {text(d.median)}; "
            f"{format_count(n)} {word} {text(value)}"
        )
    return f"{said}   odd: {_names(d.odd, d.n_odd)}" if d.n_odd else said


def _names(first: Sequence[str], n: int) -> str:
    shown = [ascii(name)[1:-1] for name in first[:_SHOWN_NAMES]]
    return ", ".join(shown) + (f", ... ({format_count(n)} in all)" if n > len(shown) else "")


def _estimate(found: Inspection) -> list[str]:
    e = found.estimate
    fits = "fits" if found.dataset_bytes < found.memory_bytes // 2 else "does not fit"
    return [
        f"  As a dataset: {format_bytes(e.disk_bytes)} on disk in {plural(found.n_chunks, 'chunk')}; it {fits} the "
        f"{format_bytes(found.memory_bytes)} of memory of this machine or job (and need not).",
        f"  To consolidate: about {format_seconds(e.seconds)}, {format_bytes(e.memory_bytes)} of memory.   "
        f"To cluster: {format_bytes(e.cluster_memory_bytes)} of memory or more.",
        f"    {e.basis}",
    ]


def _problems(found: Inspection) -> list[str]:
    if not found.problems:
        return ["  no problems"]
    shown = [(ascii(p.path)[1:-1], p.code, p.detail) for p in found.problems[:_SHOWN_PROBLEMS]]
    more = len(found.problems) - len(shown)
    rest = [f"    ... and {more:,} more (--json lists all)"] if more else []
    return [f"  {plural(len(found.problems), 'problem')}", *[f"  {line}" for line in table(shown)], *rest]


def _examined(deep: Examination) -> list[str]:
    """What a read of all data found."""
    return [
        f"  read {plural(deep.n_samples, 'sample')}, {format_bytes(deep.n_bytes)}",
        *[line for name, split in deep.splits.items() for line in _content(name, split)],
        *_duplicates(deep.duplicates),
        *_drift(deep),
    ]


def _content(name: str, split: SplitContent) -> list[str]:
    said = []
    if split.n_zero:
        said.append(f"{plural(split.n_zero, 'sample')} all zero: {_names(split.zero, split.n_zero)}")
    if split.n_constant:
        said.append(f"{plural(split.n_constant, 'sample')} constant: {_names(split.constant, split.n_constant)}")
    if split.n_not_finite_samples:
        where = ", ".join(ascii(path)[1:-1] for path in split.not_finite_shards)
        said.append(
            f"{format_count(split.n_nan)} NaN and {format_count(split.n_inf)} infinite values in "
            f"{plural(split.n_not_finite_samples, 'sample')}; first in {where}"
        )
    if split.n_unread:
        said.append(f"{plural(split.n_unread, 'sample')} could not be read")
    return [f"    {name}: {one}" for one in said or ["no zero, constant, NaN or infinite samples"]]


def _duplicates(found: Duplicates) -> list[str]:
    if not found.n_groups:
        return ["    no two samples are equal"]
    across = f", {format_count(found.n_groups_across_splits)} across splits" if found.n_groups_across_splits else ""
    more = found.n_groups - len(found.groups[:_SHOWN_GROUPS])
    return [
        f"    {plural(found.n_groups, 'group')} of equal samples{across}: {format_count(found.n_copies)} are copies",
        *[f"      {_equal(group)}" for group in found.groups[:_SHOWN_GROUPS]],
        *([f"      ... and {plural(more, 'group')} more (--json lists the 100 largest)"] if more else []),
    ]


def _equal(group: Copies) -> str:
    return f"{format_count(group.n_samples)}: {_names(group.samples, group.n_samples)}"


def _drift(deep: Examination) -> list[str]:
    """The figures of each pair of splits; what they are, where one of them warns."""
    shown = [
        f"    {one.a} and {one.b}: mean shift {_figure(one.mean_shift)}, covariance correlation "
        f"{_figure(one.covariance_correlation)}"
        for one in deep.drift
    ]
    warned = [one for one in deep.drift if one.warning]
    shown += [
        f"    warning: {one.a} and {one.b} may lie in different spaces (two extractors, or one with unseeded weights): "
        f"{one.warning}"
        for one in warned
    ]
    return [*shown, f"      {deep.drift_definition}"] if warned else shown


def _figure(value: float | None) -> str:
    return "cannot be told" if value is None else f"{value:.2f}"
