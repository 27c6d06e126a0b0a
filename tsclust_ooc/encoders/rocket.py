"""Embed series by fixed random dilated convolutions and the proportion of positive values (PPV) of each.

After ROCKET (Dempster, Petitjean & Webb 2020, doi:10.1007/s10618-020-00701-z) and MiniRocket (Dempster, Schmidt & Webb
2021, doi:10.1145/3447548.3467231): kernels of nine taps, three of them 2 and six of them -1, so that each sums to zero
and ignores the level of a series; dilations are powers of two; biases are quantiles of the convolutions of training
series. Here the kernels and their dilations are a seeded draw, without replacement, and nothing is padded.

Invariant: features are the same bit for bit on any machine, for any number of threads and any split into blocks.
Series are snapped to a grid of 2**-12; then every partial sum of a convolution is an integer number of grid steps below
2**24, which float32 holds exactly whatever the order of summation in the matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsclust_ooc.errors import BadInput, UsageError

N_TAPS = 9
N_BIASES = 8
"""Thresholds, and so features, of each kernel."""

GRID = 2.0**-12
LARGEST_VALUE = 256.0
"""Largest |value| of a series: 256 / GRID times 12, the sum of a kernel's |weights|, is under 2**24."""

_N_FIT_SERIES = 1024
_BLOCK_BYTES = 2 * 2**20  # of convolutions at a time: they stay in a core's cache while all biases are compared


@dataclass(frozen=True, eq=False)
class Rocket:
    """A fitted encoder: kernels in the order of their features, those of one dilation side by side.

    Attributes
    ----------
    length : steps of the series it encodes.
    kernels : (n_kernels, 9) float32, weights 2 and -1.
    dilations : (n_kernels,) int64, ascending.
    biases : (n_kernels, 8) float32; feature ``8 * kernel + j`` is the PPV at ``biases[kernel, j]``.
    """

    length: int
    kernels: NDArray[np.float32]
    dilations: NDArray[np.int64]
    biases: NDArray[np.float32]

    @classmethod
    def fit(cls, series: ArrayLike, *, width: int = 768, seed: int = 0) -> Rocket:
        """Draw kernels by `seed` and take their biases from at most 1,024 of `series` (n, length), drawn by `seed`.

        Series are expected at unit scale (z-scored).

        Raises
        ------
        UsageError
            `width` is no multiple of 8, or more than the distinct kernels of this length give.
        BadInput
            Series are too short, not finite or far from unit scale.
        """
        checked = _checked(series)
        length = checked.shape[1]
        rng = np.random.default_rng(seed)
        kernels, dilations = _draw_kernels(rng, length, width)
        sample = rng.choice(len(checked), min(_N_FIT_SERIES, len(checked)), replace=False)
        steps = _snapped_columns(checked[np.sort(sample)])
        quantiles = (np.arange(N_BIASES) + 0.5) / N_BIASES
        biases = np.empty((len(kernels), N_BIASES), np.float32)
        for kernel, weights in enumerate(kernels):
            convolved = _convolve(steps, weights[None], int(dilations[kernel]))
            # A quantile that is one of the values, not between two, stays on the grid.
            biases[kernel] = np.quantile(convolved, quantiles, method="inverted_cdf")
        return cls(length, kernels, dilations, biases)

    @property
    def width(self) -> int:
        """Features of a series."""
        return self.biases.size

    def encode(self, series: ArrayLike) -> NDArray[np.float32]:
        """Features of `series` (n, length): (n, width) float32 in [0, 1].

        Beyond the result it holds a few MiB, however many series come.

        Raises
        ------
        BadInput
            Series are of another length, not finite or far from unit scale.
        """
        checked = _checked(series)
        n_series, length = checked.shape
        if length != self.length:
            raise BadInput(
                f"Series of {length} steps do not fit this encoder, fitted on series of {self.length} steps. "
                f"Encode series of {self.length} steps, or fit an encoder on series of {length}."
            )
        features = np.empty((n_series, *self.biases.shape), np.float32)
        for start, stop in self._blocks(n_series):
            steps = _snapped_columns(checked[start:stop])
            for dilation, group in self._groups():
                convolved = _convolve(steps, self.kernels[group], dilation)
                _positive_proportions(convolved, self.biases[group], features[start:stop, group])
        return features.reshape(n_series, self.width)

    def _groups(self) -> Iterator[tuple[int, slice]]:
        """Each dilation and the kernels that have it."""
        values, starts = np.unique(self.dilations, return_index=True)
        for value, start, stop in zip(values, starts, [*starts[1:], len(self.dilations)], strict=True):
            yield int(value), slice(int(start), int(stop))

    def _blocks(self, n_series: int) -> Iterator[tuple[int, int]]:
        """Ranges of series whose convolutions of one dilation fill about `_BLOCK_BYTES`."""
        largest_group = max(group.stop - group.start for _, group in self._groups())
        n_rows = min(max(1, _BLOCK_BYTES // (4 * largest_group * self.length)), 1024)
        for start in range(0, n_series, n_rows):
            yield start, min(start + n_rows, n_series)


def _checked(series: ArrayLike) -> NDArray[np.generic]:
    """`series` as a (n, length) array that can be convolved, or BadInput with the first row that cannot."""
    array = np.asarray(series)
    if array.ndim != 2 or array.shape[0] == 0 or array.dtype.kind not in "fiu":
        raise BadInput(
            f"Series of shape {array.shape} and type {array.dtype} cannot be encoded. "
            "Pass real numbers of shape (n, length), with n at least 1."
        )
    if array.shape[1] < N_TAPS:
        raise BadInput(
            f"Series of {array.shape[1]} steps are shorter than the {N_TAPS} taps of a kernel. "
            f"Use series of at least {N_TAPS} steps."
        )
    low, high = array.min(axis=1), array.max(axis=1)  # NaN passes through both; no second copy of the series
    if not (np.isfinite(low) & np.isfinite(high)).all():
        row = int(np.argmin(np.isfinite(low) & np.isfinite(high)))
        raise BadInput(f"Series {row} has values that are not finite. Remove it, or fill its gaps, before encoding.")
    too_large = (low < -LARGEST_VALUE) | (high > LARGEST_VALUE)
    if too_large.any():
        row = int(np.argmax(too_large))
        raise BadInput(
            f"Series {row} spans {low[row]:.6g} to {high[row]:.6g}; the encoder works at unit scale, "
            f"within {LARGEST_VALUE:.0f} of zero. Z-score the series first."
        )
    return array


def _draw_kernels(rng: np.random.Generator, length: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Distinct pairs of one of MiniRocket's 84 kernels and a dilation that fits `length`, ordered by dilation."""
    heavy_taps = np.array(list(combinations(range(N_TAPS), 3)))
    largest_exponent = int((length - 1) // (N_TAPS - 1)).bit_length() - 1
    n_pairs = len(heavy_taps) * (largest_exponent + 1)
    if width < N_BIASES or width % N_BIASES or width > n_pairs * N_BIASES:
        raise UsageError(
            f"A width of {width} features is not possible for series of {length} steps. "
            f"Use a multiple of {N_BIASES} from {N_BIASES} to {n_pairs * N_BIASES}."
        )
    pairs = np.sort(rng.choice(n_pairs, width // N_BIASES, replace=False))
    exponents, shapes = np.divmod(pairs, len(heavy_taps))
    kernels = np.full((len(pairs), N_TAPS), -1, np.float32)
    np.put_along_axis(kernels, heavy_taps[shapes], 2, axis=1)
    return kernels, 2 ** exponents.astype(np.int64)


def _snapped_columns(series: NDArray[np.generic]) -> NDArray[np.float32]:
    """`series` (n, length) on the grid, transposed to (length, n) so that each step is one contiguous row."""
    snapped = np.multiply(series, 1 / GRID, dtype=np.float64)
    np.rint(snapped, out=snapped)
    return np.ascontiguousarray((snapped * GRID).T, np.float32)


def _convolve(steps: NDArray[np.float32], kernels: NDArray[np.float32], dilation: int) -> NDArray[np.float32]:
    """Convolutions (position, kernel, series) of `steps` (length, series): one small matrix product a position."""
    reach = (N_TAPS - 1) * dilation + 1
    windows = np.lib.stride_tricks.sliding_window_view(steps, reach, axis=0)[:, :, ::dilation]
    convolved: NDArray[np.float32] = np.matmul(kernels, windows.transpose(0, 2, 1))
    return convolved


def _positive_proportions(
    convolved: NDArray[np.float32], biases: NDArray[np.float32], features: NDArray[np.float32]
) -> None:
    """Fill `features` (series, kernel, bias) with the share of positions where `convolved` exceeds the bias."""
    n_positions = len(convolved)
    counter = np.min_scalar_type(n_positions)  # one byte up to 255 positions: counting runs at the speed of the cache
    above = np.empty(convolved.shape, np.bool_)
    for j in range(biases.shape[1]):
        np.greater(convolved, biases[:, j, None], out=above)
        counts = np.add.reduce(above.view(np.uint8), axis=0, dtype=counter)
        features[:, :, j] = (counts / np.float32(n_positions)).T
