"""The index of a partition: one parquet file that says where each of its rows came from.

Invariant: an index file without every row of its partition never gets its name. It is written a chunk at a time, a row
group each: the names of rows take more memory than narrow rows themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq

from tsclust_ooc import files
from tsclust_ooc.dataset import INDEX, INDEX_SCHEMA, index_table
from tsclust_ooc.plan import Partition, Plan
from tsclust_ooc.reading import Ids

ROW_BYTES = 560
"""Of memory for each row of a chunk while its index is made: names, their Arrow columns, parquet's pages (measured)."""


class _Unfinished(Exception):
    """Rows of a partition were not noted."""


def index_name(plan: Plan, partition: Partition) -> str:
    """The index file of a partition, relative to the dataset."""
    first = next(p.index for p in plan.partitions if p.split == partition.split)
    return f"{INDEX}/{partition.split}-{partition.index - first:05d}.parquet"


@contextlib.contextmanager
def index_writer(path: Path, partition: Partition) -> Iterator[Callable[[Ids], None]]:
    """What notes the rows of a partition in the file at `path`, in their order, as many at a time as you like.

    The file gets its name when the block ends, and only if all rows were noted.
    """
    row = partition.start
    with (
        contextlib.suppress(_Unfinished),
        files.atomic_file(path) as file,
        pq.ParquetWriter(file, INDEX_SCHEMA) as writer,
    ):

        def note(ids: Ids) -> None:
            nonlocal row
            writer.write_table(index_table(partition.split, row, ids.shards, ids.shard_rows, ids.sample_ids))
            row += len(ids.shards)

        yield note
        if row < partition.stop:
            raise _Unfinished
