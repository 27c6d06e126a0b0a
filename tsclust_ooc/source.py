"""A source as one lazy array a split: which rows lie in which shards, read on demand.

Invariant: `RowReader.read` is the only way rows come out of shards; the lazy dask array and the written dataset hold
exactly what it gives.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import dask
import dask.array
import numpy as np

from tsclust_ooc import budget
from tsclust_ooc.errors import BadInput
from tsclust_ooc.plan import Options, Partition, Plan, Segment, make_plan
from tsclust_ooc.shards.parsers import Parsers
from tsclust_ooc.shards.schema import DATASET_PER_ITEM, ITEM_PER_FILE, Problem, ShardError
from tsclust_ooc.shards.survey import Survey, survey
from tsclust_ooc.shards.templates import Matcher, matchers
from tsclust_ooc.staging import Stage


@dataclass(frozen=True)
class Ids:
    """Where each row of a read came from: shard path, row inside the shard, sample_id; one list item a row."""

    shards: list[str]
    shard_rows: list[int]
    sample_ids: list[str]

    def extend(self, more: Ids) -> None:
        """Append the rows of `more`."""
        self.shards.extend(more.shards)
        self.shard_rows.extend(more.shard_rows)
        self.sample_ids.extend(more.sample_ids)


class RowReader:
    """Reads rows of a plan's splits out of their shards: by template where one is proven, else by a parser process.

    Use it from many threads. It owns neither the parsers nor the stage.
    """

    def __init__(self, plan: Plan, parsers: Parsers, stage: Stage) -> None:
        self.plan, self._parsers, self._stage = plan, parsers, stage
        schema = plan.schema
        usable = tuple(t for t in plan.templates if t.member == schema.key and t.dtype == schema.dtype)
        self._matchers = matchers(usable)

    def read(self, split: str, start: int, stop: int, out: np.ndarray) -> tuple[Ids, list[tuple[Segment, Problem]]]:
        """Fill `out` ((stop - start, *item_shape), C-contiguous) with rows of a split.

        Returns where each row came from, and the problem of each segment that could not be read (its rows in `out`
        are then undefined).
        """
        ids, problems = Ids([], [], []), []
        raw = out.data.cast("B") if out.size else memoryview(b"")
        item = self.plan.schema.item_bytes
        for segment in self.plan.segments(split, start, stop):
            at, n = segment.row - start, segment.stop - segment.start
            try:
                names = self._read_segment(segment, raw[at * item : (at + n) * item])
                _note(ids, segment, names, self.plan.schema.layout)
            except ShardError as error:
                problems.append((segment, Problem(segment.shard.path, error.problem.code, error.problem.detail)))
            except OSError as error:
                reason = error.strerror or str(error)
                problems.append((segment, Problem(segment.shard.path, "unreadable", reason)))
        return ids, problems

    def _read_segment(self, segment: Segment, out: memoryview) -> list[str]:
        shard = segment.shard
        path = os.path.join(self.plan.source, shard.path)
        stamp = (shard.size, shard.mtime_ns)
        with self._stage.local(path, stamp) as local:
            for matcher in self._matchers.get(shard.size, ()):
                if self._by_template(matcher, local, segment, stamp, out):
                    return []
            return self._parsers.read(local, stamp, self.plan.schema, segment.start, segment.stop, out)

    def _by_template(
        self, matcher: Matcher, path: str, segment: Segment, stamp: tuple[int, int], out: memoryview
    ) -> bool:
        if matcher.template.n_bytes != segment.shard.n_samples * self.plan.schema.item_bytes:
            return False
        return matcher.read_into(path, stamp, out, segment.start * self.plan.schema.item_bytes)


def _note(ids: Ids, segment: Segment, names: list[str], layout: str) -> None:
    n = segment.stop - segment.start
    stem = segment.shard.path.rpartition("/")[2].rpartition(".")[0]
    ids.shards.extend([segment.shard.path] * n)
    ids.shard_rows.extend(range(segment.start, segment.stop))
    if layout == DATASET_PER_ITEM:
        ids.sample_ids.extend(names)
    elif layout == ITEM_PER_FILE:
        ids.sample_ids.append(stem)
    else:
        ids.sample_ids.extend(f"{stem}:{row}" for row in range(segment.start, segment.stop))


class Source(Mapping[str, dask.array.Array]):
    """A surveyed folder of shards; `source["train"]` is its lazy concatenation.

    A dask array of shape (sample, variable, feature) or (sample, feature), one block a partition, computed on demand.
    """

    def __init__(self, found: Survey, options: Options) -> None:
        self.survey = found
        self.plan = make_plan(found, options)

    def __getitem__(self, split: str) -> dask.array.Array:
        shape = (self._rows_of(split), *self.plan.schema.item_shape)
        blocks = [p for p in self.plan.partitions if p.split == split]
        if not blocks:
            return dask.array.zeros(shape, dtype=self.plan.schema.dtype)
        read = dask.delayed(read_block, pure=True)
        # Named by its digest: dask would look into every shard of it to make a name.
        plan = dask.delayed(self.plan, name=f"plan-{self.plan.digest}", traverse=False)
        return dask.array.concatenate([
            dask.array.from_delayed(read(plan, p), (p.stop - p.start, *shape[1:]), np.dtype(self.plan.schema.dtype))
            for p in blocks
        ])  # fmt: skip

    def __iter__(self) -> Iterator[str]:
        return (split.name for split in self.plan.splits)

    def __len__(self) -> int:
        return len(self.plan.splits)

    def _rows_of(self, split: str) -> int:
        for one in self.plan.splits:
            if one.name == split:
                return one.n_rows
        raise KeyError(f"no split {split!r} in {self.plan.source}; it has {', '.join(self)}")

    @cached_property
    def problems(self) -> tuple[Problem, ...]:
        """Shards that are left out, each with its code."""
        return self.survey.problems


def read_block(plan: Plan, partition: Partition) -> np.ndarray[Any, np.dtype[Any]]:
    """The rows of one partition, read now in this process; BadInput names every shard that cannot be read."""
    out = np.empty((partition.stop - partition.start, *plan.schema.item_shape), plan.schema.dtype)
    with Parsers(1) as parsers, Stage(Path(), "never", on_network=False) as stage:
        _, problems = RowReader(plan, parsers, stage).read(partition.split, partition.start, partition.stop, out)
    if problems:
        raise BadInput("; ".join(f"{p.path}: {p.code} ({p.detail})" for _, p in problems[:10]))
    return out


def open_source(
    source: str | Path, *, layout: str | None = None, key: str | None = None, chunk_bytes: int | None = None
) -> Source:
    """Survey a folder of shards (or one HDF5 file) and open it as lazy dask arrays, one a split.

    Shards with problems are left out and listed in `.problems`. Raises BadInput when nothing can be read.

    >>> source = open_source("embeddings/")  # doctest: +SKIP
    >>> source["train"].mean(axis=0).compute()  # doctest: +SKIP
    """
    options = Options() if chunk_bytes is None else Options(chunk_bytes)
    with Parsers(budget.available_cores()) as parsers:
        return Source(survey(Path(source).expanduser(), parsers, layout=layout, key=key), options)
