"""Distances of a block of rows are those of scipy in float64, to 1e-6, whatever the rows are like."""

import pickle

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from tsclust_ooc.distance.dense import METRICS, TILE_ROWS, UnusableRow, fill, slab, tile_rows
from tsclust_ooc.errors import BadInput

BOUND = 1e-6


def distances(x, metric, y=None):
    a = slab(x, metric)
    b = a if y is None else slab(y, metric)
    out = np.full((len(a.x), len(b.x)), -1, np.float32)
    fill(a, b, metric, out)
    return out


def expected(x, metric, y=None):
    """By scipy in float64; near-parallel rows, where 1 - cosine keeps few digits, by numpy's longest float."""
    y = x if y is None else y
    found = cdist(x.astype(np.float64), y.astype(np.float64), metric)
    if metric == "cosine":
        u, v = (z.astype(np.longdouble) / np.linalg.norm(z.astype(np.longdouble), axis=1)[:, None] for z in (x, y))
        for i, j in zip(*np.nonzero(found < 1e-6), strict=True):
            found[i, j] = ((u[i] - v[j]) ** 2).sum() / 2
    return found


def relative_error(found, exact):
    gaps = np.abs(found - exact)
    return float(np.max(np.divide(gaps, exact, out=(gaps > 0).astype(float), where=exact > 0)))


def rows_of(kind, n, columns, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, columns), dtype=np.float32)
    if kind == "offset":
        return x + np.float32(1e4)
    if kind == "clusters":
        return (8 * rng.standard_normal((5, columns)))[rng.integers(5, size=n)].astype(np.float32) + x
    if kind == "near duplicates":
        spread = np.logspace(-6, 0, n, dtype=np.float32)[:, None]
        return np.repeat(x[: n // 10], 10, axis=0) + spread * x
    if kind == "one large column":
        x[:, 0] *= 300
    return x


KINDS = ["plain", "offset", "clusters", "near duplicates", "one large column"]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [2, 37, 700])
def test_distances_are_those_of_float64(metric, kind, columns):
    x = rows_of(kind, 120, columns)
    exact = expected(x, metric)
    np.fill_diagonal(exact, 0)
    assert relative_error(distances(x, metric), exact) <= BOUND
    y = rows_of(kind, 50, columns, seed=1)
    assert relative_error(distances(x, metric, y), expected(x, metric, y)) <= BOUND


@pytest.mark.parametrize("metric", METRICS)
def test_near_duplicates_far_from_the_origin_keep_all_digits(metric):
    rng = np.random.default_rng(0)
    x = 1e4 + np.repeat(rng.standard_normal((12, 300)), 5, axis=0) + rng.standard_normal((60, 300)) * 1e-3
    exact = expected(x, metric)
    np.fill_diagonal(exact, 0)
    assert relative_error(distances(x, metric), exact) <= BOUND


@pytest.mark.parametrize("metric", METRICS)
def test_rows_of_several_tiles_are_symmetric_with_a_zero_diagonal(metric):
    x = rows_of("clusters", TILE_ROWS + 100, 9)
    found = distances(x, metric)
    np.testing.assert_array_equal(found, found.T)
    assert not np.diag(found).any()
    exact = expected(x, metric)
    np.fill_diagonal(exact, 0)
    assert relative_error(found, exact) <= BOUND


@pytest.mark.parametrize("metric", METRICS)
def test_equal_rows_are_exactly_zero_apart(metric):
    x = np.tile(rows_of("offset", 7, 300), (3, 1))
    found = distances(x, metric, x.copy())
    same = np.arange(21)[:, None] % 7 == np.arange(21) % 7
    np.testing.assert_array_equal(found == 0, same)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "cityblock"])
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e15, 1e30])
def test_squares_beyond_float32_do_not_matter(metric, scale):
    x = (rows_of("plain", 30, 20).astype(np.float64) * scale).astype(np.float32)
    exact = expected(x, metric)
    np.fill_diagonal(exact, 0)
    assert relative_error(distances(x, metric), exact) <= BOUND


@pytest.mark.parametrize(("metric", "scale"), [("sqeuclidean", 1e25), ("euclidean", 1e200), ("cityblock", 1e300)])
def test_a_distance_beyond_float32_is_refused(metric, scale):
    with pytest.raises(BadInput, match=f"some {metric} distances exceed 3.4e\\+38.*Scale the data"):
        distances(rows_of("plain", 30, 20).astype(np.float64) * scale, metric)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_named(value):
    x = rows_of("plain", 9, 4)
    x[[5, 7], 2] = value
    with pytest.raises(UnusableRow, match=r"^row 105 holds NaN or infinite values. Wanted: finite") as caught:
        slab(x, "euclidean", start=100)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.row, again.second) == (str(caught.value), 105, False)


def test_a_zero_row_is_refused_for_cosine_alone():
    x = rows_of("plain", 9, 4)
    x[3] = 0
    with pytest.raises(UnusableRow, match=r"^row 3 is all zero. Wanted: a row with a direction"):
        slab(x, "cosine")
    assert relative_error(distances(x, "cityblock"), expected(x, "cityblock")) <= BOUND


def test_tiles_of_wide_rows_are_lower():
    assert (tile_rows(768), tile_rows(10**4), tile_rows(10**7)) == (TILE_ROWS, 419, 64)
