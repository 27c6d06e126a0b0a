"""Sizes, counts and durations as people write and read them."""

import datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsclust_ooc.errors import UsageError
from tsclust_ooc.units import format_bytes, format_count, format_seconds, parse_bytes, plural


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("0", 0), ("7", 7), ("7B", 7), ("1000000", 10**6), ("1_000_000", 10**6), (42, 42),
        ("4GB", 4 * 10**9), ("4G", 4 * 10**9), ("4gb", 4 * 10**9), (" 4 GB ", 4 * 10**9), ("1.5TB", 15 * 10**11),
        ("4GiB", 4 * 2**30), ("512 MiB", 2**29), ("0.5kib", 512), ("2PiB", 2**51),
        ("1.35 GB", 1_350_000_000), ("9007199254740993", 2**53 + 1), ("0.07GB", 70_000_000),
    ],
)  # fmt: skip
def test_a_size_means_exactly_what_it_says(text, n_bytes):
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GB", "4XB", "4 iB", "-4GB", "4,5GB", "1e9", "4GB 2", "inf", "nan", ".5GB"])
def test_what_is_no_size_is_refused_with_the_text_and_examples(text):
    with pytest.raises(UsageError) as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)
    assert "4GB" in str(caught.value)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"), (7, "7 B"), (999, "999 B"), (1000, "1.00 kB"), (23_552, "23.6 kB"), (999_499, "999 kB"),
        (999_500, "1.00 MB"), (512e6, "512 MB"), (1_350_000_000, "1.35 GB"), (9_996_000_000, "10.0 GB"),
        (2.5e15, "2.50 PB"), (12_345e15, "12345 PB"),
    ],
)  # fmt: skip
def test_bytes_are_shown_with_three_digits_and_a_decimal_unit(n_bytes, text):
    assert format_bytes(n_bytes) == text


@given(st.integers(0, 10**18))
def test_a_shown_size_reads_back_to_the_digits_shown(n_bytes):
    text = format_bytes(n_bytes)
    shown = parse_bytes(text)
    unit = parse_bytes("1" + text.split()[1])
    step = Decimal(unit).scaleb(Decimal(text.split()[0]).as_tuple().exponent)
    assert abs(shown - n_bytes) <= step / 2 + 1
    assert format_bytes(shown) == text


@given(st.integers(0, 10**9))
def test_counts_have_thousands_separators_and_nothing_is_lost(n):
    text = format_count(n)
    assert int(text.replace(",", "")) == n
    assert all(len(group) == 3 for group in text.split(",")[1:])


@pytest.mark.parametrize(("seconds", "text"), [(0, "0.0 s"), (4.21, "4.2 s"), (59.94, "59.9 s"), (59.96, "0:01:00")])
def test_seconds_stay_seconds_under_a_minute(seconds, text):
    assert format_seconds(seconds) == text


@given(st.integers(60, 86_399))
def test_a_minute_and_more_is_shown_as_a_clock_would(seconds):
    assert format_seconds(seconds) == str(datetime.timedelta(seconds=seconds))


def test_days_are_shown_as_hours():
    assert format_seconds(100 * 3600 + 62) == "100:01:02"


@pytest.mark.parametrize(("n", "text"), [(0, "0 shards"), (1, "1 shard"), (2, "2 shards"), (34_369, "34,369 shards")])
def test_a_noun_is_counted(n, text):
    assert plural(n, "shard") == text
