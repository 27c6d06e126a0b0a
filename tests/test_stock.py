"""dask-ml's engine behind its one door."""

import sys

import dask.array as da
import numpy as np
import pytest
from matrices import blobs
from sklearn.cluster import KMeans

from tsclust_ooc import extras
from tsclust_ooc.cluster.fused import NonFiniteRows
from tsclust_ooc.cluster.stock import fit_stock
from tsclust_ooc.errors import BadInput, MissingExtra


def test_its_centers_are_those_of_lloyds_algorithm():
    x = blobs(600, 6, k=4, seed=1)
    centers = fit_stock(da.from_array(x, chunks=(200, 6)), x[:4], max_iter=100, tol=1e-9).centers
    expected = KMeans(4, init=x[:4], n_init=1, tol=0).fit(x).cluster_centers_
    assert centers.dtype == np.float32
    np.testing.assert_allclose(centers, expected, atol=1e-3)


def test_a_row_that_is_not_finite_is_named():
    x = blobs(600, 6)
    x[321, 4] = np.nan
    with pytest.raises(NonFiniteRows, match="row 321"):
        fit_stock(da.from_array(x, chunks=(200, 6)), np.eye(3, 6))


def test_centers_that_do_not_fit_are_refused_by_shape():
    with pytest.raises(BadInput, match=r"\(3, 5\) do not fit rows of 6 columns"):
        fit_stock(da.from_array(blobs(600, 6), chunks=(200, 6)), np.eye(3, 5))


def test_a_missing_package_ends_in_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "dask_ml.cluster", None)
    with pytest.raises(MissingExtra, match="pip install"):
        fit_stock(da.zeros((4, 2)), np.zeros((1, 2)))
    assert extras.load("json").loads("1") == 1
