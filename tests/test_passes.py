"""One read of all rows: what is accepted as rows, who runs the blocks, what is counted."""

import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import zarr
from matrices import Counting, blocks
from threadpoolctl import threadpool_info

from tsclust_ooc.errors import BadInput, TsclustError
from tsclust_ooc.passes import (
    Tally,
    as_rows,
    gather,
    one_blas_thread,
    one_pass,
    thread_mapper,
    working_dtype,
)


@dataclass(frozen=True)
class Columns:
    """Sums of columns; per row its first value. Its combine writes down the shape of the tree."""

    def chunk(self, x, start):
        return (x.sum(axis=0, dtype=np.float64), str(start)), x[:, 0]

    def combine(self, a, b):
        return a[0] + b[0], f"({a[1]} {b[1]})"


@pytest.fixture
def x():
    return np.random.default_rng(1).normal(size=(70, 3)).astype(np.float32)


def test_the_tree_is_fixed_by_the_number_of_blocks(x):
    assert one_pass(Columns(), blocks(x, 7))[1] == "(((0 10) (20 30)) ((40 50) 60))"


@pytest.mark.parametrize("n_blocks", [1, 2, 3, 8, 13, 64])
def test_any_number_of_blocks_gives_the_sum(x, n_blocks):
    np.testing.assert_allclose(one_pass(Columns(), blocks(x, n_blocks))[0], x.sum(axis=0, dtype=np.float64))


@pytest.mark.parametrize("n_threads", [1, 2, 4])
def test_threads_give_the_same_bits_as_a_loop(x, n_threads):
    rows = blocks(x, 13)
    with thread_mapper(n_threads) as ours, ThreadPoolExecutor(n_threads) as pool:
        results = [one_pass(Columns(), rows, mapper=mapper)[0].tobytes() for mapper in (map, ours, pool.map)]
    assert len(set(results)) == 1


def test_what_is_mapped_survives_pickling_with_the_same_bits(x):
    def elsewhere(fn, items):
        return [pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(fn))(item))) for item in items]

    assert (
        one_pass(Columns(), blocks(x, 5), mapper=elsewhere)[0].tobytes()
        == one_pass(Columns(), blocks(x, 5))[0].tobytes()
    )


def test_the_sink_sees_every_row_in_order(x):
    seen = []
    with thread_mapper(3) as mapper:
        one_pass(Columns(), blocks(x, 9), mapper=mapper, sink=lambda start, first: seen.append((start, first)))
    assert [start for start, _ in seen] == list(blocks(x, 9).bounds[:-1])
    np.testing.assert_array_equal(np.concatenate([first for _, first in seen]), x[:, 0])


def test_a_pass_counts_once_with_its_bytes_as_stored(x):
    tally, rows = Tally(), Counting(blocks(x.astype(np.float16), 6))
    one_pass(Columns(), rows, tally=tally)
    assert rows.reads == [0, 1, 2, 3, 4, 5]
    assert (tally.n_passes, tally.bytes_read) == (1, 70 * 3 * 2)
    assert rows.n_bytes == 70 * 3 * 2


def test_a_mapper_that_loses_results_is_noticed(x):
    with pytest.raises(TsclustError, match="2 results for 4 blocks"):
        one_pass(Columns(), blocks(x, 4), mapper=lambda fn, items: [fn(item) for item in list(items)[:2]])


def test_the_thread_mapper_does_not_run_far_ahead():
    started, lock = [], threading.Lock()

    def work(item):
        with lock:
            started.append(item)
        return item

    with thread_mapper(2) as mapper:
        results = iter(mapper(work, range(100)))
        assert next(results) == 0
        time.sleep(0.05)
        assert len(started) <= 5
        assert list(results) == list(range(1, 100))


def test_blas_runs_one_thread_in_a_pass_and_as_before_after_it(x):
    def blas():
        return [lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"]

    before, inside = blas(), []
    one_pass(Columns(), blocks(x, 2), sink=lambda *_: inside.append(blas()))
    assert all(set(threads) == {1} for threads in inside)
    with one_blas_thread:
        with one_blas_thread:
            pass
        assert set(blas()) == {1}
    assert blas() == before


def test_gather_reads_only_the_blocks_that_hold_the_rows(x):
    rows, tally = Counting(blocks(x, 7)), Tally()
    np.testing.assert_array_equal(gather(rows, np.array([3, 9, 10, 69]), tally=tally), x[[3, 9, 10, 69]])
    assert rows.reads == [0, 1, 6]
    assert (tally.n_passes, tally.bytes_read) == (0, 30 * 3 * 4)
    gather(rows, np.arange(0, 70, 5), tally=tally)
    assert tally.n_passes == 1


def test_gather_of_nothing_is_an_empty_matrix(x):
    assert gather(blocks(x, 2), np.array([], dtype=int)).shape == (0, 3)


@pytest.mark.parametrize(
    ("stored", "read"),
    [("<f2", "f4"), ("<f4", "f4"), (">f4", "f4"), (">f8", "f8"), ("i1", "f4"), ("u2", "f4"), ("i4", "f8"),
     ("i8", "f8"), ("?", "f4"), ("g", "f8")],
)  # fmt: skip
def test_every_real_type_is_read_as_a_float_that_holds_it(stored, read):
    x = np.arange(12).reshape(4, 3).astype(stored)
    got = as_rows(x).read(0)
    assert got.dtype == np.dtype(read) == working_dtype(stored)
    assert got.dtype.isnative
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, x.astype(np.float64))


@pytest.mark.parametrize(
    ("x", "found"),
    [
        (np.zeros((2, 3), complex), "complex128"),
        (np.array([["a", "b"]]), "<U1"),
        (np.array([[1, None]], dtype=object), "object"),
        (np.zeros(5), r"1 dimensions \(5,\)"),
        (np.zeros((2, 3, 4)), r"\(2, 3, 4\)"),
        (np.zeros((0, 3)), r"\(0, 3\)"),
        (np.zeros((3, 0)), r"\(3, 0\)"),
        ([[1.0, 2.0], [3.0]], "list"),
        (np.ma.masked_equal(np.eye(2), 1), "masked"),
        (da.zeros((2, 3, 4)), "3 dimensions"),
        (da.zeros((4, 4), dtype=complex), "complex128"),
    ],
)
def test_what_is_no_matrix_of_numbers_is_refused_by_name(x, found):
    with pytest.raises(BadInput, match=found):
        as_rows(x)


def test_blocks_of_a_numpy_array_are_eight_mebibytes():
    assert as_rows(np.zeros((5000, 1024), np.float32)).bounds == (0, 2048, 4096, 5000)


def test_blocks_of_a_zarr_array_are_whole_chunks_grouped_when_small():
    small = zarr.create_array({}, shape=(5000, 1024), chunks=(1000, 1024), dtype="f4")
    assert as_rows(small).bounds == (0, 4000, 5000)
    large = zarr.create_array({}, shape=(9000, 1024), chunks=(4500, 1024), dtype="f4")
    assert as_rows(large).bounds == (0, 4500, 9000)


def test_zarr_rows_are_read_as_written_also_from_another_process(tmp_path, x):
    stored = zarr.create_array(tmp_path / "x.zarr", data=x, chunks=(32, 2))
    rows = pickle.loads(pickle.dumps(as_rows(stored)))
    np.testing.assert_array_equal(rows.read(0), x)


def test_blocks_of_a_dask_array_are_its_chunks(x):
    rows = as_rows(da.from_array(x, chunks=((20, 0, 50), (2, 1))))
    assert rows.bounds == (0, 20, 20, 70)
    assert rows.read(1).shape == (0, 3)
    np.testing.assert_array_equal(rows.read(2), x[20:])
    assert (rows.n_rows, rows.n_columns, rows.dtype) == (70, 3, np.float32)


def test_unknown_chunk_sizes_of_a_dask_array_are_computed(x):
    array = da.from_array(x, chunks=(20, 3))
    rows = as_rows(array[array[:, 0] > 0])
    np.testing.assert_array_equal(gather(rows, np.arange(rows.n_rows)), x[x[:, 0] > 0])


def test_frames_and_lists_of_numbers_are_rows():
    np.testing.assert_array_equal(as_rows(pd.DataFrame({"a": [1, 2], "b": [0.5, 4]})).read(0), [[1, 0.5], [2, 4]])
    np.testing.assert_array_equal(as_rows([[1, 2], [3, 4]]).read(0), [[1, 2], [3, 4]])


def test_rows_pass_through_unchanged(x):
    rows = blocks(x, 3)
    assert as_rows(rows) is rows
