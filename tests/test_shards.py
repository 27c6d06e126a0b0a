"""The nouns of a source: the order of names, the split a folder names, the size of a sample."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest

from tsclust_ooc.shards.schema import Member, Schema, ShardError, natural_key
from tsclust_ooc.shards.splits import split_of

IN_ORDER = [
    "0.h5",
    "1.h5",
    "02.h5",
    "2.h5",
    "10.h5",
    "-rf.h5",
    "a\n1.h5",
    "a 2.h5",
    "a 10.h5",
    "b/0.h5",
    "b2/1.h5",
    "b2/9.h5",
    "b10/0.h5",
    os.fsdecode(b"c\xff1.h5"),
    os.fsdecode(b"c\xff12.h5"),
]


def in_order(paths):
    return sorted(paths, key=natural_key)


def test_numbers_in_names_count_as_numbers():
    assert in_order(f"{n}.h5" for n in (10, 2, 1, 0)) == ["0.h5", "1.h5", "2.h5", "10.h5"]


def test_every_kind_of_name_has_its_place_whatever_order_the_folder_gives():
    folders = [p for p in IN_ORDER if "/" in p]
    names = [p for p in IN_ORDER if "/" not in p]
    for seed in range(20):
        for wanted in (folders, names):
            shuffled = random.Random(seed).sample(wanted, len(wanted))
            assert in_order(shuffled) == wanted


def test_folders_are_compared_before_names():
    assert in_order(["a/10/1.h5", "a/2/30.h5", "a/2/4.h5"]) == ["a/2/4.h5", "a/2/30.h5", "a/10/1.h5"]


def test_equal_numbers_with_leading_zeros_keep_one_fixed_order():
    spellings = ["001.h5", "01.h5", "1.h5"]
    for seed in range(10):
        assert in_order(random.Random(seed).sample(spellings, 3)) == spellings


def test_the_order_is_that_of_the_numbers_for_any_numbers():
    rng = np.random.default_rng(0)
    numbers = sorted({int(n) for n in rng.integers(0, 10**12, 500)} | {0, 9, 10, 99, 100})
    assert in_order(f"{n}.h5" for n in reversed(numbers)) == [f"{n}.h5" for n in numbers]


def test_more_digits_than_python_converts_are_still_a_number():
    long = "9" * 5000
    assert in_order([f"1{long}", long, "5"]) == ["5", long, f"1{long}"]


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("0.h5", "all"),
        ("train.h5", "all"),
        ("train/0.h5", "train"),
        ("TRAIN/0.h5", "train"),
        ("val/0.h5", "val"),
        ("valid/0.h5", "val"),
        ("Validation/0.h5", "val"),
        ("test/0.h5", "test"),
        ("etth1/96/test/0.h5", "test"),
        ("test/fold1/0.h5", "test"),
        ("test/train/0.h5", "train"),
        ("training/0.h5", "all"),
        ("test-old/0.h5", "all"),
    ],
)
def test_the_innermost_folder_that_names_a_split_decides(path, split):
    assert split_of(path) == split


def test_sizes_are_those_of_numpy():
    schema = Schema("item-per-file", "embeddings", (7, 768), "<f4")
    assert schema.item_bytes == np.zeros((7, 768), "<f4").nbytes
    assert schema.dimension_names == ("sample", "variable", "feature")
    assert Schema("item-per-file", "x", (768,), "<f8").dimension_names == ("sample", "feature")
    assert Member("x", (2**40, 768), "<f4", -1, "", "").n_bytes == 2**40 * 768 * 4


def test_a_shard_error_carries_its_problem():
    problem = ShardError("dim", "sample shape (3,)", "a.h5").problem
    assert (problem.path, problem.code, problem.detail) == ("a.h5", "dim", "sample shape (3,)")
