"""A source as one lazy array a split: which rows lie in which shards, read on demand.

Invariant: the lazy array of a split holds what consolidation would write, block for block; nothing is read before it
is computed. Importing dask takes seconds, so nothing but this module does it for shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import dask
import dask.array
import numpy as np

from tsclust_ooc import budget
from tsclust_ooc.errors import BadInput
from tsclust_ooc.plan import DEFAULT_CHUNK_BYTES, Options, Partition, Plan, make_plan
from tsclust_ooc.reading import RowReader
from tsclust_ooc.shards.parsers import Parsers
from tsclust_ooc.shards.schema import Problem
from tsclust_ooc.shards.survey import Survey, survey
from tsclust_ooc.staging import NO_STAGE


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
    with Parsers(1) as parsers:
        _, problems = RowReader(plan, parsers, NO_STAGE).read(partition.split, partition.start, partition.stop, out)
    if problems:
        raise BadInput("; ".join(f"{p.path}: {p.code} ({p.detail})" for _, p in problems[:10]))
    return out


def open_source(
    source: str | Path, *, layout: str | None = None, key: str | None = None, feature_axis: str | None = None,
    ids: str | None = None, stride: int = 1, chunk_bytes: int | None = None,
) -> Source:  # fmt: skip
    """Survey a folder of shards (or one HDF5 file) and open it as lazy dask arrays, one a split.

    Shards with problems are left out and listed in `.problems`. Raises BadInput when nothing can be read.

    >>> source = open_source("embeddings/")  # doctest: +SKIP
    >>> source["train"].mean(axis=0).compute()  # doctest: +SKIP
    """
    options = Options(DEFAULT_CHUNK_BYTES if chunk_bytes is None else chunk_bytes, stride=stride)
    with Parsers(budget.available_cores()) as parsers:
        return Source(
            survey(Path(source).expanduser(), parsers, layout=layout, key=key, feature_axis=feature_axis, ids=ids),
            options,
        )
