"""Scores of a clustering, each with the definition it is computed by.

Invariant: every score here is exact over all rows it is given; none is from a sample.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tsclust_ooc import extras
from tsclust_ooc.errors import BadInput
from tsclust_ooc.units import plural

EXTERNAL = {
    "adjusted_rand": "Adjusted Rand index (Hubert & Arabie 1985): pairs on which truth and labels agree, corrected for "
    "chance; 1 is identical, 0 is expected of random labels.",
    "adjusted_mutual_info": "Mutual information corrected for chance and normalized by the arithmetic mean of the two "
    "entropies (Vinh, Epps & Bailey 2010); 1 is identical, 0 is expected of random labels.",
    "v_measure": "Harmonic mean of homogeneity and completeness (Rosenberg & Hirschberg 2007); "
    "not corrected for chance.",
    "purity": "Fraction of rows whose class is the commonest of their cluster; grows with the number of clusters.",
}
"""Definitions of the scores against a known truth."""

CALINSKI_HARABASZ = (
    "Variance ratio (Calinski & Harabasz 1974): (between / (k - 1)) / (within / (n - k)), sums of squares of all rows."
)


def external_scores(truth: Any, labels: Any) -> dict[str, dict[str, Any]]:
    """Agreement of `labels` with the known classes `truth`, both (rows,): {name: {value, definition}}.

    Classes and labels may be numbers or strings; only which rows share one counts. Raises BadInput when their lengths
    differ or there are no rows.
    """
    truth, labels = np.asarray(truth), np.asarray(labels)
    if truth.shape != labels.shape or truth.ndim != 1 or len(truth) == 0:
        raise BadInput(
            f"Truth of shape {truth.shape} and labels of shape {labels.shape} cannot be compared. "
            "Wanted: one class and one label a row, at least one row."
        )
    cluster = extras.load("sklearn.metrics.cluster")
    classes, labels = _codes(truth), _codes(labels)
    table = cluster.contingency_matrix(classes, labels, sparse=True)
    values = {
        "adjusted_rand": cluster.adjusted_rand_score(classes, labels),
        "adjusted_mutual_info": cluster.adjusted_mutual_info_score(classes, labels),
        "v_measure": cluster.v_measure_score(classes, labels),
        "purity": table.max(axis=0).sum() / len(labels),
    }
    return {name: {"value": float(values[name]), "definition": EXTERNAL[name]} for name in EXTERNAL}


def calinski_harabasz(total_ss: float, within_ss: float, n: int, k: int) -> float:
    """The Calinski-Harabasz index of `n` rows in `k` clusters, exact, from what passes know already.

    `total_ss` and `within_ss` are sums of squared distances to the mean of all rows and to the means of the clusters.
    Where every row lies on its center it is infinite. Raises BadInput unless 2 <= k < n.
    """
    if not 2 <= k < n:
        raise BadInput(
            f"The Calinski-Harabasz index of {plural(k, 'cluster')} of {plural(n, 'row')} is not defined. "
            "Wanted: at least 2 clusters, and fewer clusters than rows."
        )
    if within_ss == 0:
        return float("inf")
    return (total_ss - within_ss) / (k - 1) / (within_ss / (n - k))


def _codes(names: np.ndarray) -> np.ndarray:
    """Whole numbers that are equal where `names` are: scikit-learn's fast path, and it takes any type."""
    return np.unique(names, return_inverse=True)[1]
