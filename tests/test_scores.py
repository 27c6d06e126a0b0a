"""Scores against scikit-learn's own, from labels and from sums of squares."""

import numpy as np
import pytest
from matrices import blobs, blocks
from sklearn import metrics

from tsclust_ooc.cluster.lloyd import lloyd
from tsclust_ooc.errors import BadInput
from tsclust_ooc.scores import EXTERNAL, calinski_harabasz, external_scores


@pytest.fixture
def truth():
    return np.random.default_rng(0).integers(5, size=400)


@pytest.fixture
def labels(truth):
    return np.where(np.random.default_rng(1).random(400) < 0.7, truth * 3, 1).astype(np.int32)


def test_values_are_scikit_learns(truth, labels):
    scores = external_scores(truth, labels)
    assert scores["adjusted_rand"]["value"] == pytest.approx(metrics.adjusted_rand_score(truth, labels))
    assert scores["adjusted_mutual_info"]["value"] == pytest.approx(metrics.adjusted_mutual_info_score(truth, labels))
    assert scores["v_measure"]["value"] == pytest.approx(metrics.v_measure_score(truth, labels))
    commonest = sum(np.bincount(truth[labels == label]).max() for label in np.unique(labels))
    assert scores["purity"]["value"] == pytest.approx(commonest / 400)


def test_each_score_carries_its_definition(truth, labels):
    scores = external_scores(truth, labels)
    assert list(scores) == list(EXTERNAL)
    assert all(len(score["definition"]) > 40 for score in scores.values())


def test_names_of_classes_do_not_count(truth, labels):
    names = np.array(["normal", "cyclic", "increasing", "decreasing", "shift"])[truth]
    numbers, strings = external_scores(truth, labels), external_scores(names, labels)
    for name in EXTERNAL:
        assert strings[name]["value"] == pytest.approx(numbers[name]["value"])
    assert external_scores(names, truth)["adjusted_rand"]["value"] == 1


@pytest.mark.parametrize(("truth", "labels"), [([1, 2], [1]), ([], []), ([[1], [2]], [[1], [2]])])
def test_labels_that_do_not_match_rows_are_refused(truth, labels):
    with pytest.raises(BadInput, match="one class and one label a row"):
        external_scores(truth, labels)


@pytest.mark.parametrize("offset", [0, 1e4])
def test_calinski_harabasz_comes_exactly_from_the_passes(offset):
    x = blobs(500, 6, spread=2.0, dtype=np.float64) + offset
    fit = lloyd(blocks(x, 4), x[:5], tol=0)
    ours = calinski_harabasz(fit.total_ss, fit.inertia, 500, 5)
    assert ours == pytest.approx(metrics.calinski_harabasz_score(x, fit.labels), rel=1e-9)


def test_calinski_harabasz_of_exact_clusters_is_infinite():
    assert calinski_harabasz(10.0, 0.0, 10, 3) == np.inf


@pytest.mark.parametrize(("n", "k"), [(10, 1), (10, 10), (3, 4)])
def test_calinski_harabasz_is_refused_where_it_is_not_defined(n, k):
    with pytest.raises(BadInput, match="not defined"):
        calinski_harabasz(2.0, 1.0, n, k)
