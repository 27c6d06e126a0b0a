"""inspect --deep: one read of all rows for what only the data tell.

Invariant: every row is read once, by blocks; what is held besides a few blocks is 17 bytes a sample and the moments of
each split. A shard that cannot be read is named, and the others are examined all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tsclust_ooc import budget, content, drift
from tsclust_ooc.census import NAMED
from tsclust_ooc.content import DIGEST_BYTES
from tsclust_ooc.drift import Drift, Moments, Sketch
from tsclust_ooc.passes import one_blas_thread
from tsclust_ooc.plan import Plan
from tsclust_ooc.progress import Listener, silent
from tsclust_ooc.reading import RowReader
from tsclust_ooc.runtime import ClusterSpec, open_runtime
from tsclust_ooc.shards.schema import Problem

_READERS_A_CORE = 2  # a reader waits for the disk while another computes
_BLOCKS_A_READER = 5  # as read, as bytes of the file, and what the moments make of it
_TILE_BYTES = 2**20  # what is made of it stays in a core's cache
_LISTED_GROUPS = 100

Array = np.ndarray[Any, Any]
Block = tuple[str, int, int]


@dataclass(frozen=True)
class Copies:
    """Samples whose bytes are equal: how many in all, and the names of the first ten, over all splits."""

    n_samples: int
    samples: tuple[str, ...]


@dataclass(frozen=True)
class Duplicates:
    """Groups of equal samples; `n_copies` samples are there once more than needed. `groups`: the 100 largest."""

    n_groups: int
    n_copies: int
    n_groups_across_splits: int
    groups: tuple[Copies, ...]


@dataclass(frozen=True)
class SplitContent:
    """What the samples of a split hold. Names are those of the first ten samples, or of the first ten shards.

    A constant sample has one value everywhere, and not zero; NaN and infinite values are counted one by one.
    """

    n_samples: int
    n_unread: int
    n_zero: int
    zero: tuple[str, ...]
    n_constant: int
    constant: tuple[str, ...]
    n_nan: int
    n_inf: int
    n_not_finite_samples: int
    not_finite_shards: tuple[str, ...]


@dataclass(frozen=True)
class Examination:
    """What a read of all rows found; `drift_definition` says what the figures of `drift` are."""

    n_samples: int
    n_bytes: int
    splits: dict[str, SplitContent]
    duplicates: Duplicates
    drift: tuple[Drift, ...]
    drift_definition: str
    problems: tuple[Problem, ...]


def examine(plan: Plan, reader: RowReader, listener: Listener = silent) -> Examination:
    """Read all rows of `plan` once and say what they hold."""
    notes = _Notes(plan)
    n_workers = _workers(plan)
    spec = ClusterSpec("threads", n_workers, budget.memory_limit(), Path())
    look = _Look(reader, notes.sketch)
    with one_blas_thread, open_runtime(spec, listener) as runtime:
        blocks = list(_blocks(plan))
        done = 0
        for block, found in zip(blocks, runtime.mapper(look, blocks), strict=True):
            notes.add(block, found)
            done += block[2] - block[1]
            listener.advance("examine", done, plan.n_rows)
    return notes.examination()


def _workers(plan: Plan) -> int:
    each = _BLOCKS_A_READER * plan.largest_chunk_bytes
    held = budget.BASE_BYTES // 2 + plan.n_rows * 2 * (DIGEST_BYTES + 1)
    fit = (budget.memory_limit() // 2 - held) // each
    return int(max(1, min(_READERS_A_CORE * budget.available_cores(), fit)))


def _blocks(plan: Plan) -> Iterator[Block]:
    for partition in plan.partitions:
        for start, stop in plan.chunks_of(partition):
            yield partition.split, start, stop


@dataclass(frozen=True)
class _Found:
    """Of one block: what was looked at tile by tile, the moments of its finite rows, and what could not be read."""

    looked: tuple[content.Looked, ...]
    moments: Moments
    unread: tuple[tuple[int, int, Problem], ...]


@dataclass(frozen=True)
class _Look:
    """Reads a block and looks at it; called from many threads."""

    reader: RowReader
    sketch: Sketch

    def __call__(self, block: Block) -> _Found:
        split, start, stop = block
        schema = self.reader.plan.schema
        samples = np.empty((stop - start, *schema.item_shape), schema.dtype)
        _, problems = self.reader.read(split, start, stop, samples)
        unread = tuple((s.row, s.row + s.stop - s.start, problem) for s, problem in problems)
        for first, last, _ in unread:
            samples[first - start : last - start] = 0  # undefined until now
        looked, moments = [], self.sketch.moments(samples[:0].reshape(0, self.sketch.n_columns))
        step = max(1, _TILE_BYTES // schema.item_bytes)
        read = np.ones(len(samples), bool)
        for first, last, _ in unread:
            read[first - start : last - start] = False
        for top in range(0, len(samples), step):
            tile = samples[top : top + step]
            looked.append(content.look_at(tile))
            usable = read[top : top + step] & (looked[-1].flags & (content.NAN | content.INF) == 0)
            rows = tile.reshape(len(tile), -1)
            moments = self.sketch.combined(moments, self.sketch.moments(rows if usable.all() else rows[usable]))
        return _Found(tuple(looked), moments, unread)


class _Notes:
    """What was found so far, in order of the rows."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.sketch = Sketch(int(np.prod(plan.schema.item_shape)))
        self.sketch.matrix  # noqa: B018 - made once, before threads ask for it
        self.digests = np.zeros((plan.n_rows, 2), np.uint64)
        self.flags = np.zeros(plan.n_rows, np.uint8)
        ends = np.cumsum([0, *(split.n_rows for split in plan.splits)])
        self.first_row = {split.name: int(end) for split, end in zip(plan.splits, ends[:-1], strict=True)}
        self.moments: dict[str, Moments] = {}
        self.n_nan = dict.fromkeys(self.first_row, 0)
        self.n_inf = dict.fromkeys(self.first_row, 0)
        self.problems: dict[str, Problem] = {}

    def add(self, block: Block, found: _Found) -> None:
        """Take over what was found in the next block."""
        split, start, _ = block
        at = self.first_row[split] + start
        for looked in found.looked:
            n = len(looked.flags)
            self.digests[at : at + n], self.flags[at : at + n] = looked.digests, looked.flags
            self.n_nan[split] += looked.n_nan
            self.n_inf[split] += looked.n_inf
            at += n
        for first, last, problem in found.unread:
            self.flags[self.first_row[split] + first : self.first_row[split] + last] = content.UNREAD
            self.problems.setdefault(problem.path, problem)
        before = self.moments.get(split)
        self.moments[split] = found.moments if before is None else self.sketch.combined(before, found.moments)

    def examination(self) -> Examination:
        """All of it, once every block was added."""
        drifts = drift.compare({name: self.moments[name] for name in self.first_row if name in self.moments})
        n_read = int((self.flags & content.UNREAD == 0).sum())
        return Examination(
            n_read, n_read * self.plan.schema.item_bytes, {s.name: self._split(s.name) for s in self.plan.splits},
            self._duplicates(), drifts, drift.DEFINITION, tuple(self.problems.values()),
        )  # fmt: skip

    def _split(self, name: str) -> SplitContent:
        flags = self._of_split(name)
        zero, constant = (np.flatnonzero(flags & flag) for flag in (content.ZERO, content.CONSTANT))
        bad = np.flatnonzero(flags & (content.NAN | content.INF))
        return SplitContent(
            n_samples=len(flags), n_unread=int((flags & content.UNREAD != 0).sum()), n_zero=len(zero),
            zero=self._named(name, zero), n_constant=len(constant), constant=self._named(name, constant),
            n_nan=self.n_nan[name], n_inf=self.n_inf[name], n_not_finite_samples=len(bad),
            not_finite_shards=content.shards_of(self.plan, name, bad.tolist(), NAMED),
        )  # fmt: skip

    def _of_split(self, name: str) -> Array:
        n = next(split.n_rows for split in self.plan.splits if split.name == name)
        return self.flags[self.first_row[name] : self.first_row[name] + n]

    def _named(self, split: str, rows: Array) -> tuple[str, ...]:
        return tuple(content.name_of(self.plan, split, int(row)) for row in rows[:NAMED])

    def _duplicates(self) -> Duplicates:
        groups = list(content.groups_of_equals(self.digests, self.flags & content.UNREAD == 0))
        bounds = np.array(list(self.first_row.values()))
        across = sum(len(set(np.searchsorted(bounds, rows, side="right").tolist())) > 1 for rows in groups)
        groups.sort(key=lambda rows: (-len(rows), rows[0]))
        listed = tuple(Copies(len(rows), tuple(map(self._place, rows[:NAMED]))) for rows in groups[:_LISTED_GROUPS])
        return Duplicates(len(groups), sum(len(rows) - 1 for rows in groups), across, listed)

    def _place(self, row: int) -> str:
        split = next(name for name, first in reversed(self.first_row.items()) if first <= row)
        return content.name_of(self.plan, split, int(row) - self.first_row[split])
