"""Do two splits lie in one space? Their means and covariances, from one read, compared.

Extractors with an unseeded random layer give each process a space of its own: a model fitted on one split then means
nothing on another, though shapes and types agree. Two figures show it (`Drift`):

    mean shift              |mean_a - mean_b| / sqrt(sum over columns of the pooled variance); for one column Cohen's d
    covariance correlation  <A, B> / sqrt(<A, A> <B, B>), A and B the covariances of a random projection of the columns
                            to 64, the mean of the diagonal taken off (every space has that part), and <A, A> less what
                            the sampling of n normal rows adds to it on average: (tr(S)^2 + tr(S S)) / (n - 1)

Rows of one distribution have 0 and 1, up to sampling; a random rotation of one split leaves about 0 of the correlation.
Splits that follow each other in time differ in one space too. Measured on ETTh1, windows of 96, split 12:4:4 months,
three encoders: shifts up to 0.66 and correlations from 0.42 to 0.82 in one space, correlations from -0.01 to 0.26 where
one split was embedded with other random weights. The bounds lie between.
The formula of the sampling is that of the Wishart distribution (Muirhead 1982, Aspects of Multivariate Statistical
Theory, 3.1). Overlapping windows are no independent rows: the figures warn, they prove nothing.

Invariant: moments of blocks, combined in order, are those of all rows, up to the rounding of float64 sums.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

MEAN_SHIFT, COVARIANCE_CORRELATION = 1.0, 0.3
"""A pair of splits is warned about beyond the first or below the second."""

DEFINITION = (
    "mean_shift: distance of the means over the root of the summed pooled column variances, warned about above "
    f"{MEAN_SHIFT:g}; covariance_correlation: correlation of the covariances of one random projection to 64 columns, "
    f"less their mean diagonal and corrected for sampling, warned about below {COVARIANCE_CORRELATION:g}, null where "
    "the rows are too few to tell"
)

_N_PROJECTED, _MOST_COLUMNS = 64, 16_384
_LEAST_ROWS = 30
_CLEAR = 3.0  # a structure of the covariance this many times that of the sampling alone

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Drift:
    """How far two splits are apart; None for what cannot be told. `warning` is '' where they may be of one space."""

    a: str
    b: str
    mean_shift: float | None
    covariance_correlation: float | None
    warning: str


@dataclass(frozen=True)
class Moments:
    """Of n rows: mean and sum of squared deviations of each column (p,), products of the projected ones (d, d)."""

    n: int
    mean: Array
    squares: Array
    products: Array


@dataclass(frozen=True)
class Sketch:
    """The columns that are looked at (every one, or evenly spaced ones where they are many), and their projection."""

    n_columns: int

    @cached_property
    def step(self) -> int:
        """Every `step`-th column is looked at."""
        return -(-self.n_columns // _MOST_COLUMNS)

    @cached_property
    def matrix(self) -> Array:
        """The projection (p, d), float32, always the same; the identity where there are 64 columns or fewer.

        Its columns are orthonormal: else what it does to noise without direction would be alike in every space.
        """
        p = len(range(0, self.n_columns, self.step))
        if p <= _N_PROJECTED:
            return np.eye(p, dtype=np.float32)
        orthonormal, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((p, _N_PROJECTED)))
        return orthonormal.astype(np.float32)

    @np.errstate(over="ignore", invalid="ignore")
    def moments(self, rows: Array) -> Moments:
        """Moments of finite rows (n, n_columns) of any float type; n may be 0."""
        x = rows[:, :: self.step]
        n, p = x.shape
        if n == 0:
            return Moments(0, np.zeros(p), np.zeros(p), np.zeros((self.matrix.shape[1],) * 2))
        mean = x.mean(axis=0, dtype=np.float64)
        wide = np.float64 if x.dtype.itemsize > 4 else np.float32
        centered = x.astype(wide, copy=False) - mean.astype(wide)
        projected = (centered @ self.matrix.astype(wide, copy=False)).astype(np.float64)
        squares = np.einsum("ij,ij->j", centered, centered).astype(np.float64)
        return Moments(n, mean, squares, projected.T @ projected)

    @np.errstate(over="ignore", invalid="ignore")
    def combined(self, a: Moments, b: Moments) -> Moments:
        """Moments of the rows of both (Chan, Golub, LeVeque 1979)."""
        if not a.n or not b.n:
            return a if a.n else b
        n, gap = a.n + b.n, b.mean - a.mean
        weight, aside = a.n * b.n / n, gap @ self.matrix
        return Moments(
            n, a.mean + gap * (b.n / n), a.squares + b.squares + weight * gap * gap,
            a.products + b.products + weight * np.outer(aside, aside),
        )  # fmt: skip


@np.errstate(over="ignore", invalid="ignore")
def compare(splits: Mapping[str, Moments]) -> tuple[Drift, ...]:
    """Every pair of splits, in order. Sums that are too large for float64 leave figures that cannot be told."""
    return tuple(_pair(a, b, splits[a], splits[b]) for a, b in itertools.combinations(splits, 2))


def _pair(name_a: str, name_b: str, a: Moments, b: Moments) -> Drift:
    if min(a.n, b.n) < _LEAST_ROWS:
        return Drift(name_a, name_b, None, None, "")
    shift, correlation = _shift(a, b), _correlation(a, b)
    said = []
    if shift is not None and shift > MEAN_SHIFT:
        said.append(f"their means are {shift:.2f} pooled standard deviations apart (more than {MEAN_SHIFT:g})")
    if correlation is not None and correlation < COVARIANCE_CORRELATION:
        said.append(f"their covariances correlate by {correlation:.2f} (less than {COVARIANCE_CORRELATION:g})")
    return Drift(name_a, name_b, shift, correlation, " and ".join(said))


def _shift(a: Moments, b: Moments) -> float | None:
    pooled = float((a.squares + b.squares).sum()) / (a.n + b.n)
    gap = float(np.linalg.norm(a.mean - b.mean))
    return gap / math.sqrt(pooled) if pooled > 0 and math.isfinite(pooled + gap) else None


def _correlation(a: Moments, b: Moments) -> float | None:
    (left, left_size), (right, right_size) = _structure(a), _structure(b)
    if left_size == 0 or right_size == 0:
        return None
    found = float((left * right).sum()) / math.sqrt(left_size * right_size)
    return max(-1.0, min(1.0, found))


def _structure(m: Moments) -> tuple[Array, float]:
    """The covariance less its mean diagonal, and its squared size less that of the sampling; 0 where that drowns it."""
    covariance = m.products / (m.n - 1)
    trace = float(np.trace(covariance))
    part = covariance - np.eye(len(covariance)) * (trace / len(covariance))
    size, sampling = float((part * part).sum()), (trace**2 + float((covariance * covariance).sum())) / (m.n - 1)
    clear = math.isfinite(size) and size > (1 + _CLEAR) * sampling
    return part, size - sampling if clear else 0.0
