"""A source as one lazy array a split: which rows lie in which shards, read on demand.

Invariant: the lazy array of a split holds what consolidation would write, block for block; nothing is read before it
is computed. Importing dask takes seconds, so nothing but this module does it for shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from tsclust_ooc.remote import Remote, is_url, plain_path
from tsclust_ooc.shards.objects import list_objects
from tsclust_ooc.shards.parsers import Parsers
from tsclust_ooc.shards.schema import Problem, Wanted
from tsclust_ooc.shards.survey import Survey, survey
from tsclust_ooc.staging import Staging

IN_PLACE = Staging("never")


class Source(Mapping[str, dask.array.Array]):
    """A surveyed folder of shards; `source["train"]` is its lazy concatenation.

    A dask array of shape (sample, variable, feature) or (sample, feature), one block a partition, computed on demand.
    """

    def __init__(self, found: Survey, options: Options, staging: Staging = IN_PLACE) -> None:
        self.survey, self._staging = found, staging
        self.plan = make_plan(found, options)

    def __getitem__(self, split: str) -> dask.array.Array:
        shape = (self._rows_of(split), *self.plan.schema.item_shape)
        blocks = [p for p in self.plan.partitions if p.split == split]
        if not blocks:
            return dask.array.zeros(shape, dtype=self.plan.schema.dtype)
        read = dask.delayed(read_block, pure=True)
        # Named by its digest: dask would look into every shard of it to make a name.
        plan = dask.delayed(self.plan, name=f"plan-{self.plan.digest}", traverse=False)
        dtype = np.dtype(self.plan.schema.dtype)
        staging = dask.delayed(self._staging, name=f"staging-{self.plan.digest}", traverse=False)
        return dask.array.concatenate([
            dask.array.from_delayed(read(plan, p, staging), (p.stop - p.start, *shape[1:]), dtype)
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


def read_block(plan: Plan, partition: Partition, staging: Staging = IN_PLACE) -> np.ndarray[Any, np.dtype[Any]]:
    """The rows of one partition, read now in this process; BadInput names every shard that cannot be read."""
    out = np.empty((partition.stop - partition.start, *plan.schema.item_shape), plan.schema.dtype)
    with Parsers(1) as parsers, staging.open(plan.source, parsers.patience) as stage:
        _, problems = RowReader(plan, parsers, stage).read(partition.split, partition.start, partition.stop, out)
    if problems:
        raise BadInput("; ".join(f"{p.path}: {p.code} ({p.detail})" for _, p in problems[:10]))
    return out


def open_source(
    source: str | Path | Sequence[str | Path], *, layout: str | None = None, key: str | None = None,
    feature_axis: str | None = None, ids: str | None = None, split_pattern: str | None = None, stride: int = 1,
    chunk_bytes: int | None = None,
) -> Source:  # fmt: skip
    """Survey a folder of shards and open it as lazy dask arrays, one a split.

    Instead of a folder `source` may be one HDF5 file, a text file (.txt, .list) with a path a line, or a sequence of
    these; shards are then named relative to the folder that all lie in. `split_pattern` is a regular expression with a
    group named split, searched for in these names. Shards with problems are left out and listed in `.problems`.

    Raises BadInput when nothing can be read, UsageError for an option that is not known.

    >>> source = open_source("embeddings/")  # doctest: +SKIP
    >>> source["train"].mean(axis=0).compute()  # doctest: +SKIP
    """
    options = Options(DEFAULT_CHUNK_BYTES if chunk_bytes is None else chunk_bytes, stride=stride)
    given = [source] if isinstance(source, str | Path) else source
    wanted = Wanted(layout, key, feature_axis, ids, split_pattern)
    places = [plain_path(str(one)) for one in given]
    with Parsers(budget.available_cores()) as parsers:
        if len(places) == 1 and is_url(places[0]):
            remote = Remote(places[0], parsers.patience)
            staging = Staging("never", remote=remote)
            with staging.open(str(remote), parsers.patience) as stage:
                found = survey(list_objects(remote), parsers, wanted, local=stage.local)
            return Source(found, options, staging)
        return Source(survey([Path(one).expanduser() for one in places], parsers, wanted), options)
