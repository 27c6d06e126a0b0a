"""The index of a partition: every row of it, written a chunk at a time, or no file."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from tsclust_ooc.indexing import ROW_BYTES, index_name, index_writer
from tsclust_ooc.plan import Options, Partition, make_plan
from tsclust_ooc.reading import Ids
from tsclust_ooc.shards.schema import Schema, Shard
from tsclust_ooc.shards.survey import Survey


def ids(start: int, stop: int) -> Ids:
    """Rows of one shard."""
    rows = range(start, stop)
    return Ids(["train/0.h5"] * len(rows), list(rows), [f"0:{row}" for row in rows])


def index_of(path: Path, *counts: int, n_rows: int) -> Path:
    """The index of a partition of `n_rows` from row 100 on, noted in pieces of `counts` rows."""
    row = 100
    with index_writer(path, Partition(3, "train", 100, 100 + n_rows)) as note:
        for n in counts:
            note(ids(row, row + n))
            row += n
    return path


def test_every_row_is_in_it_once_and_in_order_however_they_were_noted(tmp_path):
    wanted = pd.DataFrame({
        "split": ["train"] * 50, "row": range(100, 150), "shard": ["train/0.h5"] * 50, "shard_row": range(100, 150),
        "sample_id": [f"0:{row}" for row in range(100, 150)],
    })  # fmt: skip
    for i, counts in enumerate([(50,), (20, 20, 10), (1, 49)]):
        made = index_of(tmp_path / f"{i}.parquet", *counts, n_rows=50)
        pd.testing.assert_frame_equal(pd.read_parquet(made), wanted, check_dtype=False)


def test_the_same_pieces_give_the_same_bytes(tmp_path):
    one, other = (index_of(tmp_path / name, 30, 20, n_rows=50) for name in ("a", "b"))
    assert one.read_bytes() == other.read_bytes()


def test_a_file_without_all_rows_never_gets_its_name(tmp_path):
    index_of(tmp_path / "a.parquet", 20, 20, n_rows=50)
    assert list(tmp_path.iterdir()) == []


def test_an_error_on_the_way_leaves_no_file(tmp_path):
    def fail():
        with index_writer(tmp_path / "a.parquet", Partition(0, "train", 100, 150)) as note:
            note(ids(100, 150))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_memory_holds_the_rows_of_one_chunk_and_less_for_each_than_is_planned_for(tmp_path):
    n, n_chunks = 5_000, 20
    tracemalloc.start()
    try:
        made = index_of(tmp_path / "a.parquet", *[n] * n_chunks, n_rows=n * n_chunks)
        assert tracemalloc.get_traced_memory()[1] < 1.5 * n * ROW_BYTES
    finally:
        tracemalloc.stop()
    assert pq.ParquetFile(made).num_row_groups == n_chunks
    assert pq.ParquetFile(made).metadata.num_rows == n * n_chunks


def test_files_of_a_split_are_numbered_from_zero():
    shards = tuple(Shard(f"{split}/0.h5", split, 1000, 10**18, 300) for split in ("train", "val"))
    found = Survey("/data", Schema("rows-per-file", "x", (16,), "<f4"), "told", shards, (), (), (), 0)
    plan = make_plan(found, Options(4096))
    names = [index_name(plan, partition) for partition in plan.partitions]
    assert names == [f"index/{split}-{i:05d}.parquet" for split in ("train", "val") for i in range(3)]
