"""Rows out of shards: by template where one is proven, else by a parser process.

Invariant: `RowReader.read` is the only way rows come out of shards; the lazy dask array of a source and the written
dataset hold exactly what it gives.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tsclust_ooc.inflight import Pace
from tsclust_ooc.mirror import Asked, Mirror
from tsclust_ooc.patience import Patience
from tsclust_ooc.plan import Plan, Segment
from tsclust_ooc.shards.layouts import turn
from tsclust_ooc.shards.parsers import Parsers
from tsclust_ooc.shards.schema import DATASET_PER_ITEM, ITEM_PER_FILE, Problem, Schema, Shard, ShardError
from tsclust_ooc.shards.templates import holds_samples, matchers
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


class Unproven(Exception):
    """A shard whose structure the survey presumed from its size is not what was presumed; holds its path."""


class RowReader:
    """Reads rows of a plan's splits out of their shards: by template where one is proven, else by a parser process.

    Use it from many threads. It owns neither the parsers nor the stage. With `presumed` the plan is from a survey that
    presumed: a shard of a template's size that this template does not prove ends a read with Unproven. Where the source
    is slow, many shards of a read are under way at one time. `patience` (default: that of the parsers) tries again what
    fails in passing.
    """

    def __init__(
        self,
        plan: Plan,
        parsers: Parsers,
        stage: Stage | Mirror,
        *,
        presumed: bool = False,
        patience: Patience | None = None,
    ) -> None:
        self.plan, self._parsers, self._stage, self._presumed = plan, parsers, stage, presumed
        self.patience, self._pace = patience or parsers.patience, Pace()
        self._root = os.path.join(plan.source, "")
        self._direct: dict[int, bool] = {}  # by size
        self._matchers = matchers(tuple(t for t in plan.templates if holds_samples(t, plan.schema)))

    def read(self, split: str, start: int, stop: int, out: np.ndarray) -> tuple[Ids, list[tuple[Segment, Problem]]]:
        """Fill `out` ((stop - start, *item_shape), C-contiguous) with rows of a split.

        Returns where each row came from, and the problem of each segment that could not be read (its rows in `out`
        are then undefined).
        """
        raw = out.data.cast("B") if out.size else memoryview(b"")
        item = self.plan.schema.item_bytes

        def read_one(segment: Segment) -> list[str] | Problem:
            at, n = segment.row - start, segment.stop - segment.start
            return self._names_or_problem(segment, raw[at * item : (at + n) * item])

        segments = list(self.plan.segments(split, start, stop))
        ids, problems = Ids([], [], []), []
        with self._stage.ahead(lambda: [self._asked(segment.shard) for segment in segments]):
            answers = self._read_all(read_one, segments)
        for segment, found in zip(segments, answers, strict=True):
            if isinstance(found, Problem):
                problems.append((segment, found))
            else:
                _note(ids, segment, found, self.plan.schema)
        return ids, problems

    def _read_all(
        self, read_one: Callable[[Segment], list[str] | Problem], segments: list[Segment]
    ) -> list[list[str] | Problem]:
        """Every segment's answer, in order. Parsers are few: more that wait for one make nothing faster."""
        if any(segment.shard.size in self._matchers for segment in segments):
            return self._pace.each(read_one, segments)
        return [read_one(segment) for segment in segments]

    def _names_or_problem(self, segment: Segment, out: memoryview) -> list[str] | Problem:
        path = segment.shard.path
        try:
            try:
                names = self._read_segment(segment, out)
                self.patience.succeeded()
                return names
            except OSError as error:  # rare, so that nothing else is paid for it
                return self.patience.again(error, self._read_segment, segment, out)
        except ShardError as error:
            return Problem(path, error.problem.code, error.problem.detail)
        except OSError as error:
            if self._is_presumed(segment.shard):  # a survey that opens it would say so of it
                raise Unproven(path) from error
            return Problem(path, "unreadable", error.strerror or str(error))

    def _read_segment(self, segment: Segment, out: memoryview) -> list[str]:
        shard = segment.shard
        path = self._root + shard.path
        stamp = (shard.size, shard.mtime_ns)
        if shard.size not in self._direct:
            self._direct[shard.size] = self._stage.reads_directly(shard.size)
        if self._direct[shard.size]:
            return self._read_file(path, segment, stamp, out)
        with self._stage.local(path, stamp) as local:
            return self._read_file(local, segment, stamp, out)

    def _read_file(self, path: str, segment: Segment, stamp: tuple[int, int], out: memoryview) -> list[str]:
        schema, shard = self.plan.schema, segment.shard
        for matcher in self._matchers.get(stamp[0], ()):
            fits = matcher.template.n_bytes == shard.n_samples * schema.item_bytes
            if fits and matcher.read_into(path, stamp, out, segment.start * schema.item_bytes):
                turn(schema, out)
                return []
        if self._is_presumed(shard):
            raise Unproven(shard.path)
        return self._parsers.read(path, stamp, schema, segment.start, segment.stop, out)

    def _asked(self, shard: Shard) -> Asked:
        return Asked(self._root + shard.path, shard.size, shard.mtime_ns)

    def _is_presumed(self, shard: Shard) -> bool:
        return self._presumed and shard.size in self._matchers


def _note(ids: Ids, segment: Segment, names: list[str], schema: Schema) -> None:
    path = segment.shard.path
    stem = path.rpartition("/")[2].rpartition(".")[0]
    if schema.layout == ITEM_PER_FILE:
        ids.shards.append(path)
        ids.shard_rows.append(segment.start)
        ids.sample_ids.append(stem)
        return
    rows = range(segment.start, segment.stop)
    ids.shards.extend([path] * len(rows))
    ids.shard_rows.extend(rows)
    named = schema.layout == DATASET_PER_ITEM or schema.ids
    ids.sample_ids.extend(names if named else (f"{stem}:{row}" for row in rows))
