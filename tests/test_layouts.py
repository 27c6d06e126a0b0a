"""How datasets map to samples, told from structures alone: the guess, its reason, and what does not fit."""

from __future__ import annotations

from collections import Counter

import pytest

from tsclust_ooc.errors import BadInput, UsageError
from tsclust_ooc.shards import layouts
from tsclust_ooc.shards.schema import Member, Schema, ShardError, Structure


def member(name, shape, dtype="<f4", code=""):
    return Member(name, shape, dtype, -1, code, code)


def source(*files):
    """A Counter of structures; a file is (how many, {key: shape or Member})."""
    return Counter({
        Structure(tuple(m if isinstance(m, Member) else member(key, m) for key, m in keys.items()), ()): n
        for n, keys in files
    })  # fmt: skip


@pytest.mark.parametrize(
    ("files", "layout", "item", "words"),
    [
        ([(34_369, {"embeddings": (7, 768)})], "item-per-file", (7, 768), "7 rows are too few"),
        ([(5, {"embeddings": (1, 7, 768)})], "item-per-file", (7, 768), "has one row"),
        ([(5, {"embeddings": (1, 768)})], "item-per-file", (768,), "has one row"),
        ([(5, {"embeddings": (768,)})], "item-per-file", (768,), "one vector a shard"),
        ([(1000, {"embeddings": (96, 64)})], "item-per-file", (96, 64), "1,000 shards of only 96 rows"),
        ([(2, {"embeddings": (96, 64)})], "rows-per-file", (64,), "96 rows"),
        ([(3, {"embeddings": (5000, 768)})], "rows-per-file", (768,), "--layout item-per-file if"),
        ([(9, {"embeddings": (40, 7, 768)})], "rows-per-file", (7, 768), "(sample, variable, feature)"),
        ([(1, {"features": (n, 1024)}) for n in (812, 90, 3, 1)], "rows-per-file", (1024,), "first axes differ"),
        ([(8, {"features": (1, 16)}), (1, {"features": (2, 16)})], "rows-per-file", (16,), "more in others"),
    ],
)
def test_the_guess_and_its_reason(files, layout, item, words):
    guess = layouts.guess(source(*files))
    assert (guess.schema.layout, guess.schema.item_shape) == (layout, item)
    assert words in guess.reason


@pytest.mark.parametrize("odd", [(5, 768), (7, 500), (768, 7), (768,), (2, 7, 768)])
def test_one_odd_shard_among_many_does_not_turn_variables_into_samples(odd):
    guess = layouts.guess(source((999, {"embeddings": (7, 768)}), (1, {"embeddings": odd})))
    assert guess.schema == Schema("item-per-file", "embeddings", (7, 768), "<f4")
    assert "999 of 1,000 alike" in guess.reason


def test_empty_shards_do_not_vote():
    guess = layouts.guess(source((9, {"x": (0, 16)}), (1, {"x": (3, 16)}), (1, {"x": (4, 16)})))
    assert guess.schema == Schema("rows-per-file", "x", (16,), "<f4")


def test_layout_and_key_can_be_told():
    files = source((9, {"embeddings": (7, 768), "mine": (40, 12)}))
    assert layouts.guess(files, "rows-per-file").schema == Schema("rows-per-file", "embeddings", (768,), "<f4")
    assert layouts.guess(files, "item-per-file", "mine").schema == Schema("item-per-file", "mine", (40, 12), "<f4")
    assert layouts.guess(files, "rows-per-file").reason == "--layout rows-per-file"


def test_an_unknown_layout_is_a_usage_error_that_lists_the_known():
    with pytest.raises(UsageError, match="item-per-file, rows-per-file, dataset-per-item"):
        layouts.guess(source((1, {"x": (7, 8)})), "columns")


def test_a_key_that_is_not_there_is_named_with_what_is():
    with pytest.raises(BadInput, match=r"'vectors'.*'x' \(7, 8\) <f4.*--key"):
        layouts.guess(source((1, {"x": (7, 8)})), key="vectors")


@pytest.mark.parametrize("beside", [member("ids", (7,), "", "dtype"), member("coords", (812, 2), "<f4")])
def test_a_usual_name_is_the_key_whatever_lies_beside_it(beside):
    files = source((1, {"features": (812, 1024), "b": beside}), (1, {"features": (90, 1024), "b": beside}))
    assert layouts.guess(files).schema.key == "features"


def test_the_only_float_dataset_is_the_key():
    files = source((3, {"ids": member("ids", (5,), "", "dtype"), "rep": member("rep", (7, 8))}))
    assert layouts.guess(files).schema.key == "rep"


def test_a_key_that_few_shards_have_is_not_the_key():
    assert layouts.guess(source((999, {"rep": (7, 8)}), (1, {"data": (7, 8)}))).schema.key == "rep"


def test_several_possible_keys_are_named_and_asked_for():
    with pytest.raises(BadInput, match=r"'left' \(7, 8\) <f4, 'right' \(7, 9\) <f4.*--key NAME"):
        layouts.guess(source((3, {"left": (7, 8), "right": (7, 9)})))


def test_nothing_to_read_is_said_with_what_was_found():
    with pytest.raises(BadInput, match=r"'ids' \(5,\) dtype"):
        layouts.guess(source((3, {"ids": member("ids", (5,), "", "dtype")})))


def test_many_datasets_of_one_shape_are_samples():
    files = source((2, {"s|1": (7, 8), "s|2": (7, 8)}), (1, {"s|3": (7, 8), "g/4": (7, 8)}))
    guess = layouts.guess(files)
    assert guess.schema == Schema("dataset-per-item", "", (7, 8), "<f4")
    assert "every dataset is one sample (6 of shape (7, 8))" in guess.reason


def test_datasets_that_cannot_be_samples_are_bad_input_not_a_crash():
    with pytest.raises(BadInput, match=r"'s1' \(2, 3, 4\)"):
        layouts.guess(source((2, {"s1": (2, 3, 4), "s2": (2, 3, 4)})))


ROWS = Schema("rows-per-file", "x", (16,), "<f4")
ITEMS = Schema("item-per-file", "x", (3, 16), "<f4")


@pytest.mark.parametrize(
    ("schema", "shape", "n"),
    [(ROWS, (5, 16), 5), (ROWS, (0, 16), 0), (ROWS, (0, 99), 0), (ITEMS, (3, 16), 1), (ITEMS, (1, 3, 16), 1)],
)
def test_samples_in_a_file_are_counted(schema, shape, n):
    assert layouts.n_samples(schema, Structure((member("x", shape),), ())) == n


@pytest.mark.parametrize(
    ("schema", "found", "code"),
    [
        (ROWS, member("x", (5, 12)), "dim"),
        (ROWS, member("x", (5,)), "shape"),
        (ITEMS, member("x", (3, 12)), "dim"),
        (ITEMS, member("x", (16, 3)), "dim"),
        (ITEMS, member("x", (16,)), "shape"),
        (ITEMS, member("x", (0, 16)), "shape"),
        (ITEMS, member("x", (2, 3, 16)), "shape"),
        (ITEMS, member("x", (3, 16), "<f8"), "dtype"),
        (ITEMS, member("x", (3, 16), "", "soft-link"), "soft-link"),
        (ITEMS, member("y", (3, 16)), "key-missing"),
        (ITEMS, member("x/y", (3, 16)), "not-a-dataset"),
    ],
)
def test_what_does_not_fit_has_its_code(schema, found, code):
    with pytest.raises(ShardError) as caught:
        layouts.n_samples(schema, Structure((found,), ()))
    assert caught.value.problem.code == code


def test_big_endian_fits_as_its_values_do():
    assert layouts.n_samples(ITEMS, Structure((member("x", (3, 16), ">f4"),), ())) == 1


def test_datasets_are_samples_in_natural_order():
    names = ("g/10", "g/2", "a|1", "z")
    schema = Schema("dataset-per-item", "", (3, 16), "<f4")
    found = layouts.samples_in(schema, Structure(tuple(member(name, (3, 16)) for name in names), ()))
    assert [m.name for m in found if "/" in m.name] == ["g/2", "g/10"]
    assert {m.name for m in found} == set(names)
    with pytest.raises(ShardError, match="key-missing"):
        layouts.samples_in(schema, Structure((), ()))
