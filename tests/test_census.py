"""Distributions, odd shards and gaps in numbering."""

import numpy as np
import pytest

from tsclust_ooc.census import Gaps, distribution, gaps, kinds
from tsclust_ooc.shards.schema import Problem, Schema, Shard


def shards_of(sizes):
    return [Shard(f"{i}.h5", "all", size, 0, 1) for i, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("paths", "missing"),
    [
        (["0.h5", "1.h5", "3.h5", "5.h5"], ["2.h5", "4.h5"]),
        (["train/0.h5", "train/2.h5"], ["1.h5"]),
        (["a/0.h5", "a/2.h5", "b/5.h5", "b/7.h5"], ["a/1.h5", "b/6.h5"]),
        (["train_008.h5", "train_009.h5", "train_011.h5"], ["train_010.h5"]),
        (["x1_0.h5", "x1_2.h5", "x2_0.h5", "x2_1.h5"], ["x1_1.h5"]),
        (["9.h5", "11.h5"], ["10.h5"]),
        (["0.h5", "1.h5", "9.h5"], []),  # more holes than numbers: no count
        (["a.h5", "b.h5"], []),
        (["7.h5"], []),
        ([f"{'9' * 5000}.h5", f"{'9' * 4999}7.h5"], []),
        ([], []),
    ],
)
def test_gaps_are_the_numbers_between_the_least_and_the_largest_that_no_shard_has(paths, missing):
    assert gaps(paths) == Gaps(len(missing), tuple(missing))


def test_of_many_gaps_ten_are_named_and_all_are_counted():
    found = gaps(f"{2 * i}.h5" for i in range(40))
    assert found == Gaps(39, tuple(f"{2 * i + 1}.h5" for i in range(10)))


def test_a_distribution_has_the_quantiles_of_numpy_and_names_the_odd_shards():
    sizes = [100] * 57 + [90, 400, 400]
    found = distribution(shards_of(sizes), lambda shard: shard.size)
    assert (found.least, found.median, found.most) == (90, np.median(sizes), 400)
    assert (found.n_distinct, found.common) == (3, ((100, 57), (400, 2), (90, 1)))
    assert (found.n_odd, found.odd) == (3, ("57.h5", "58.h5", "59.h5"))


def test_where_sizes_are_mixed_no_shard_is_odd():
    found = distribution(shards_of([100, 100, 90, 80]), lambda shard: shard.size)
    assert (found.n_odd, found.odd) == (0, ())
    assert distribution(shards_of([7]), lambda shard: shard.size).n_distinct == 1


def test_kinds_name_the_shape_that_fits_and_group_those_that_do_not():
    problems = [
        Problem("a.h5", "dim", "sample shape (5, 16), most shards have (3, 16)"),
        Problem("b.h5", "truncated", "12 of 20 bytes"),
        Problem("c.h5", "dim", "sample shape (5, 16), most shards have (3, 16)"),
        Problem("d.h5", "dtype", "<f8, most shards have <f4"),
    ]
    found = kinds(Schema("item-per-file", "x", (3, 16), "<f4"), shards_of([1, 1]), problems)
    assert [(k.value, k.n_shards, k.first) for k in found] == [
        ("(3, 16) float32", 2, ("0.h5", "1.h5")),
        ("sample shape (5, 16)", 2, ("a.h5", "c.h5")),
        ("<f8", 1, ("d.h5",)),
    ]
