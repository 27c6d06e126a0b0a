"""dask-ml's own KMeans as an engine; the only module that names it.

Invariant: dask_ml is imported when an engine of it is run, never before: that takes seconds and 300 MB.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from tsclust_ooc import extras
from tsclust_ooc.cluster.lloyd import assign
from tsclust_ooc.passes import as_rows


@dataclass(frozen=True)
class StockFit:
    """Centers (k, columns) as dask-ml left them, and how often it updated them."""

    centers: np.ndarray
    n_iter: int


def fit_stock(x: Any, centers: np.ndarray, *, max_iter: int = 300, tol: float = 1e-4, seed: int = 0) -> StockFit:
    """Centers of `dask_ml.cluster.KMeans` fitted to the 2-D dask array `x` from given `centers`, (k, columns).

    `tol` is dask-ml's: absolute, on the squared movement of all centers. Its inertia is of no use (it changes from
    squared to unsquared distances) and its labels may be one update behind: take both from `lloyd.assign`. A cluster
    that loses its rows becomes the zero vector.

    Raises NonFiniteRows when rows hold NaN or infinity, MissingExtra when dask-ml cannot be imported.
    """
    with _quiet():
        stock = extras.load("dask_ml.cluster")
        estimator = stock.KMeans(
            n_clusters=len(centers), init=np.asarray(centers, x.dtype), max_iter=max_iter, tol=tol, random_state=seed
        )
        try:
            estimator.fit(x)
        except ValueError:
            # Its check says neither where nor how many; the same read with our kernel does, or finds nothing wrong.
            assign(as_rows(x), centers)
            raise
    return StockFit(np.asarray(estimator.cluster_centers_), int(estimator.n_iter_))


@contextmanager
def _quiet() -> Iterator[None]:
    """dask-ml warns of its own dependencies' future; the user can do nothing about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
