"""Turn thousands to millions of HDF5 embedding shards into one zarr dataset, and cluster it when it exceeds memory.

>>> from tsclust_ooc import KMeans, open_dataset
>>> dataset = open_dataset("ettm1")  # doctest: +SKIP
>>> KMeans(6).fit(dataset["train"].view("variable")).labels_  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Named by path and imported when first used: `import tsclust_ooc` alone loads nothing heavy.
_EXPORTS = {
    "KMeans": "tsclust_ooc.cluster.kmeans",
    "open_dataset": "tsclust_ooc.dataset",
    "open_matrix": "tsclust_ooc.matrix",
    "open_run": "tsclust_ooc.results",
    "open_source": "tsclust_ooc.source",
    "pairwise": "tsclust_ooc.distance.pairwise",
    "write_demo": "tsclust_ooc.demo",
}

__all__ = sorted(_EXPORTS)  # noqa: PLE0605 - a list of str, made from the table above


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
