"""The encoder: its features against a plain loop, its independence of blocks and threads, and what it refuses."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from tsclust_ooc.encoders import rocket
from tsclust_ooc.encoders.rocket import Rocket
from tsclust_ooc.errors import BadInput, UsageError


def walks(n: int, length: int = 96, seed: int = 0) -> NDArray[np.float64]:
    """Z-scored random walks (n, length), on the encoder's grid so that a loop over them needs no rounding."""
    series = np.random.default_rng(seed).standard_normal((n, length)).cumsum(axis=1)
    series = (series - series.mean(axis=1, keepdims=True)) / series.std(axis=1, keepdims=True)
    return np.round(series * 4096) / 4096


def looped_convolution(series: NDArray[np.float64], weights: NDArray[np.float32], dilation: int) -> list[float]:
    """The definition, one multiplication at a time."""
    n_positions = len(series) - 8 * dilation
    return [
        sum(float(weights[tap]) * float(series[start + tap * dilation]) for tap in range(9))
        for start in range(n_positions)
    ]


@pytest.mark.parametrize(("length", "width"), [(96, 96), (9, 32), (50, 64), (300, 32)])
def test_features_are_the_proportions_of_positive_values_of_a_plain_loop(length: int, width: int) -> None:
    series = walks(6, length)
    encoder = Rocket.fit(series, width=width, seed=3)
    features = encoder.encode(series)
    expected = []
    for row in series:
        for weights, dilation, biases in zip(encoder.kernels, encoder.dilations, encoder.biases, strict=True):
            convolved = looped_convolution(row, weights, int(dilation))
            expected += [sum(value > bias for value in convolved) / len(convolved) for bias in biases]
    assert features.shape == (6, width)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features.ravel(), expected, rtol=1e-7)


def test_biases_are_quantiles_of_the_training_convolutions() -> None:
    series = walks(20, 40)
    encoder = Rocket.fit(series, width=40, seed=1)
    for weights, dilation, biases in zip(encoder.kernels, encoder.dilations, encoder.biases, strict=True):
        values = np.concatenate([looped_convolution(row, weights, int(dilation)) for row in series])
        expected = np.quantile(values, np.arange(1, 16, 2) / 16, method="inverted_cdf")
        np.testing.assert_array_equal(biases, expected.astype(np.float32))


def test_kernels_are_distinct_ignore_the_level_and_fit_the_length() -> None:
    encoder = Rocket.fit(walks(30), width=768, seed=0)
    assert np.array_equal(np.sort(encoder.kernels, axis=1), np.tile([-1.0] * 6 + [2.0] * 3, (96, 1)))
    assert set(encoder.dilations.tolist()) <= {1, 2, 4, 8}
    assert len(np.unique(np.column_stack([encoder.dilations, encoder.kernels]), axis=0)) == 96
    np.testing.assert_array_equal(encoder.encode(walks(5) + 3.0), encoder.encode(walks(5)))


def test_features_do_not_depend_on_neighbours_blocks_or_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    series = np.random.default_rng(5).standard_normal((700, 96))
    encoder = Rocket.fit(series)
    with threadpool_limits(2):
        whole = encoder.encode(series)
    with threadpool_limits(1):
        alone = np.concatenate([encoder.encode(series[i : i + 1]) for i in range(0, 700, 50)])
    np.testing.assert_array_equal(alone, whole[::50])
    monkeypatch.setattr(rocket, "_BLOCK_BYTES", 100_000)
    np.testing.assert_array_equal(encoder.encode(series), whole)


def test_the_sum_of_a_product_is_exact_at_the_largest_value_allowed() -> None:
    series = np.random.default_rng(0).uniform(-256, 256, (40, 96))
    encoder = Rocket.fit(series, width=96)
    snapped = np.rint(series * 4096).astype(np.int64)
    for kernel, dilation in enumerate(encoder.dilations.tolist()):
        windows = np.lib.stride_tricks.sliding_window_view(snapped, 8 * dilation + 1, axis=1)[:, :, ::dilation]
        convolved = windows @ encoder.kernels[kernel].astype(np.int64)
        thresholds = (encoder.biases[kernel].astype(np.float64) * 4096).astype(np.int64)
        expected = (convolved[:, :, None] > thresholds).mean(axis=1)
        found = encoder.encode(series).reshape(40, 12, 8)[:, kernel]
        np.testing.assert_allclose(found, expected, rtol=1e-7)


def test_a_seed_decides_the_encoder() -> None:
    series = walks(50)
    first, again, other = (Rocket.fit(series, width=160, seed=seed).encode(series) for seed in (4, 4, 5))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_encoding_holds_a_few_mebibytes_beyond_its_result() -> None:
    series = np.random.default_rng(2).standard_normal((6000, 96)).astype(np.float32)
    encoder = Rocket.fit(series[:100])
    tracemalloc.start()
    features = encoder.encode(series)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes - features.nbytes < 10 * 2**20


def spoiled(value: float) -> NDArray[np.float64]:
    series = walks(4)
    series[2, 50] = value
    return series


@pytest.mark.parametrize(
    ("series", "message"),
    [
        (spoiled(np.nan), "Series 2 has values that are not finite"),
        (spoiled(np.inf), "Series 2 has values that are not finite"),
        (spoiled(-300.0), "Series 2 spans -300 to .* Z-score the series first"),
        (walks(4, 95), "Series of 95 steps do not fit this encoder, fitted on series of 96 steps"),
        (walks(4, 8), "Series of 8 steps are shorter than the 9 taps"),
        (walks(1)[0], r"Series of shape \(96,\)"),
        (np.empty((0, 96)), r"Series of shape \(0, 96\)"),
        (np.full((2, 96), "a"), "type <U1 cannot be encoded"),
    ],
)
def test_series_that_cannot_be_encoded_are_refused_by_name(series: NDArray[np.generic], message: str) -> None:
    encoder = Rocket.fit(walks(10), width=16)
    with pytest.raises(BadInput, match=message):
        encoder.encode(series)


@pytest.mark.parametrize("width", [0, -8, 100, 2696])
def test_a_width_that_kernels_cannot_give_is_refused_with_those_that_can(width: int) -> None:
    with pytest.raises(UsageError, match=rf"width of {width} features .* multiple of 8 from 8 to 2688"):
        Rocket.fit(walks(10), width=width)
