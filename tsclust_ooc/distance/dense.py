"""Distances of a block of rows against another: euclidean, sqeuclidean, cosine, cityblock, as float32.

Invariant: every distance is within 1e-6 (relative) of the same distance computed in float64, for any pair, also of
near duplicates far from the origin; equal rows are exactly 0 apart. The same two blocks always give the same bytes.

Squared distances come from one matrix product of rows less a common shift, |a|^2 + |b|^2 - 2 ab, tile by tile:

    float32 product ── error bound of each pair holds ──────────────────────────────── done
                    ├─ few pairs lost too many digits ── these from their rows, in float64
                    └─ many did ── float64 product of the tile ── what it loses too, from the rows

Cosine is half the squared distance of unit rows. Cityblock has no product: differences, summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit

from tsclust_ooc.errors import BadInput

METRICS = ("euclidean", "sqeuclidean", "cosine", "cityblock")
TILE_ROWS, TILE_BYTES = 512, 32 * 2**20
"""Most rows of a tile, and most bytes of its rows in float64: a tile's products stay in the cache."""

F = TypeVar("F", bound=Callable[..., Any])
_PANEL = 256
"""Columns that are summed in float32 at a stretch: rounding errors grow with its square root."""
_ROUNDING = {np.dtype("f4"): 2.0**-24, np.dtype("f8"): 2.0**-53}
_ALLOWED = 0.9e-6
"""Relative error of a result before it is rounded to float32, which adds 0.06e-6."""
_LARGEST = float(np.finfo(np.float32).max)
_FEW = 0.25
"""Up to this part of a tile's pairs, computing them one by one is faster than a second product in float64."""


class UnusableRow(BadInput, ValueError):
    """A row no distance can be taken of: `row` of the first matrix, or of the second when `second`."""

    def __init__(self, row: int, what: str, second: bool = False) -> None:
        """`what` is wrong with the row, and what was wanted."""
        super().__init__(f"row {row}{' of the second matrix' if second else ''} {what}")
        self.row, self.what, self.second = row, what, second

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the facts: a worker process may be the one that raises."""
        return type(self), (self.row, self.what, self.second)


@dataclass(frozen=True)
class Slab:
    """Consecutive rows, looked at once and ready to be compared; make it with `slab`.

    x (rows, columns) float32 or float64; scale (rows,) float64, 1 / norm for cosine and 1 otherwise; mean (columns,)
    float64 of the scaled rows.
    """

    x: np.ndarray
    scale: np.ndarray
    mean: np.ndarray


def slab(x: np.ndarray, metric: str, start: int = 0) -> Slab:
    """Look at rows `x` (rows, columns), float32 or float64, of which the first is row `start`.

    Raises UnusableRow for the first row with NaN or infinity and, for cosine, for the first that is all zero.
    """
    scale, mean = np.ones(len(x)), np.zeros(x.shape[1])
    bad, zero = _survey(x, metric == "cosine", scale, mean)
    if bad >= 0:
        what = "holds NaN or infinite values. Wanted: finite numbers. Leave it out or repair its source, then run again"
        raise UnusableRow(start + bad, f"{what}.")
    if zero >= 0:
        what = "is all zero. Wanted: a row with a direction, for the cosine metric. Leave it out or use another metric."
        raise UnusableRow(start + zero, what)
    return Slab(x, scale, mean)


def fill(a: Slab, b: Slab, metric: str, out: np.ndarray) -> None:
    """Write the distances of the rows of `a` to those of `b` into `out`, shape (rows of a, rows of b), float32.

    When `a` is `b`, half of it is computed: `out` is exactly symmetric with an exactly zero diagonal. Raises BadInput
    for a distance that float32 cannot hold.
    """
    fill_tile = _cityblock_tiles(a, b) if metric == "cityblock" else _Products(a, b, metric).fill
    for rows, columns in _tiles(a, b):
        there = out[rows, columns]
        if fill_tile(rows, columns, there):
            raise BadInput(
                f"some {metric} distances exceed {_LARGEST:.3g}, the most that float32 holds. "
                "Scale the data down, then run again."
            )
        if a is b and rows == columns:
            _mirror(there)
        elif a is b:
            out[columns, rows] = there.T


def tile_rows(n_columns: int) -> int:
    """Rows of a tile, fewer where they are very wide."""
    return int(min(TILE_ROWS, max(64, TILE_BYTES // (8 * n_columns))))


def working_bytes(n_rows: int, n_columns: int) -> int:
    """Most bytes that `fill` holds besides its slabs of at most `n_rows` rows and its output."""
    height = min(tile_rows(n_columns), n_rows)
    return 4 * n_rows * n_columns + height * n_columns * (4 + 8 + 8) + height * height * (4 + 4 + 8)


def _tiles(a: Slab, b: Slab) -> Iterator[tuple[slice, slice]]:
    """Tiles of the output row by row; of a symmetric one, the diagonal and what is right of it."""
    height = tile_rows(a.x.shape[1])
    for top in range(0, len(a.x), height):
        for left in range(top if a is b else 0, len(b.x), height):
            yield slice(top, min(top + height, len(a.x))), slice(left, min(left + height, len(b.x)))


def _cityblock_tiles(a: Slab, b: Slab) -> Callable[[slice, slice, np.ndarray], bool]:
    dtype = np.promote_types(a.x.dtype, b.x.dtype)

    def fill_tile(rows: slice, columns: slice, out: np.ndarray) -> bool:
        x, y = a.x[rows].astype(dtype, copy=False), np.ascontiguousarray(b.x[columns].T, dtype)
        return bool(_cityblock(x, y, np.empty(out.shape[1], dtype), np.empty(out.shape), out))

    return fill_tile


class _Products:
    """Distances of two slabs by matrix products. Remembers when a tile needed float64: its neighbours will too."""

    def __init__(self, a: Slab, b: Slab, metric: str) -> None:
        self.a, self.b = a, b
        # In float32, so that rows near the shift lose nothing when it is subtracted (Sterbenz).
        with np.errstate(over="ignore"):  # such rows end in the loop over rows
            self.shift = (0.5 * (a.mean + b.mean)).astype(np.float32).astype(np.float64)
        self.root, self.factor = metric == "euclidean", 0.5 if metric == "cosine" else 1.0
        self.tolerance = _ALLOWED * (2 if self.root else 1)
        self.in_single = True
        self.right = self._centered(b, slice(None), np.float32)
        self.left: tuple[slice, tuple[np.ndarray, np.ndarray]] | None = None

    def fill(self, rows: slice, columns: slice, out: np.ndarray) -> bool:
        """One tile; returns whether some distance is more than float32 holds."""
        n_lost = 0
        if self.in_single:
            if self.left is None or self.left[0] != rows:
                self.left = rows, self._centered(self.a, rows, np.float32)
            n_lost = self._settle(self.left[1], (self.right[0][columns], self.right[1][columns]), out)
            self.in_single = n_lost <= _FEW * out.size or rows == columns  # most tiles are not on the diagonal
        if not self.in_single or n_lost > _FEW * out.size:
            pair = self._centered(self.a, rows, np.float64), self._centered(self.b, columns, np.float64)
            n_lost = self._settle(*pair, out)
        if not n_lost:
            return False
        one, two = self.a, self.b
        return bool(
            _from_rows(one.x[rows], one.scale[rows], two.x[columns], two.scale[columns], self.factor, self.root, out)
        )

    def _centered(self, s: Slab, rows: slice, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        """Rows less the shift in `dtype`, and the squared norms of just these."""
        x, scale = s.x[rows], s.scale[rows]
        centered, norms = np.empty(x.shape, dtype), np.empty(len(x))
        _center(x, scale, self.shift, centered, norms)
        return centered, norms

    def _settle(
        self, left: tuple[np.ndarray, np.ndarray], right: tuple[np.ndarray, np.ndarray], out: np.ndarray
    ) -> int:
        """Distances from the product of centered rows, NaN for each pair whose error bound is too large: how many."""
        (x, x_norms), (y, y_norms) = left, right
        with np.errstate(over="ignore", invalid="ignore"):  # such pairs are lost, and computed from their rows
            dots = _multiply(x, y)
        along, across, least = _error_bound(x.shape[1], x.dtype)
        return int(
            _settle(
                dots, x_norms, y_norms, np.sqrt(x_norms), np.sqrt(y_norms), 2 * along / self.tolerance,
                2 * across / self.tolerance, 2 * least / self.tolerance, self.factor, self.root, out,
            )
        )  # fmt: skip


def _multiply(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x @ y.T; in float32 panel by panel, so that no sum of many columns is rounded at each of them."""
    width = _PANEL if x.dtype == np.float32 else x.shape[1]
    dots: np.ndarray = np.matmul(x[:, :width], y[:, :width].T)
    part = np.empty_like(dots) if x.shape[1] > width else dots
    for begin in range(width, x.shape[1], width):
        there = slice(begin, begin + width)
        np.matmul(x[:, there], y[:, there].T, out=part)
        np.add(dots, part, out=dots)
    return dots


def _error_bound(n_columns: int, dtype: np.dtype[Any]) -> tuple[float, float, float]:
    """Factors of |ab|, |a||b| and 1 whose sum bounds the error of a product.

    float64: the certain bound, n u |a||b|. float32: rounding errors as a random walk (Higham and Mary, "A new approach
    to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41, 2019): with partial sums near |ab| it is about
    1.1 sqrt(n/3) u |ab| at six deviations, measured; taken is what it is when the first columns outweigh the rest.
    """
    u = _ROUNDING[dtype]
    if dtype == np.float64:
        return 0.0, 2.0 * n_columns * u, n_columns * 1e-300
    panels = math.ceil(n_columns / _PANEL)
    along = 1.9 * math.sqrt(min(n_columns, _PANEL)) + 1.1 * math.sqrt(panels)
    return along * u, 8.0 * u, n_columns * 1.2e-38  # products below that vanish


def _compiled(function: F) -> F:
    """`function` as machine code, kept on disk; reassoc and contract let sums vectorize and leave NaN its meaning."""
    return cast(F, njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})(function))


@_compiled
def _survey(x: np.ndarray, unit: bool, scale: np.ndarray, mean: np.ndarray) -> tuple[int, int]:
    """Fill `scale` and `mean`; the first row that is not finite and the first that has no direction, or -1."""
    bad, zero = -1, -1
    for i in range(x.shape[0]):
        size, square = 0.0, 0.0
        for j in range(x.shape[1]):
            value = np.float64(x[i, j])
            size += abs(value)
            square += value * value
        if bad < 0 and not (np.isfinite(size) and (np.isfinite(square) or not unit)):
            bad = i
        if unit:
            if square > 0.0:
                scale[i] = 1.0 / np.sqrt(square)
            elif zero < 0:
                zero = i
        for j in range(x.shape[1]):
            mean[j] += scale[i] * x[i, j]
    for j in range(x.shape[1]):
        mean[j] /= x.shape[0]
    return bad, zero


@_compiled
def _center(x: np.ndarray, scale: np.ndarray, shift: np.ndarray, out: np.ndarray, norms: np.ndarray) -> None:
    """Scaled rows less the shift, rounded once, and the squared norm of what came out."""
    for i in range(x.shape[0]):
        total = 0.0
        for j in range(x.shape[1]):
            out[i, j] = scale[i] * np.float64(x[i, j]) - shift[j]
            total += np.float64(out[i, j]) * np.float64(out[i, j])
        norms[i] = total


@_compiled
def _settle(
    dots: np.ndarray,
    x_norms: np.ndarray,
    y_norms: np.ndarray,
    x_lengths: np.ndarray,
    y_lengths: np.ndarray,
    along: float,
    across: float,
    least: float,
    factor: float,
    root: bool,
    out: np.ndarray,
) -> int:
    """Distances where the error bound, already over the tolerance, is below the squared distance; else NaN."""
    n_lost = 0
    for i in range(dots.shape[0]):
        for j in range(dots.shape[1]):
            dot = np.float64(dots[i, j])
            square = x_norms[i] + y_norms[j] - 2.0 * dot
            bound = along * abs(dot) + across * (x_lengths[i] * y_lengths[j]) + least
            value = np.sqrt(square) if root else factor * square
            kept = bound <= square and value <= _LARGEST  # false for NaN as well
            out[i, j] = value if kept else np.nan
            n_lost += 0 if kept else 1
    return n_lost


def _uncontracted(function: F) -> F:
    """As `_compiled`, but a * b - a * b is 0: no product is kept unrounded while the other is not."""
    return cast(F, njit(nogil=True, cache=True, fastmath={"reassoc"})(function))


@_uncontracted
def _from_rows(
    x: np.ndarray,
    x_scale: np.ndarray,
    y: np.ndarray,
    y_scale: np.ndarray,
    factor: float,
    root: bool,
    out: np.ndarray,
) -> bool:
    """Fill every NaN of `out` from the rows themselves, in float64; whether some result is beyond float32."""
    beyond = False
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            if np.isnan(out[i, j]):
                total = 0.0
                for c in range(x.shape[1]):
                    gap = x_scale[i] * np.float64(x[i, c]) - y_scale[j] * np.float64(y[j, c])
                    total += gap * gap
                value = np.sqrt(total) if root else factor * total
                beyond = beyond or not value <= _LARGEST
                out[i, j] = value
    return beyond


@_compiled
def _cityblock(x: np.ndarray, y: np.ndarray, part: np.ndarray, total: np.ndarray, out: np.ndarray) -> bool:
    """Sums of absolute differences to the columns of `y`: 32 terms at a time in the type of the rows, those in float64.

    All terms are positive, so their rounding errors are bounded for certain: at most 11 roundings each.
    """
    total[:] = 0.0
    for begin in range(0, x.shape[1], 32):
        end = min(begin + 32, x.shape[1])
        eights = begin + (end - begin) // 8 * 8
        for i in range(x.shape[0]):
            part[:] = 0.0
            for c in range(begin, eights, 8):  # written out, so that partial sums stay in registers
                a, b, d, e = x[i, c], x[i, c + 1], x[i, c + 2], x[i, c + 3]
                f, g, h, k = x[i, c + 4], x[i, c + 5], x[i, c + 6], x[i, c + 7]
                p, q, r, s = y[c], y[c + 1], y[c + 2], y[c + 3]
                t, u, v, w = y[c + 4], y[c + 5], y[c + 6], y[c + 7]
                for j in range(y.shape[1]):
                    first = (abs(a - p[j]) + abs(b - q[j])) + (abs(d - r[j]) + abs(e - s[j]))
                    second = (abs(f - t[j]) + abs(g - u[j])) + (abs(h - v[j]) + abs(k - w[j]))
                    part[j] += first + second
            for c in range(eights, end):
                for j in range(y.shape[1]):
                    part[j] += abs(x[i, c] - y[c, j])
            for j in range(y.shape[1]):
                total[i, j] += part[j]
    beyond = False
    for i in range(x.shape[0]):
        for j in range(y.shape[1]):
            beyond = beyond or not total[i, j] <= _LARGEST
            out[i, j] = total[i, j]
    return beyond


@_compiled
def _mirror(out: np.ndarray) -> None:
    """Copy what is right of the diagonal to its left; the diagonal is zero."""
    for i in range(out.shape[0]):
        out[i, i] = 0.0
        for j in range(i):
            out[i, j] = out[j, i]
