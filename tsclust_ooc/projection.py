"""A map of many columns onto two: the first principal components of a sample of rows.

Invariant: the same rows give the same map, sign and all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tsclust_ooc import extras


@dataclass(frozen=True)
class Projection:
    """`coordinates` (rows, 2) float64, and the fraction of the rows' variance along each axis."""

    coordinates: np.ndarray[Any, Any]
    explained: tuple[float, float]


def principal_components(x: np.ndarray[Any, Any]) -> Projection:
    """The first two principal components of the rows of `x`, (rows, columns).

    Truncated SVD of the centered rows (Lanczos, scipy's ARPACK) from a fixed start. Each axis points to where its
    largest coordinate is positive. Rows without variance, or a single column, give zeros for what is not there.
    """
    centered = np.asarray(x, dtype=np.float64) - x.mean(axis=0, dtype=np.float64)
    total = float(np.einsum("ij,ij->", centered, centered))
    coordinates, explained = np.zeros((len(x), 2)), [0.0, 0.0]
    if total == 0:
        return Projection(coordinates, (0.0, 0.0))
    u, s = _left(centered)
    for axis, i in enumerate(np.argsort(-s, kind="stable")[:2]):
        along = u[:, i] * s[i]
        coordinates[:, axis] = along * (np.sign(along[np.argmax(np.abs(along))]) or 1.0)
        explained[axis] = float(s[i] ** 2 / total)
    return Projection(coordinates, (explained[0], explained[1]))


def _left(x: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Left singular vectors and singular values of `x`: two of them, or all where there are hardly more."""
    if min(x.shape) <= 8:
        u, s, _ = np.linalg.svd(x, full_matrices=False)
        return u, s
    start = np.random.default_rng(0).standard_normal(min(x.shape))
    u, s, _ = extras.load("scipy.sparse.linalg").svds(x, k=2, v0=start)
    return u, s
