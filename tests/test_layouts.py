"""How datasets map to samples, told from structures alone: the guess, its reason, and what does not fit."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tsclust_ooc.errors import BadInput, UsageError
from tsclust_ooc.shards import layouts
from tsclust_ooc.shards.schema import Member, Schema, ShardError, Structure


def member(name, shape, dtype="<f4", code="", ids=""):
    return Member(name, shape, dtype, -1, code, code, ids)


def named(name, n, kind="text"):
    """A dataset of `n` strings or integers."""
    return member(name, (n,), "", "dtype", kind)


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
        ([(5, {"embeddings": (1, 1, 7, 768)})], "item-per-file", (7, 768), "(1, 1, 7, 768) has one row"),
        ([(5, {"embeddings": (768, 12, 1, 1)})], "item-per-file", (12, 768), "(768, 12, 1, 1) has 4 axes"),
        ([(5, {"x": (1, 1, 7, 768)}), (6, {"x": (7, 768)})], "item-per-file", (7, 768), "alike but for axes of one"),
        ([(5, {"x": (768,)}), (6, {"x": (1, 768)})], "item-per-file", (768,), "alike but for axes of one"),
        ([(1000, {"embeddings": (96, 64)})], "item-per-file", (96, 64), "1,000 shards of only 96 rows"),
        ([(2, {"embeddings": (96, 64)})], "rows-per-file", (64,), "96 rows"),
        ([(3, {"embeddings": (5000, 768)})], "rows-per-file", (768,), "--layout item-per-file if"),
        ([(9, {"embeddings": (40, 7, 768)})], "rows-per-file", (7, 768), "(sample, variable, feature)"),
        ([(9, {"embedding": (1, 1, 768)})], "item-per-file", (768,), "(1, 1, 768) without its axes of one is (768,)"),
        ([(9, {"embedding": (768, 12, 1)})], "item-per-file", (12, 768), "768 is a usual number of features"),
        ([(9, {"embedding": (40, 7, 1)})], "rows-per-file", (7, 1), "(sample, variable, feature)"),
        ([(4, {"embeddings": (768, 7)})], "item-per-file", (7, 768), "768 is a usual number of features"),
        ([(4, {"embeddings": (768, 1)})], "item-per-file", (768,), "768 is a usual number of features"),
        ([(3, {"embeddings": (768, 7)})], "rows-per-file", (7,), "768 rows"),
        ([(9, {"x": (1024, 16)}), (1, {"x": (500, 16)})], "rows-per-file", (16,), "1,024 rows"),
        ([(1, {"features": (n, 1024)}) for n in (812, 90, 3, 1)], "rows-per-file", (1024,), "first axes differ"),
        ([(8, {"features": (1, 16)}), (1, {"features": (2, 16)})], "rows-per-file", (16,), "more in others"),
    ],
)
def test_the_guess_and_its_reason(files, layout, item, words):
    guess = layouts.guess(source(*files))
    assert (guess.schema.layout, guess.schema.item_shape) == (layout, item)
    assert words in guess.reason


@pytest.mark.parametrize("shape", [(5,), (5, 6), (5, 6, 7), (1, 1, 5, 6), (5, 6, 1, 1), (1,) * 32, (1, 0, 6)])
def test_shapes_that_may_hold_samples_are_let_through(shape):
    layouts.check_axes(shape)


@pytest.mark.parametrize("shape", [(), (2, 3, 5, 6), (1, 2, 5, 6), (2, 1, 5, 6), (5, 1, 6, 1)])
def test_shapes_that_hold_no_samples_are_named(shape):
    with pytest.raises(ShardError, match=r"scalar|axes \(") as caught:
        layouts.check_axes(shape)
    assert caught.value.problem.code == "shape"


@pytest.mark.parametrize("odd", [(5, 768), (7, 500), (768, 7), (768,), (2, 7, 768)])
def test_one_odd_shard_among_many_does_not_turn_variables_into_samples(odd):
    guess = layouts.guess(source((999, {"embeddings": (7, 768)}), (1, {"embeddings": odd})))
    assert guess.schema == Schema("item-per-file", "embeddings", (7, 768), "<f4")
    assert "999 of 1,000 alike" in guess.reason


@pytest.mark.parametrize(
    ("stored", "item", "words"),
    [
        ((7, 768), (7, 768), None),
        ((321, 768), (321, 768), None),
        ((3, 16), (3, 16), None),
        ((768, 7), (7, 768), "features are the first axis of (768, 7), the longer: samples become (7, 768)"),
        ((768, 321), (321, 768), "features are the first axis of (768, 321)"),
        ((48, 5), (5, 48), "features are the first axis of (48, 5)"),
        ((862, 768), (862, 768), "taken to be the last axis of (862, 768) (--feature-axis first"),
        ((768, 862), (768, 862), "taken to be the last axis of (768, 862) (--feature-axis first"),
        ((96, 64), (96, 64), "taken to be the last axis of (96, 64)"),
        ((768, 768), (768, 768), None),
    ],
)
def test_the_feature_is_the_clearly_longer_axis_and_doubt_is_said(stored, item, words):
    guess = layouts.guess(source((9, {"x": stored})), "item-per-file")
    assert guess.schema.item_shape == item
    assert guess.schema.stored_shape == stored
    assert guess.schema.feature_axis == ("last" if item == stored else "first")
    assert (words in guess.reason) if words else ("axis" not in guess.reason)


@pytest.mark.parametrize("axis", ["first", "last"])
@pytest.mark.parametrize("stored", [(7, 768), (768, 7), (768,)])
def test_the_feature_axis_can_be_told(axis, stored):
    guess = layouts.guess(source((9, {"x": stored})), "item-per-file", feature_axis=axis)
    turned = axis == "first" and len(stored) == 2
    assert guess.schema.item_shape == (stored[::-1] if turned else stored)
    assert guess.schema.feature_axis == ("first" if turned else "last")


def test_samples_of_rows_and_of_datasets_are_turned_too():
    rows = layouts.guess(source((9, {"x": (40, 768, 7)})))
    assert (rows.schema.layout, rows.schema.item_shape) == ("rows-per-file", (7, 768))
    items = layouts.guess(source((2, {"a": (768, 7), "b": (768, 7)})))
    assert items.schema == Schema("dataset-per-item", "", (7, 768), "<f4", "first")


@pytest.mark.parametrize("shape", [(3, 16), (5, 2, 16), (1, 4, 1)])
def test_turning_samples_in_place_is_numpys_transpose(shape):
    schema = Schema("item-per-file", "x", shape[:-3:-1], "<f4", "first")
    stored = np.arange(np.prod(shape), dtype="<f4").reshape(-1, *shape[-2:])
    turned = stored.copy()
    layouts.turn(schema, turned.data.cast("B"))
    assert turned.tobytes() == np.ascontiguousarray(stored.swapaxes(1, 2)).tobytes()


def with_ids(*datasets, n_rows=(812, 90)):
    """Files of rows, each with a copy of `datasets` (name, kind, difference of its length)."""
    return source(*[
        (1, {"features": (n, 1024), **{name: named(name, n + more, kind) for name, kind, more in datasets}})
        for n in n_rows
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("customer_ids", "text"),
        ("id", "integer"),
        ("sampleId", "text"),
        ("meta/uuid", "text"),
        ("CUSTOMER_IDS", "text"),
    ],
)
def test_the_only_dataset_of_ids_names_the_rows(name, kind):
    guess = layouts.guess(with_ids((name, kind, 0), ("label", "integer", 0)))
    assert guess.schema.ids == name
    assert f"{name!r} names the samples" in guess.reason


@pytest.mark.parametrize(
    ("datasets", "words"),
    [
        ([("valid", "integer", 0)], None),
        ([("width", "integer", 0)], None),
        ([("label", "text", 0)], None),
        ([("ids", "text", 1)], None),
        (
            [("ids", "text", 0), ("customer_id", "text", 0)],
            "which of 'customer_id', 'ids' names the samples is not clear",
        ),
    ],
)
def test_what_may_not_be_ids_names_nothing(datasets, words):
    guess = layouts.guess(with_ids(*datasets))
    assert guess.schema.ids == ""
    assert (words in guess.reason) if words else ("names" not in guess.reason)


def test_ids_that_some_shards_lack_name_nothing_unless_told():
    files = with_ids(("ids", "text", 0)) + source((1, {"features": (40, 1024)}))
    assert layouts.guess(files).schema.ids == ""
    assert "not every shard has 'ids'" in layouts.guess(files).reason
    assert layouts.guess(files, ids="ids").schema.ids == "ids"
    assert layouts.guess(files, ids="").reason == layouts.guess(with_ids(), ids="").reason


def test_empty_shards_need_no_ids():
    files = with_ids(("ids", "text", 0)) + source((3, {"features": (0, 1024)}))
    assert layouts.guess(files).schema.ids == "ids"


def test_ids_told_where_a_shard_is_one_sample_are_refused():
    with pytest.raises(UsageError, match="--ids names is about files of many samples"):
        layouts.guess(source((9, {"x": (7, 768)})), ids="names")
    assert layouts.guess(source((9, {"x": (7, 768)})), ids="").schema.ids == ""


NAMED = Schema("rows-per-file", "x", (16,), "<f4", ids="ids")


@pytest.mark.parametrize(
    ("beside", "code", "words"),
    [
        ([], "key-missing", "no dataset 'ids'"),
        ([named("ids", 4)], "shape", r"'ids' has shape \(4,\); 5 samples need \(5,\) names"),
        ([member("ids", (5,))], "dtype", "<f4; names of samples are strings or integers"),
        ([member("ids", (5,), "", "unallocated")], "unallocated", "names of samples 'ids': unallocated"),
    ],
)
def test_a_file_whose_rows_are_not_all_named_has_its_code(beside, code, words):
    with pytest.raises(ShardError, match=words) as caught:
        layouts.n_samples(NAMED, Structure((member("x", (5, 16)), *beside), ()))
    assert caught.value.problem.code == code
    assert layouts.n_samples(NAMED, Structure((member("x", (0, 16)), *beside), ())) == 0


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


TURNED = Schema("item-per-file", "x", (3, 16), "<f4", "first")
ROWS = Schema("rows-per-file", "x", (16,), "<f4")
ITEMS = Schema("item-per-file", "x", (3, 16), "<f4")


@pytest.mark.parametrize(
    ("schema", "shape", "n"),
    [
        (ROWS, (5, 16), 5),
        (ROWS, (0, 16), 0),
        (ROWS, (0, 99), 0),
        (ITEMS, (3, 16), 1),
        (ITEMS, (1, 3, 16), 1),
        (ITEMS, (3, 16, 1), 1),
        (TURNED, (16, 3), 1),
        (TURNED, (1, 16, 3), 1),
    ],
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
        (TURNED, member("x", (3, 16)), "dim"),
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
