"""All rows against all rows: the same bytes for any workers and sources, read as seldom as what is kept allows."""

import pickle
import threading

import dask.array as da
import numpy as np
import pytest
import zarr
from matrices import Counting, blobs, blocks
from scipy.spatial.distance import cdist

from tsclust_ooc.distance.dense import METRICS, UnusableRow, slab
from tsclust_ooc.distance.pairwise import BLOCK_BYTES, Blocks, Grid, Kept, grid, pairwise, read_rows
from tsclust_ooc.errors import BadInput, UsageError
from tsclust_ooc.passes import as_rows, thread_mapper


def exact(x, y=None, metric="euclidean"):
    found = cdist(x.astype(np.float64), (x if y is None else y).astype(np.float64), metric)
    if y is None:
        np.fill_diagonal(found, 0)
    return found


def small_blocks(monkeypatch, side):
    """Blocks of about side x side where the defaults would have one of 2,048."""
    default = grid.__kwdefaults__
    monkeypatch.setitem(default, "block_bytes", 4 * side * side)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1), (47, 30), (100, 99)])
def test_two_matrices_give_the_distances_of_scipy(monkeypatch, metric, shape):
    small_blocks(monkeypatch, 16)
    x, y = blobs(shape[0], 6, seed=1), blobs(shape[1], 6, seed=2)
    found = pairwise(x, y, metric=metric)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact(x, y, metric), rtol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [1, 2, 16, 47, 100])
def test_one_matrix_gives_symmetric_distances_of_scipy(monkeypatch, metric, n):
    small_blocks(monkeypatch, 16)
    x = blobs(n, 6)
    found = pairwise(x, metric=metric)
    np.testing.assert_allclose(found, exact(x, metric=metric), rtol=1e-6)
    np.testing.assert_array_equal(found, found.T)
    assert not np.diag(found).any()
    np.testing.assert_array_equal(pairwise(x, x, metric=metric), found)


@pytest.mark.parametrize("metric", METRICS)
def test_any_number_of_workers_gives_the_same_bytes(monkeypatch, metric):
    small_blocks(monkeypatch, 16)
    x = blobs(150, 40)
    alone = pairwise(x, metric=metric)
    for n in (2, 5):
        with thread_mapper(n) as mapper:
            assert pairwise(x, metric=metric, mapper=mapper).tobytes() == alone.tobytes()


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int16, ">f4"])
def test_other_types_give_the_distances_of_their_values(dtype):
    x = (blobs(40, 12) * 10).astype(dtype)
    np.testing.assert_allclose(pairwise(x), exact(x), rtol=1e-6)


def test_matrices_of_two_types_meet():
    x, y = blobs(20, 12), blobs(30, 12, dtype=np.float64)
    for metric in METRICS:
        np.testing.assert_allclose(pairwise(x, y, metric=metric), exact(x, y, metric), rtol=1e-6)


def test_numpy_dask_and_zarr_arrays_give_the_same_bytes(monkeypatch):
    small_blocks(monkeypatch, 16)
    x = blobs(101, 8)
    on_disk = zarr.create_array(zarr.storage.MemoryStore(), shape=x.shape, chunks=(13, 8), dtype="f4")
    on_disk[:] = x
    wanted = pairwise(x).tobytes()
    for source in (on_disk, da.from_array(x, chunks=(23, 5)), x.tolist()):
        np.testing.assert_allclose(pairwise(source), exact(x), rtol=1e-6)
    assert pairwise(on_disk).tobytes() == pairwise(da.from_array(x, chunks=(23, 5))).tobytes() == wanted


def test_results_go_to_the_zarr_array_that_is_given(monkeypatch):
    small_blocks(monkeypatch, 16)
    x = blobs(50, 8)
    out = zarr.create_array(zarr.storage.MemoryStore(), shape=(50, 50), chunks=(7, 11), dtype="f4")
    with thread_mapper(3) as mapper:
        assert pairwise(x, out=out, mapper=mapper) is out
    np.testing.assert_array_equal(out[:], pairwise(x))


def test_what_cannot_be_meant_is_refused():
    x = blobs(10, 4)
    with pytest.raises(UsageError, match=r"'l7' is not known. Use one of: euclidean"):
        pairwise(x, metric="l7")
    with pytest.raises(UsageError, match="x has 4 columns and y has 5"):
        pairwise(x, blobs(10, 5))
    with pytest.raises(UsageError, match=r"out has shape \(10, 9\), wanted \(10, 10\)"):
        pairwise(x, out=np.empty((10, 9)))
    with pytest.raises(BadInput, match="3 dimensions"):
        pairwise(np.zeros((2, 3, 4)))


def test_a_row_that_is_not_finite_is_named_with_its_matrix(monkeypatch):
    small_blocks(monkeypatch, 16)
    x, y = blobs(60, 4), blobs(70, 4)
    y[64] = np.nan
    with thread_mapper(3) as mapper, pytest.raises(UnusableRow, match="row 64 of the second matrix holds NaN"):
        pairwise(x, y, mapper=mapper)
    with pytest.raises(UnusableRow, match=r"^row 64 holds NaN"):
        pairwise(y)


@pytest.mark.parametrize("n", [1, 2047, 2048, 4095, 4096, 5000, 20_000, 400_526])
def test_blocks_are_square_and_of_16_to_64_mib(n):
    cells = grid(n)
    assert cells.height == cells.width
    if n >= 2048:
        assert BLOCK_BYTES <= cells.block_bytes <= 4 * BLOCK_BYTES
    assert cells.shape[0] * cells.height < n + cells.shape[0]


@pytest.mark.parametrize("n_kept", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("cells", [Grid(95, 95, 10, 10, True), Grid(95, 41, 10, 7, False), Grid(5, 5, 5, 5, True)])
def test_every_block_is_computed_once_in_any_order(cells, n_kept):
    down, across = cells.shape
    wanted = {(i, j) for i in range(down) for j in range(across) if i <= j or not cells.symmetric}
    found = cells.order(n_kept)
    assert len(found) == len(wanted)
    assert set(found) == wanted


def stripes_read(cells, n_kept):
    """How often a stripe is loaded in one process that keeps `n_kept`."""
    kept, loaded = Kept(n_kept), []

    def load(key):
        return lambda: loaded.append(key)

    for row, column in cells.order(n_kept):
        keys = [(False, row), (not cells.symmetric, column)]
        with kept.hold(keys[0], load(keys[0])), kept.hold(keys[1], load(keys[1])):
            pass
    return len(loaded)


def test_the_more_is_kept_the_less_is_read():
    cells = Grid(200, 200, 10, 10, True)  # 20 stripes
    found = [stripes_read(cells, n) for n in (2, 4, 7, 12, 20)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == 20
    assert found[0] <= 20 * 21 / 2 + 20
    for n, reads in zip((4, 7, 12), found[1:4], strict=True):
        groups = -(-20 // (n - 2))
        assert reads <= 20 * (groups + 1) / 2 + 20
    assert stripes_read(Grid(100, 80, 10, 10, False), 18) == 18


def test_rows_that_fit_are_read_once(monkeypatch):
    small_blocks(monkeypatch, 16)
    x = blobs(96, 6)
    rows = Counting(blocks(x, 6))
    with thread_mapper(4) as mapper:
        np.testing.assert_array_equal(pairwise(rows, mapper=mapper), pairwise(x))
    assert sorted(rows.reads) == list(range(6))


def test_rows_are_put_together_from_the_blocks_that_hold_them():
    x = blobs(50, 6)
    rows = blocks(x, 7)
    for start, stop in ((0, 50), (0, 7), (3, 4), (6, 22), (49, 50)):
        np.testing.assert_array_equal(read_rows(rows, start, stop), x[start:stop])


def test_a_stripe_in_use_is_not_dropped_and_one_that_failed_is_asked_for_again():
    kept = Kept(1)
    one = slab(blobs(3, 2), "euclidean")
    with kept.hold("a", lambda: one), kept.hold("b", lambda: one), kept.hold("a", lambda: None) as (found, fresh):
        assert (found, fresh) == (one, False)
    with pytest.raises(OSError, match="gone"), kept.hold("c", lambda: (_ for _ in ()).throw(OSError("gone"))):
        pass
    with kept.hold("c", lambda: one) as (found, fresh):
        assert (found, fresh) == (one, True)
    assert len(kept._entries) == 1


def test_threads_that_want_the_same_stripe_load_it_once():
    kept, loads, met = Kept(4), [], threading.Barrier(3, timeout=10)

    def work():
        met.wait()
        with kept.hold("a", lambda: loads.append(1)):
            pass

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == [1]


def test_what_travels_to_a_worker_carries_no_stripes():
    x = as_rows(blobs(40, 4))
    task = Blocks(x, None, "euclidean", grid(40), Kept(2))
    first = task((0, 0))
    again = pickle.loads(pickle.dumps(task))
    assert not again.kept._entries
    np.testing.assert_array_equal(again((0, 0)), first)
