"""Clusters of rows that need not fit in memory.

    starts   where to begin            kmeans   the estimator
    fused    one block, one read       stock    dask-ml's own engine
    lloyd    passes until it stands

Invariant: importing this loads none of them, for numba alone takes a quarter of a second; a name is loaded when used.
"""

from __future__ import annotations

import importlib
from typing import Any

INITS = ("auto", "k-means++", "k-means||", "random")
"""Ways to choose the first centers."""

_FROM = {
    "fused": ("Metric", "NonFiniteRows", "UnusableRows", "ZeroRows"),
    "kmeans": ("KMeans",),
    "lloyd": ("Fit", "PassInfo", "assign"),
    "starts": ("Start", "initial_centers"),
}
_EXPORTS = {name: module for module, names in _FROM.items() for name in names}

__all__ = ["INITS", *sorted(_EXPORTS)]  # noqa: PLE0604 - a list of str, made from the table above


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
