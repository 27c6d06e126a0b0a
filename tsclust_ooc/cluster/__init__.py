"""Clusters of rows that need not fit in memory.

    starts   where to begin            kmeans   the estimator
    fused    one block, one read       stock    dask-ml's own engine
    lloyd    passes until it stands

Invariant: importing this loads neither scikit-learn nor dask.
"""

from tsclust_ooc.cluster.fused import Metric, NonFiniteRows, UnusableRows, ZeroRows
from tsclust_ooc.cluster.kmeans import KMeans
from tsclust_ooc.cluster.lloyd import Fit, PassInfo, assign, lloyd
from tsclust_ooc.cluster.starts import Start, initial_centers

__all__ = [
    "Fit",
    "KMeans",
    "Metric",
    "NonFiniteRows",
    "PassInfo",
    "Start",
    "UnusableRows",
    "ZeroRows",
    "assign",
    "initial_centers",
    "lloyd",
]
