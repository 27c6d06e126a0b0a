"""The fused kernel and Lloyd's loop, against scikit-learn and against plain loops."""

import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import zarr
from matrices import Counting, blobs, blocks
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from tsclust_ooc.cluster.fused import NonFiniteRows, ZeroRows, farthest, fused, tile_rows, unit
from tsclust_ooc.cluster.lloyd import State, assign, lloyd, total_sum_of_squares
from tsclust_ooc.errors import BadInput, UsageError
from tsclust_ooc.passes import Tally, as_rows, one_pass, thread_mapper


def duplicates():
    return np.repeat(blobs(60, 8), 10, axis=0)


def constant_columns():
    x = blobs()
    x[:, ::2] = 7
    return x


def one_huge_cluster():
    return np.concatenate([blobs(900, k=1, seed=3), blobs(30, seed=4) + 50])


def sklearn_fit(x, init, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return KMeans(len(init), init=init, n_init=1, algorithm="lloyd", **options).fit(x)


def check_same_as_sklearn(x, init, **options):
    ours = lloyd(blocks(x, 7), init, **options)
    theirs = sklearn_fit(x.astype(ours.centers.dtype), init.astype(ours.centers.dtype), **options)
    np.testing.assert_array_equal(ours.labels, theirs.labels_)
    scale = np.abs(x.astype(np.float64)).max()
    np.testing.assert_allclose(ours.centers, theirs.cluster_centers_, rtol=2e-6, atol=2e-6 * scale)
    exact = ((x.astype(np.float64) - ours.centers.astype(np.float64)[ours.labels]) ** 2).sum()
    assert ours.inertia == pytest.approx(exact, rel=1e-10)
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=2e-5, abs=1e-9)
    assert ours.n_iter == theirs.n_iter_
    return ours


CASES = {
    "blobs": (blobs(), 5),
    "overlapping": (blobs(spread=4.0), 6),
    "duplicates": (duplicates(), 4),
    "constant columns": (constant_columns(), 5),
    "one huge cluster": (one_huge_cluster(), 4),
    "one cluster": (blobs(), 1),
    "one column": (blobs(d=1), 3),
    "every row its own": (blobs(40), 40),
    "offset": (blobs(k=3, spread=1.0) + np.float32(1e4), 3),
    "float16": (blobs(dtype=np.float16), 5),
    "float64": (blobs(dtype=np.float64), 5),
    "float64 offset": (blobs(dtype=np.float64) + 1e4, 5),
    "integers": (np.round(blobs(dtype=np.float64) * 100).astype(np.int32), 5),
}


@pytest.mark.parametrize("name", CASES)
def test_fit_equals_scikit_learn_from_the_same_start(name):
    x, k = CASES[name]
    check_same_as_sklearn(x, x[:: len(x) // k][:k].astype(np.float64))


@pytest.mark.parametrize("options", [{"max_iter": 1}, {"max_iter": 3}, {"tol": 0.0}, {"tol": 0.05}])
def test_stopping_means_what_it_means_in_scikit_learn(options):
    x = blobs(spread=5.0, seed=5)
    check_same_as_sklearn(x, x[:6].astype(np.float64), **options)


def test_unit_variance_far_from_the_origin_loses_no_digits():
    x = (np.random.default_rng(0).normal(size=(2000, 64)) + 1e4).astype(np.float32)
    labels = np.empty(len(x), int)

    def keep(start, per_row):
        labels[start : start + len(per_row[0])] = per_row[0]

    centers = x[:20]
    inertia, counts = assign(as_rows(x), centers, sink=keep)
    exact = ((x[:, None].astype(np.float64) - centers.astype(np.float64)) ** 2).sum(axis=2)
    np.testing.assert_array_equal(labels, exact.argmin(axis=1))
    assert inertia == pytest.approx(exact.min(axis=1).sum(), rel=1e-12)
    np.testing.assert_array_equal(counts, np.bincount(labels, minlength=20))


def test_an_empty_cluster_moves_to_the_farthest_row_as_in_scikit_learn():
    x = blobs(seed=2)
    init = np.concatenate([x[:4], np.full((1, x.shape[1]), 1e3)]).astype(np.float64)
    ours = check_same_as_sklearn(x, init)
    assert (ours.sizes > 0).all()


def test_several_empty_clusters_take_the_same_rows_as_in_scikit_learn():
    x = blobs(seed=2)
    init = np.concatenate([x[:3], np.full((3, x.shape[1]), 1e3)]).astype(np.float64)
    ours, theirs = lloyd(blocks(x, 4), init), sklearn_fit(x, init.astype(np.float32))
    # scikit-learn hands the farthest rows out in an order of its own: the same clusters under other numbers.
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-5)
    pairs = set(zip(ours.labels.tolist(), theirs.labels_.tolist(), strict=True))
    assert len(pairs) == len(init)


def test_a_cluster_never_gives_its_only_row_away():
    x = np.array([[0.0], [100.0], [1.0], [2.0]])
    fit = lloyd(as_rows(x), np.array([[1.0], [60.0], [1e6]]))
    assert sorted(fit.sizes) == [1, 1, 2]
    assert fit.inertia == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [30, 3000])
def test_fewer_distinct_rows_than_clusters_are_counted_in_the_error(dtype, n):
    x = np.resize(blobs(3, 5, dtype=dtype) / 3, (n, 5))
    with pytest.raises(BadInput, match="hold only 3 distinct ones"):
        lloyd(blocks(x, 3), x[:8])


def plain_spherical(x, centers, max_iter):
    """Dhillon & Modha's loop as it is printed."""
    x = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    centers = centers / np.linalg.norm(centers, axis=1, keepdims=True)
    for _ in range(max_iter):
        labels = (x @ centers.T).argmax(axis=1)
        sums = np.stack([x[labels == c].sum(axis=0) for c in range(len(centers))])
        moved = sums / np.linalg.norm(sums, axis=1, keepdims=True)
        if np.allclose(moved, centers, atol=1e-12):
            break
        centers = moved
    labels = (x @ centers.T).argmax(axis=1)
    return labels, centers, 2 * (1 - (x * centers[labels]).sum(axis=1))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cosine_equals_a_plain_spherical_loop(dtype):
    x = (blobs(spread=3.0, dtype=np.float64) * np.random.default_rng(0).uniform(0.1, 50, (600, 1))).astype(dtype)
    ours = lloyd(blocks(x, 5), x[:6], metric="cosine", tol=0)
    labels, centers, distances = plain_spherical(x, x[:6].astype(np.float64), 300)
    np.testing.assert_array_equal(ours.labels, labels)
    np.testing.assert_allclose(ours.centers, centers, atol=1e-6)
    np.testing.assert_allclose(ours.distances, distances, rtol=1e-4, atol=1e-6)
    assert ours.inertia == pytest.approx(distances.sum(), rel=1e-6)
    np.testing.assert_allclose(np.linalg.norm(ours.centers, axis=1), 1, atol=1e-6)


def test_a_cosine_center_whose_rows_cancel_stays_where_it_was():
    x = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 5.0], [0.0, 4.0]])
    fit = lloyd(as_rows(x), np.array([[0.0, -1.0], [0.0, 1.0]]), metric="cosine")
    np.testing.assert_array_equal(fit.labels, [0, 0, 1, 1])
    np.testing.assert_allclose(fit.centers, [[0, -1], [0, 1]])
    assert fit.inertia == pytest.approx(4)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("n_threads", [1, 2, 4])
def test_threads_change_no_bit(metric, n_threads):
    x = blobs(3000, 40, spread=6.0)
    loop = lloyd(blocks(x, 23), x[:9], metric=metric)
    with thread_mapper(n_threads) as mapper:
        pool = lloyd(blocks(x, 23), x[:9], metric=metric, mapper=mapper)
    assert loop.centers.tobytes() == pool.centers.tobytes()
    assert loop.labels.tobytes() == pool.labels.tobytes()
    assert (loop.inertia, loop.n_iter, loop.total_ss) == (pool.inertia, pool.n_iter, pool.total_ss)


def test_a_zarr_array_gives_the_same_bits_as_numpy(tmp_path):
    x = blobs(500, 20)
    stored = as_rows(zarr.create_array(tmp_path / "x.zarr", data=x, chunks=(100, 20)))
    ours, theirs = lloyd(stored, x[:4]), lloyd(type(stored)(x, stored.bounds), x[:4])
    assert (ours.centers.tobytes(), ours.inertia) == (theirs.centers.tobytes(), theirs.inertia)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_kernel_gives_the_same_under_any_split(metric):
    x = blobs(700, 9, spread=3.0)
    kernel = fused(unit(x[:7]) if metric == "cosine" else x[:7], metric, x.dtype)
    whole, (labels, distances) = kernel.chunk(x, 0)
    for n_blocks in (2, 5, 70):
        parts = []
        split = one_pass(kernel, blocks(x, n_blocks), sink=lambda _, per_row, parts=parts: parts.append(per_row))
        np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), labels)
        np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), distances)
        np.testing.assert_allclose(split.sums, whole.sums, rtol=1e-12, atol=1e-9)
        np.testing.assert_array_equal(split.counts, whole.counts)
        np.testing.assert_array_equal(split.far_rows, whole.far_rows)
        assert split.inertia == pytest.approx(whole.inertia, rel=1e-12)


def test_combine_is_associative_and_an_empty_block_adds_nothing():
    x = blobs(90, 4)
    kernel = fused(x[:3], "euclidean", x.dtype)
    a, b, c, nothing = (kernel.chunk(x[s:t], s)[0] for s, t in ((0, 30), (30, 50), (50, 90), (90, 90)))
    left, right = kernel.combine(kernel.combine(a, b), c), kernel.combine(a, kernel.combine(b, c))
    for name in ("sums", "counts", "inertia", "far_rows", "far_distances"):
        np.testing.assert_allclose(getattr(left, name), getattr(right, name), rtol=1e-12)
    np.testing.assert_array_equal(kernel.combine(left, nothing).sums, left.sums)
    np.testing.assert_array_equal(kernel.combine(nothing, left).far_rows, left.far_rows)


def test_more_rows_than_a_tile_are_all_settled():
    x = blobs(3 * tile_rows(2048, 4, 4) + 5, 2048)
    _, (labels, distances) = fused(x[:4], "euclidean", x.dtype).chunk(x, 0)
    exact = ((x[:, None].astype(np.float64) - x[:4].astype(np.float64)) ** 2).sum(axis=2)
    np.testing.assert_array_equal(labels, exact.argmin(axis=1))
    np.testing.assert_allclose(distances, exact.min(axis=1), rtol=1e-6)


def test_a_tie_goes_to_the_lowest_label():
    x = np.array([[0.0], [2.0], [1.0]], np.float32)
    _, (labels, _) = fused(np.array([[2.0], [0.0], [2.0]]), "euclidean", x.dtype).chunk(x, 0)
    np.testing.assert_array_equal(labels, [1, 0, 0])


def test_rows_whose_products_overflow_float32_are_still_settled():
    x = np.array([[3e30, 0], [-2e30, 1e30], [1, 1]], np.float32)
    inertia, counts = assign(as_rows(x), x)
    assert (inertia, counts.tolist()) == (0, [1, 1, 1])


def test_the_farthest_come_first_and_ties_by_lower_index():
    np.testing.assert_array_equal(farthest(np.array([1.0, 5, 3, 5, 3, 3]), 4), [1, 3, 2, 4])
    np.testing.assert_array_equal(farthest(np.array([1.0, 2]), 5), [1, 0])
    assert len(farthest(np.array([]), 3)) == 0


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 57, 58, 199])
def test_rows_that_are_not_finite_are_found_in_the_first_pass(metric, value, row):
    x = blobs(200, 6)
    x[row, 5] = x[199, 0] = value
    rows, tally = Counting(blocks(x, 7)), Tally()
    with pytest.raises(NonFiniteRows, match=f"first is row {row}") as caught:
        lloyd(rows, np.eye(3, 6), metric=metric, tally=tally)
    assert (caught.value.row, caught.value.n_rows_bad) == (row, 1 if row == 199 else 2)
    assert sorted(rows.reads) == list(range(7))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_zero_rows_have_no_direction_for_cosine():
    x = blobs(200, 6)
    x[[31, 180]] = 0
    with pytest.raises(ZeroRows) as caught:
        lloyd(blocks(x, 7), x[:3], metric="cosine")
    assert (caught.value.row, caught.value.n_rows_bad, caught.value.exit_code) == (31, 2, 65)
    lloyd(blocks(x, 7), x[:3])


@pytest.mark.parametrize("options", [{}, {"tol": 0.05}, {"max_iter": 2}])
def test_passes_are_what_the_fit_says(options):
    x = blobs(spread=5.0)
    rows, tally, told = Counting(blocks(x, 7)), Tally(), []
    fit = lloyd(rows, x[:6], tally=tally, on_pass=told.append, **options)
    assert fit.n_passes == tally.n_passes == len(fit.history) == len(told)
    assert rows.reads == list(range(7)) * fit.n_passes
    assert tally.bytes_read == x.nbytes * fit.n_passes
    labels_settled = fit.history[-1].moved == 0 and not options
    assert fit.n_passes == fit.n_iter + (0 if labels_settled else 1)
    assert [info.number for info in told] == list(range(1, fit.n_passes + 1))
    assert told[0].moved == 1
    assert fit.converged == (options != {"max_iter": 2})


def test_the_total_sum_of_squares_comes_from_any_pass():
    x = blobs(dtype=np.float64) + 1e4
    found, _ = fused(x[:5] + 3, "euclidean", x.dtype).chunk(x, 0)
    assert total_sum_of_squares(found, x[:5] + 3) == pytest.approx(((x - x.mean(axis=0)) ** 2).sum(), rel=1e-10)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"max_iter": 0}, UsageError, "max_iter=0"),
        ({"tol": -1}, UsageError, "tol=-1"),
        ({"tol": np.nan}, UsageError, "tol=nan"),
        ({"metric": "manhattan"}, UsageError, "'manhattan'"),
        ({"centers": np.zeros((2, 3))}, BadInput, r"\(2, 3\)"),
        ({"centers": np.zeros(12)}, BadInput, r"\(12,\)"),
        ({"centers": np.full((2, 12), np.nan)}, BadInput, "NaN"),
        ({"centers": np.zeros((2, 12)), "metric": "cosine"}, BadInput, "all zero"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_by_name(change, error, message):
    options = {"centers": np.eye(2, 12), **change}
    with pytest.raises(error, match=message):
        lloyd(as_rows(blobs()), **options)


# going on from a state


def two_clusters_starve():
    x = blobs(seed=2)
    return x, np.concatenate([x[:3], np.full((2, x.shape[1]), 1e3)])


FITS = {
    "euclidean": (blobs(spread=5.0, seed=5), blobs(spread=5.0, seed=5)[:6], {}),
    "cosine": (blobs(spread=5.0), blobs(spread=5.0)[:6] * 3, {"metric": "cosine"}),
    "float64": (blobs(spread=5.0, dtype=np.float64) + 1e4, blobs(spread=5.0, dtype=np.float64)[:6] + 1e4, {}),
    "labels settle": (blobs(spread=3.0, seed=1), blobs(spread=3.0, seed=1)[:4], {"tol": 0.0}),
    "centers stand still": (blobs(spread=5.0, seed=5), blobs(spread=5.0, seed=5)[:6], {"tol": 0.01}),
    "max_iter": (blobs(spread=5.0, seed=5), blobs(spread=5.0, seed=5)[:6], {"max_iter": 3}),
    "empty clusters": (*two_clusters_starve(), {}),
    "empty clusters, few rows": (two_clusters_starve()[0][:30], two_clusters_starve()[1], {"tol": 0.0}),
    "one cluster": (blobs(), blobs()[:1], {}),
    "many clusters": (blobs(spread=5.0), blobs(spread=5.0)[:150], {"max_iter": 4}),
}


def plain(fit):
    """A fit as values that compare, without the seconds its passes took."""
    arrays = [getattr(fit, name) for name in ("centers", "labels", "distances", "sizes")]
    passes = [(p.number, p.inertia, p.moved, p.bytes_read) for p in fit.history]
    rest = (fit.inertia, fit.total_ss, fit.n_iter, fit.n_passes, fit.converged)
    return [(a.dtype.str, a.shape, a.tobytes()) for a in arrays], passes, rest


def copied(states):
    """A listener that keeps every state; what it is given is overwritten later."""
    return lambda state: states.append(replace(state, labels=state.labels.copy()))


@pytest.mark.parametrize("name", FITS)
def test_a_fit_that_goes_on_from_any_state_ends_as_the_undisturbed_one_bit_for_bit(name):
    x, init, options = FITS[name]
    states, tally = [], Tally()
    whole = lloyd(blocks(x, 7), init, on_state=copied(states), tally=tally, **options)
    assert [len(s.history) for s in states] == list(range(len(whole.history)))
    for state in states:
        told, later, again = [], [], Tally(2, 500)
        fit = lloyd(
            blocks(x, 7), init, resume=state, on_state=copied(later), on_pass=told.append, tally=again, **options
        )
        assert plain(fit) == plain(whole)
        assert [info.number for info in told] == list(range(len(state.history) + 1, len(whole.history) + 1))
        assert [s.n_iter for s in later] == [s.n_iter for s in states[len(state.history) + 1 :]]
        assert (again.n_passes, again.bytes_read) == (tally.n_passes + 2, tally.bytes_read + 500)


def test_the_rest_of_a_fit_reads_the_data_only_as_often_as_its_passes():
    x, states = blobs(spread=5.0, seed=5), []
    whole = lloyd(blocks(x, 7), x[:6], on_state=copied(states))
    rows = Counting(blocks(x, 7))
    lloyd(rows, x[:6], resume=states[4])
    assert rows.reads == list(range(7)) * (whole.n_passes - 4)


@pytest.mark.parametrize("block", [0, 3, 6])
def test_a_pass_that_breaks_off_leaves_the_state_before_it_whole(block):
    x, newest, kept = blobs(spread=5.0, seed=5), [], []

    class Breaking(Counting):
        def read(self, wanted):
            if len(kept) == 4 and wanted == block:
                raise KeyboardInterrupt
            return super().read(wanted)

    def keep(state):
        newest[:] = [state]
        copied(kept)(state)

    whole = lloyd(blocks(x, 7), x[:6])
    with pytest.raises(KeyboardInterrupt):
        lloyd(Breaking(blocks(x, 7)), x[:6], on_state=keep)
    np.testing.assert_array_equal(newest[0].labels, kept[-1].labels)
    assert plain(lloyd(blocks(x, 7), x[:6], resume=newest[0])) == plain(whole)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": np.zeros(7, np.int32)}, "7 labels was given. Wanted: float32 and 600 labels"),
        ({"centers": np.eye(2, 12)}, "float64 centers"),
        ({"centers": np.eye(2, 5, dtype="f4")}, r"\(2, 5\)"),
        ({"centers": np.full((2, 12), np.nan, "f4")}, "NaN"),
    ],
)
def test_a_state_of_other_rows_is_refused(change, said):
    state = replace(State(np.eye(2, 12, dtype="f4"), np.full(600, -1, np.int32)), **change)
    with pytest.raises(BadInput, match=said):
        lloyd(as_rows(blobs()), np.eye(2, 12), resume=state)
