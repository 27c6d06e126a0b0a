"""The map of a report: principal components as scikit-learn finds them, the same each time."""

import numpy as np
import pytest
from matrices import blobs
from sklearn.decomposition import PCA

from tsclust_ooc.projection import principal_components


@pytest.mark.parametrize("shape", [(200, 30), (30, 200), (7, 5), (50, 2), (9, 9)])
def test_coordinates_and_explained_variance_are_scikit_learns(shape):
    x = blobs(*shape, seed=3).astype(np.float64)
    reference = PCA(2, svd_solver="full").fit(x)
    found = principal_components(x)
    np.testing.assert_allclose(np.abs(found.coordinates), np.abs(reference.transform(x)), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.explained, reference.explained_variance_ratio_, rtol=1e-8)


def test_an_axis_points_to_where_its_largest_coordinate_is_positive():
    for seed in range(5):
        along = principal_components(blobs(60, 12, seed=seed)).coordinates
        largest = along[np.abs(along).argmax(axis=0), [0, 1]]
        assert (largest > 0).all()


def test_the_same_rows_give_the_same_bits():
    x = blobs(300, 40)
    first = principal_components(x).coordinates
    np.random.seed(99)
    assert principal_components(x.copy()).coordinates.tobytes() == first.tobytes()


def test_data_far_from_the_origin_lose_nothing():
    x = blobs(100, 20, dtype=np.float64)
    near, far = principal_components(x), principal_components(x + 1e6)
    np.testing.assert_allclose(far.coordinates, near.coordinates, atol=1e-6)


def test_rows_without_variance_lie_on_one_point():
    found = principal_components(np.full((20, 6), 3.5, np.float32))
    assert not found.coordinates.any()
    assert found.explained == (0.0, 0.0)


@pytest.mark.parametrize("x", [np.arange(5.0)[:, None], np.array([[1.0, 2.0, 3.0]]), np.zeros((1, 1))])
def test_what_is_not_there_is_zero(x):
    found = principal_components(x)
    assert found.coordinates.shape == (len(x), 2)
    assert not found.coordinates[:, 1].any()
    assert found.explained[1] == pytest.approx(0)


def test_rows_on_a_line_need_one_axis():
    x = np.outer(np.linspace(-1, 1, 40), np.arange(1, 31, dtype=np.float64))
    found = principal_components(x)
    assert found.explained[0] == pytest.approx(1)
    assert found.explained[1] == pytest.approx(0, abs=1e-12)
