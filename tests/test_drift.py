"""Moments of blocks against numpy's of all rows, and what two splits of one space or of two look like."""

import numpy as np
import pytest
from scipy.stats import ortho_group

from tsclust_ooc.drift import COVARIANCE_CORRELATION, MEAN_SHIFT, Sketch, compare

P = 80


def embedded(n, seed, p=P, dtype=np.float32):
    """Rows of p columns that a few directions explain, as embeddings are, with means far from zero."""
    weights = np.random.default_rng(99).standard_normal((6, p)) * np.geomspace(1, 0.2, 6)[:, None]
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, 6)) @ weights + 0.05 * rng.standard_normal((n, p)) + 3 * weights[0]).astype(dtype)


def moments(rows, cuts=()):
    sketch = Sketch(rows.shape[1])
    found = sketch.moments(rows[:0])
    for part in np.split(rows, cuts):
        found = sketch.combined(found, sketch.moments(part))
    return sketch, found


def pair(a, b):
    (found,) = compare({"a": moments(a)[1], "b": moments(b)[1]})
    return found


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("cuts", [(), (1, 1, 17, 300)])
def test_moments_of_blocks_are_those_of_all_rows(dtype, cuts):
    rows = embedded(400, 0, dtype=dtype)
    sketch, found = moments(rows, cuts)
    exact = rows.astype(np.float64)
    assert found.n == 400
    np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.squares, exact.var(axis=0) * 400, rtol=1e-4)
    projected = np.cov((exact @ sketch.matrix).T, bias=True) * 400
    np.testing.assert_allclose(found.products, projected, rtol=1e-3, atol=1e-4 * np.abs(projected).max())


def test_the_shift_of_one_column_is_cohens_d():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((200, 1)), 1.5 * rng.standard_normal((100, 1)) + 2
    pooled = np.sqrt((a.var() * 200 + b.var() * 100) / 300)
    assert pair(a, b).mean_shift == pytest.approx((b.mean() - a.mean()) / pooled)


def test_few_columns_are_compared_as_they_are():
    rng = np.random.default_rng(0)
    spread = np.array([5, 3, 1, 0.5])
    a, b = rng.standard_normal((5000, 4)) * spread, rng.standard_normal((4000, 4)) * spread[[0, 2, 1, 3]]
    parts = [np.cov(x.T) - np.eye(4) * np.trace(np.cov(x.T)) / 4 for x in (a, b)]
    expected = np.vdot(*parts) / np.linalg.norm(parts[0]) / np.linalg.norm(parts[1])
    assert pair(a, b).covariance_correlation == pytest.approx(expected, abs=0.01)


def test_two_splits_of_one_space_have_no_warning():
    found = pair(embedded(400, 1), embedded(200, 2))
    assert found.mean_shift < 0.3
    assert found.covariance_correlation > 0.9
    assert found.warning == ""


def test_a_split_that_was_rotated_is_warned_about_with_both_figures():
    rotation = ortho_group.rvs(P, random_state=3).astype(np.float32)
    found = pair(embedded(400, 1), embedded(200, 2) @ rotation)
    assert found.mean_shift > MEAN_SHIFT
    assert found.covariance_correlation < COVARIANCE_CORRELATION
    assert "means are" in found.warning
    assert "covariances correlate" in found.warning


def test_a_rotation_about_the_mean_is_seen_in_the_covariance_alone():
    rotation = ortho_group.rvs(P, random_state=3).astype(np.float32)
    b = embedded(200, 2)
    found = pair(embedded(400, 1), (b - b.mean(axis=0)) @ rotation + b.mean(axis=0))
    assert found.mean_shift < MEAN_SHIFT
    assert found.warning.startswith("their covariances correlate")


@pytest.mark.parametrize(
    "rows",
    [
        np.random.default_rng(0).standard_normal((500, P)).astype(np.float32),  # no direction stands out
        np.ones((50, P), np.float32),
        np.full((50, P), 1e308),
        np.full((50, P), 3e38, np.float32) * np.linspace(-1, 1, 50, dtype=np.float32)[:, None],
        embedded(29, 0),
    ],
)
def test_what_cannot_be_told_is_none_and_no_warning(rows):
    found = pair(rows, rows.copy())
    assert found.covariance_correlation is None
    assert found.warning == ""


def test_of_very_many_columns_evenly_spaced_ones_are_looked_at():
    sketch = Sketch(100_000)
    assert (sketch.step, sketch.matrix.shape) == (7, (-(-100_000 // 7), 64))
    assert sketch.moments(np.ones((2, 100_000), np.float32)).mean.shape == (sketch.matrix.shape[0],)


def test_three_splits_are_three_pairs_in_order():
    splits = {name: moments(embedded(40, i))[1] for i, name in enumerate(("train", "val", "test"))}
    assert [(d.a, d.b) for d in compare(splits)] == [("train", "val"), ("train", "test"), ("val", "test")]
