"""The k-means kernel: labels, sums, counts and inertia of a block of rows in one read.

Invariant: the same rows give the same result under any split into blocks, to the rounding of float64 sums; labels and
distances do not depend on the split at all beyond the rounding of one matrix product.

A block is worked tile by tile, so that a tile stays in the cache between its matrix product and the loop that settles
each row. The product only decides which center is nearest; distances are then taken from the row itself in float64,
so nothing is lost to cancellation when data lie far from the origin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import numpy as np
from numba import njit

from tsclust_ooc.errors import BadInput
from tsclust_ooc.units import format_count, plural

Metric = Literal["euclidean", "cosine"]
F = TypeVar("F", bound=Callable[..., Any])
TILE_BYTES = 2**20
_NOWHERE = np.iinfo(np.int64).max


class UnusableRows(BadInput, ValueError):
    """Some rows cannot be clustered: `row` is the first of them, `n_rows_bad` counts them, of `n_rows` in all."""

    _TEXT = "{bad} of {rows} cannot be used; the first is row {row}."

    def __init__(self, row: int, n_rows_bad: int, n_rows: int) -> None:
        """Say which rows; row numbers count from 0 over all rows read."""
        super().__init__(self._TEXT.format(bad=format_count(n_rows_bad), rows=plural(n_rows, "row"), row=row))
        self.row, self.n_rows_bad, self.n_rows = row, n_rows_bad, n_rows

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the facts: a worker process may be the one that raises."""
        return type(self), (self.row, self.n_rows_bad, self.n_rows)


class NonFiniteRows(UnusableRows):
    """Some rows hold NaN or infinite values."""

    _TEXT = (
        "{bad} of {rows} hold NaN or infinite values; the first is row {row}. Wanted: finite numbers. "
        "Leave these rows out or repair their source, then run again."
    )


class ZeroRows(UnusableRows):
    """Some rows are all zero and have no direction for the cosine metric."""

    _TEXT = (
        "{bad} of {rows} are all zero; the first is row {row}. Wanted: rows with a direction, for the cosine metric. "
        "Leave these rows out, or use the euclidean metric."
    )


@dataclass(frozen=True)
class Flagged:
    """Rows that cannot be used: how many, and the first of them."""

    n_rows: int = 0
    row: int = _NOWHERE

    def __add__(self, other: Flagged) -> Flagged:
        """Of two sets of rows, both."""
        return Flagged(self.n_rows + other.n_rows, min(self.row, other.row))


@dataclass(frozen=True)
class Assigned:
    """What some rows give, assigned to k centers.

    sums (k, columns) and counts (k,) of the rows of each center, inertia (sum of squared distances), the farthest rows
    (at most k, squared distance descending, then row ascending), and rows that are not finite or are zero.
    """

    sums: np.ndarray
    counts: np.ndarray
    inertia: float
    far_rows: np.ndarray
    far_distances: np.ndarray
    bad: Flagged
    zero: Flagged


@dataclass(frozen=True)
class Fused:
    """The kernel for `passes.one_pass`; make it with `fused`. Per row: (labels int32, squared distances)."""

    metric: Metric
    centers: np.ndarray
    """(k, columns) float64, exactly the centers distances are measured to."""
    shift: np.ndarray
    """(columns,) subtracted from rows and centers before their product."""
    shifted: np.ndarray
    """(k, columns) centers less shift, in the type of the product."""
    half_norms: np.ndarray
    """(k,) half the squared norms of `shifted`."""

    def chunk(self, x: np.ndarray, start: int) -> tuple[Assigned, tuple[np.ndarray, np.ndarray]]:
        """Assign rows `x`, shape (rows, columns), in float32 or float64."""
        k, n_rows = len(self.centers), len(x)
        sums, counts = np.zeros(self.centers.shape), np.zeros(k, np.int64)
        labels, distances = np.empty(n_rows, np.int32), np.empty(n_rows)
        height = min(tile_rows(x.shape[1], k, x.dtype.itemsize), max(n_rows, 1))
        tile, dots = np.empty((height, x.shape[1]), x.dtype), np.zeros((height, k), x.dtype)
        scale = np.ones(height)
        inertia, bad, zero = 0.0, Flagged(), Flagged()
        for top in range(0, n_rows, height):
            part = x[top : top + height]
            n = len(part)
            n_zero, first_zero = self._fill(part, tile[:n], scale[:n])
            self._multiply(tile[:n], dots[:n])
            there = slice(top, top + n)
            added, n_bad, first_bad = _settle(
                part, scale, dots, self.half_norms, self.centers, sums, counts, labels[there], distances[there]
            )
            inertia += added
            bad += _flagged(n_bad, first_bad, start + top)
            zero += _flagged(n_zero, first_zero, start + top)
        far = farthest(distances, k)
        found = Assigned(sums, counts, inertia, far + start, distances[far], bad, zero)
        with np.errstate(over="ignore"):
            return found, (labels, distances.astype(x.dtype))

    def combine(self, a: Assigned, b: Assigned) -> Assigned:
        """The result of `a`'s rows and `b`'s rows together."""
        rows = np.concatenate([a.far_rows, b.far_rows])
        distances = np.concatenate([a.far_distances, b.far_distances])
        kept = np.lexsort((rows, -distances))[: len(a.counts)]
        return Assigned(
            a.sums + b.sums,
            a.counts + b.counts,
            a.inertia + b.inertia,
            rows[kept],
            distances[kept],
            a.bad + b.bad,
            a.zero + b.zero,
        )

    def _fill(self, part: np.ndarray, tile: np.ndarray, scale: np.ndarray) -> tuple[int, int]:
        """Rows as the product wants them: unit length for cosine, less the shift. Counts zero rows."""
        if self.metric == "cosine":
            n_zero, first = _unit_rows(part, self.shift, tile, scale)
            return int(n_zero), int(first)
        with np.errstate(invalid="ignore", over="ignore"):
            np.subtract(part, self.shift, out=tile)
        return 0, 0

    def _multiply(self, tile: np.ndarray, dots: np.ndarray) -> None:
        if len(self.centers) > 1:  # one center is the nearest of all without asking
            with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
                np.matmul(tile, self.shifted.T, out=dots)


def fused(centers: np.ndarray, metric: Metric, dtype: Any) -> Fused:
    """The kernel for rows read as `dtype` (float32 or float64) and `centers`, shape (k, columns).

    The shift is the median center: it follows the data's offset and no single far center moves it. It depends on the
    centers alone, so the same centers give the same labels in a fit and in a later prediction.
    """
    exact = np.ascontiguousarray(centers, dtype=np.float64)
    shift = np.median(exact, axis=0).astype(dtype)
    shifted = exact - shift.astype(np.float64)
    half_norms = 0.5 * np.einsum("ij,ij->i", shifted, shifted)
    with np.errstate(over="ignore"):
        return Fused(metric, exact, shift, shifted.astype(dtype), half_norms.astype(dtype))


def check_rows(found: Assigned, n_rows: int) -> None:
    """Raise NonFiniteRows or ZeroRows when the pass met such rows."""
    if found.bad.n_rows:
        raise NonFiniteRows(found.bad.row, found.bad.n_rows, n_rows)
    if found.zero.n_rows:
        raise ZeroRows(found.zero.row, found.zero.n_rows, n_rows)


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of `x` scaled to unit length, in their own float type; a zero row stays zero."""
    norms = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    return (x / np.where(norms == 0, 1, norms)).astype(x.dtype)


def tile_rows(n_columns: int, k: int, itemsize: int) -> int:
    """Rows of a tile: the tile and its products each fit `TILE_BYTES`, and a product has enough rows to be worth it."""
    return max(32, TILE_BYTES // (itemsize * max(n_columns, k)))


def farthest(distances: np.ndarray, n: int) -> np.ndarray:
    """Indices of the `n` largest `distances`, descending, ties by lower index."""
    if len(distances) > n:
        least = np.partition(distances, len(distances) - n)[len(distances) - n]
        above, equal = np.flatnonzero(distances > least), np.flatnonzero(distances == least)
        chosen = np.concatenate([above, equal[: max(n - len(above), 0)]])
    else:
        chosen = np.arange(len(distances))
    return chosen[np.lexsort((chosen, -distances[chosen]))]


def _flagged(n: int, first: int, start: int) -> Flagged:
    return Flagged(int(n), start + int(first)) if n else Flagged()


def _compiled(function: F) -> F:
    """`function` as machine code, kept on disk.

    reassoc and contract let the sums vectorize; NaN and infinity keep their meaning, which the checks rely on.
    """
    return cast(F, njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})(function))


@_compiled
def _squared_distance(row: np.ndarray, scale: float, center: np.ndarray) -> float:
    total = 0.0
    for j in range(row.shape[0]):
        gap = scale * np.float64(row[j]) - center[j]
        total += gap * gap
    return total


@_compiled
def _settle(
    x: np.ndarray,
    scale: np.ndarray,
    dots: np.ndarray,
    half_norms: np.ndarray,
    centers: np.ndarray,
    sums: np.ndarray,
    counts: np.ndarray,
    labels: np.ndarray,
    distances: np.ndarray,
) -> tuple[float, int, int]:
    """Per row: nearest center, exact squared distance to it, and the row added to its center's sum."""
    inertia, n_bad, first_bad = 0.0, 0, -1
    for i in range(x.shape[0]):
        label, best = 0, np.inf
        for c in range(half_norms.shape[0]):
            score = half_norms[c] - dots[i, c]
            if not (score >= best):  # true for NaN too, which must not hide behind a later center
                label, best = c, score
                if np.isnan(score):
                    break
        distance = _squared_distance(x[i], scale[i], centers[label])
        if not np.isfinite(distance):
            if n_bad == 0:
                first_bad = i
            n_bad += 1
        elif not np.isfinite(best):  # the row is fine but its products overflowed: decide in float64
            for c in range(centers.shape[0]):
                other = _squared_distance(x[i], scale[i], centers[c])
                if other < distance:
                    label, distance = c, other
        for j in range(x.shape[1]):
            sums[label, j] += scale[i] * np.float64(x[i, j])
        counts[label] += 1
        inertia += distance
        labels[i] = label
        distances[i] = distance
    return inertia, n_bad, first_bad


@_compiled
def _unit_rows(x: np.ndarray, shift: np.ndarray, tile: np.ndarray, scale: np.ndarray) -> tuple[int, int]:
    """Fill `scale` with 1 / norm of each row and `tile` with unit rows less the shift; count rows without direction."""
    n_zero, first_zero = 0, -1
    for i in range(x.shape[0]):
        total = 0.0
        for j in range(x.shape[1]):
            total += np.float64(x[i, j]) * np.float64(x[i, j])
        if total == 0.0:
            if n_zero == 0:
                first_zero = i
            n_zero += 1
            scale[i] = 0.0
        else:
            scale[i] = 1.0 / np.sqrt(total) if np.isfinite(total) else np.nan
        for j in range(x.shape[1]):
            tile[i, j] = scale[i] * x[i, j] - shift[j]
    return n_zero, first_zero
