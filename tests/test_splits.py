"""Splits told by folders or by an expression: plain names, one order, and what cannot be told is said."""

from __future__ import annotations

import re

import pytest

from tsclust_ooc.errors import UsageError
from tsclust_ooc.shards.schema import ShardError
from tsclust_ooc.shards.splits import EXAMPLE, split_of, split_order, splitter, suggested_pattern


def test_without_an_expression_folders_tell_the_split():
    assert splitter(None) is split_of
    assert [split_of(path) for path in ("a/Train/b/0.h5", "validation/0.h5", "train_0.h5")] == ["train", "val", "all"]


@pytest.mark.parametrize(
    ("pattern", "path", "split"),
    [
        (EXAMPLE, "run/train_12.h5", "train"),
        (r"(?P<split>train|valid)_", "valid_embeddings_chunk_3.h5", "val"),
        (r"(?P<split>[A-Za-z]+)\d*\.h5$", "x/VALIDATION7.h5", "val"),
        (r"(?P<split>fold-\d+)/", "fold-10/3.h5", "fold-10"),
        (r"^(?P<split>[^/]+)/", "Customer_A/train/0.h5", "Customer_A"),
        (r"(?P<split>all)", "all_1.h5", "all"),
    ],
)
def test_the_group_names_the_split(pattern, path, split):
    assert splitter(pattern)(path) == split
    assert re.search(pattern, path)["split"].lower().startswith(split.lower())


@pytest.mark.parametrize(
    ("pattern", "path", "words"),
    [
        (EXAMPLE, "dev_12.h5", "does not match"),
        (r"(?P<split>x)?y", "y.h5", "finds nothing"),
        (r"^(?P<split>.*)_", "a/b_1.h5", "finds 'a/b'"),
        (r"^(?P<split>.*)_", "_1.h5", "finds ''"),
        (r"^(?P<split>.*)_", "-rf_1.h5", "finds '-rf'"),
        (r"^(?P<split>.*)_", f"{'a' * 65}_1.h5", "wanted letters"),
        (r"^(?P<split>.*)_", "\u00e9_1.h5", r"'\xe9'"),
        (r"^(?P<split>\w+\n?)_", "a\n_1.h5", "finds"),
    ],
)
def test_a_path_that_tells_no_plain_name_is_a_problem(pattern, path, words):
    with pytest.raises(ShardError) as caught:
        splitter(pattern)(path)
    assert caught.value.problem.code == "split"
    assert words in caught.value.problem.detail
    assert pattern in caught.value.problem.detail


@pytest.mark.parametrize("pattern", ["(?P<split>train", "(train|val)", "", "(?P<set>train)", "*"])
def test_what_is_no_expression_with_the_group_is_refused_with_an_example(pattern):
    with pytest.raises(UsageError, match=re.escape(EXAMPLE)):
        splitter(pattern)


def test_train_val_test_come_first_and_all_comes_last():
    names = ["all", "b", "test", "A", "val", "fold-2", "train", "fold-10"]
    assert sorted(names, key=split_order) == ["train", "val", "test", "A", "b", "fold-10", "fold-2", "all"]


@pytest.mark.parametrize(
    ("paths", "splits"),
    [
        (["train_0.h5", "train_1.h5", "val_0.h5"], ["train", "train", "val"]),
        (["run/test_0.h5", "run/validation_1.h5"], ["test", "val"]),
        (["train_embeddings_chunk_0.h5", "valid_embeddings_chunk_0.h5"], ["train", "val"]),
        (["my_train_set/ETT_train.h5", "my_train_set/ETT_val.h5"], ["train", "val"]),
        (["Train-1.h5", "Test-1.h5"], ["train", "test"]),
        (["0_train.h5", "0_val.h5", "1_val.h5"], ["train", "val", "val"]),
    ],
)
def test_an_expression_is_suggested_that_tells_the_splits_in_names(paths, splits):
    pattern = suggested_pattern(paths)
    assert list(map(splitter(pattern), paths)) == splits


@pytest.mark.parametrize(
    "paths",
    [
        ["0.h5", "1.h5"],
        ["train_0.h5", "train_1.h5"],  # one split: nothing to tell apart
        ["train_0.h5", "other_1.h5", "val_1.h5"],
        ["training_0.h5", "values_0.h5", "tested_1.h5"],  # words that only begin like splits
        [],
    ],
)
def test_nothing_is_suggested_where_names_do_not_all_tell(paths):
    assert suggested_pattern(paths) is None
