"""The estimator, side by side with the one it stands in for."""

import inspect
import pickle
import subprocess
import sys

import dask.array as da
import dask_ml.cluster
import numpy as np
import pandas as pd
import pytest
import zarr
from matrices import Counting, blobs, blocks
from sklearn.base import clone
from sklearn.metrics import pairwise_distances
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tsclust_ooc.cluster import KMeans, NonFiniteRows
from tsclust_ooc.cluster.kmeans import seed_of
from tsclust_ooc.errors import BadInput, UsageError

BOTH = pytest.mark.parametrize("estimator", [dask_ml.cluster.KMeans, KMeans])


@pytest.fixture
def x():
    return blobs(600, 6, k=4, seed=1)


@pytest.fixture
def dask_x(x):
    return da.from_array(x, chunks=(150, 6))


@BOTH
def test_a_fit_leaves_the_attributes_dask_ml_leaves(estimator, x, dask_x):
    fitted = estimator(4, init=x[:4]).fit(dask_x)
    assert fitted.cluster_centers_.shape == (4, 6)
    assert isinstance(fitted.cluster_centers_, np.ndarray)
    assert fitted.cluster_centers_.dtype == np.float32
    assert isinstance(fitted.labels_, da.Array)
    assert (fitted.labels_.dtype, fitted.labels_.chunks) == (np.int32, ((150,) * 4,))
    assert isinstance(fitted.inertia_, float)
    assert isinstance(fitted.n_iter_, int)
    assert fitted.n_features_in_ == 6


@BOTH
def test_predict_gives_the_nearest_center_of_new_rows(estimator, x, dask_x):
    fitted = estimator(4, init=x[:4]).fit(dask_x)
    new = blobs(100, 6, k=4, seed=2)
    labels = fitted.predict(da.from_array(new, chunks=(30, 6)))
    assert isinstance(labels, da.Array)
    assert (labels.dtype, labels.chunks) == (np.int32, ((30, 30, 30, 10),))
    expected = pairwise_distances(new, fitted.cluster_centers_).argmin(axis=1)
    np.testing.assert_array_equal(labels.compute(), expected)


@BOTH
def test_transform_gives_distances_to_all_centers(estimator, x, dask_x):
    fitted = estimator(4, init=x[:4]).fit(dask_x)
    distances = fitted.transform(dask_x)
    assert isinstance(distances, da.Array)
    assert (distances.shape, distances.dtype) == ((600, 4), np.float32)
    expected = pairwise_distances(x.astype(np.float64), fitted.cluster_centers_.astype(np.float64))
    np.testing.assert_allclose(distances.compute(), expected, rtol=1e-3, atol=1e-3)


@BOTH
def test_parameters_travel_by_name(estimator):
    original = estimator(n_clusters=3, init="random", max_iter=7, random_state=1)
    copied = clone(original)
    assert copied is not original
    assert copied.get_params()["max_iter"] == 7
    assert copied.set_params(n_clusters=5) is copied
    assert copied.n_clusters == 5
    with pytest.raises((UsageError, ValueError), match="nonsense"):
        copied.set_params(nonsense=1)


@BOTH
def test_rows_that_are_not_finite_are_a_value_error(estimator, x, dask_x):
    x[5, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        estimator(4, init=x[:4]).fit(da.from_array(x, chunks=(150, 6)))


def test_parameters_and_defaults_are_dask_mls_but_for_init():
    theirs = inspect.signature(dask_ml.cluster.KMeans).parameters
    ours = inspect.signature(KMeans).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all(p.kind is p.KEYWORD_ONLY for name, p in ours.items() if name not in theirs)
    different = {name for name in theirs if ours[name].default != theirs[name].default}
    assert different == {"init"}


def test_both_find_the_same_clusters_from_the_same_start(x, dask_x):
    theirs = dask_ml.cluster.KMeans(4, init=x[:4], tol=1e-9).fit(dask_x)
    ours = KMeans(4, init=x[:4], tol=1e-9).fit(dask_x)
    np.testing.assert_array_equal(ours.labels_.compute(), theirs.labels_.compute())
    np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.transform(dask_x).compute(), theirs.transform(dask_x).compute(), atol=1e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_inertia_is_the_sum_of_squares_to_the_returned_centers(dtype):
    x = blobs(500, 7, spread=3.0, dtype=dtype)
    fitted = KMeans(5, random_state=0, max_iter=4).fit(x)
    distances = pairwise_distances(x.astype(np.float64), fitted.cluster_centers_.astype(np.float64))
    assert fitted.inertia_ == pytest.approx((distances.min(axis=1) ** 2).sum(), rel=1e-6)
    np.testing.assert_array_equal(fitted.labels_, distances.argmin(axis=1))
    assert fitted.cluster_centers_.dtype == dtype


@pytest.mark.parametrize("init", ["auto", "k-means++", "k-means||", "random"])
def test_a_seed_fixes_the_result_on_every_kind_of_array(init, x, tmp_path):
    stored = zarr.create_array(tmp_path / "x.zarr", data=x, chunks=(600, 6))
    kinds = [x, stored, da.from_array(x, chunks=(600, 6)), pd.DataFrame(x), blocks(x, 1)]
    fits = [KMeans(4, init=init, random_state=3).fit(kind) for kind in kinds]
    for fitted in fits[1:]:
        assert fitted.cluster_centers_.tobytes() == fits[0].cluster_centers_.tobytes()
        np.testing.assert_array_equal(np.asarray(fitted.labels_), fits[0].labels_)
    assert [type(fitted.labels_) for fitted in fits] == [np.ndarray, np.ndarray, da.Array, np.ndarray, np.ndarray]


def test_predict_of_the_fitted_rows_is_the_labels(x, dask_x):
    fitted = KMeans(4, random_state=0).fit(x)
    np.testing.assert_array_equal(fitted.predict(x), fitted.labels_)
    np.testing.assert_array_equal(fitted.predict(dask_x).compute(), fitted.labels_)
    np.testing.assert_array_equal(KMeans(4, random_state=0).fit_predict(x), fitted.labels_)
    np.testing.assert_array_equal(KMeans(4, random_state=0).fit_transform(x), fitted.transform(x))


def test_lazy_predict_names_the_bad_row_of_the_whole_array(x, dask_x):
    fitted = KMeans(4, random_state=0).fit(x)
    bad = x.copy()
    bad[444] = np.inf
    with pytest.raises(NonFiniteRows, match=r"1 of 600 rows.*row 444"):
        fitted.predict(da.from_array(bad, chunks=(150, 6))).compute(scheduler="synchronous")


def test_transform_is_exact_far_from_the_origin():
    x = blobs(200, 30) + np.float32(1e4)
    fitted = KMeans(3, random_state=0).fit(x)
    expected = pairwise_distances(x.astype(np.float64), fitted.cluster_centers_.astype(np.float64))
    exact = np.sqrt(((x[:, None].astype(np.float64) - fitted.cluster_centers_.astype(np.float64)) ** 2).sum(axis=2))
    np.testing.assert_allclose(expected, exact, rtol=1e-2)
    np.testing.assert_allclose(fitted.transform(x), exact, rtol=1e-6)


def test_cosine_ignores_the_length_of_rows(x):
    scaled = x * np.random.default_rng(0).uniform(0.5, 20, (600, 1)).astype(np.float32)
    fitted = KMeans(4, init=x[:4], metric="cosine").fit(x)
    np.testing.assert_array_equal(KMeans(4, init=x[:4], metric="cosine").fit(scaled).labels_, fitted.labels_)
    cosines = 1 - pairwise_distances(x.astype(np.float64), fitted.cluster_centers_, metric="cosine")
    np.testing.assert_allclose(fitted.transform(x) ** 2, 2 * (1 - cosines), atol=1e-5)
    np.testing.assert_array_equal(fitted.predict(scaled), fitted.labels_)


def test_more_starts_never_end_worse(x):
    one = KMeans(9, init="random", random_state=5).fit(x)
    many = KMeans(9, init="random", random_state=5, n_init=6).fit(x)
    assert many.inertia_ <= one.inertia_
    assert many.n_passes_ > one.n_passes_


def test_the_passes_it_reports_are_the_reads_it_makes(x):
    rows = Counting(blocks(x, 5))
    fitted = KMeans(4, random_state=0, mapper=map).fit(rows)
    assert rows.reads == list(range(5)) * fitted.n_passes_
    assert fitted.n_passes_ == len(fitted.history_) + 1
    assert fitted.bytes_read_ == fitted.n_passes_ * x.nbytes


def test_callers_hear_of_each_pass(x):
    heard = []
    fitted = KMeans(4, random_state=0, on_pass=heard.append).fit(x)
    assert tuple(heard) == fitted.history_
    assert [info.inertia for info in heard] == sorted((info.inertia for info in heard), reverse=True)


def test_a_fitted_estimator_survives_pickling_and_sits_in_a_pipeline(x):
    fitted = pickle.loads(pickle.dumps(KMeans(4, random_state=0).fit(x)))
    assert fitted.predict(x).shape == (600,)
    labels = make_pipeline(StandardScaler(), KMeans(4, random_state=0)).fit_predict(x)
    assert len(np.unique(labels)) == 4


def test_its_repr_is_the_call_that_makes_it():
    assert repr(KMeans(6, metric="cosine")) == "KMeans(n_clusters=6, metric='cosine')"


@pytest.mark.parametrize("make", [np.random.RandomState, np.random.default_rng])
def test_a_generator_is_a_seed_by_its_state(make):
    assert seed_of(make(4)) == seed_of(make(4)) != seed_of(make(5))
    assert seed_of(np.int64(7)) == 7
    assert seed_of(None) != seed_of(None)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_clusters": 0}, UsageError, "n_clusters=0"),
        ({"n_clusters": 601}, BadInput, "601 clusters cannot be made of 600 rows"),
        ({"random_state": -1}, UsageError, "random_state=-1"),
        ({"random_state": "x"}, UsageError, "random_state='x'"),
        ({"n_init": 0}, UsageError, "n_init=0"),
        ({"algorithm": "elkan"}, UsageError, "'elkan'"),
        ({"metric": "l1"}, UsageError, "'l1'"),
        ({"max_iter": 0}, UsageError, "max_iter=0"),
    ],
)
def test_parameters_that_cannot_be_meant_are_refused_by_name(options, error, message, x):
    with pytest.raises(error, match=message):
        KMeans(**options).fit(x)


def test_predict_wants_a_fit_and_the_same_columns(x):
    with pytest.raises(UsageError, match="Call fit first"):
        KMeans().predict(x)
    with pytest.raises(BadInput, match=r"5 columns.*Wanted: 6"):
        KMeans(2, random_state=0).fit(x).predict(x[:, :5])


def test_importing_it_loads_neither_scikit_learn_nor_dask():
    heavy = "{'sklearn', 'dask', 'distributed', 'dask_ml', 'zarr', 'pandas'}"
    code = (
        "import sys, tsclust_ooc.cluster.stock, tsclust_ooc.scores\n"
        f"tsclust_ooc.cluster.KMeans(2).get_params()\nprint({heavy} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
