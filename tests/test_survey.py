"""The survey: every file that looks like a shard is a shard or a problem, in order, with the schema most agree on."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from sources import (
    ITEM,
    KEY,
    contents,
    dataset_per_item,
    item_per_file,
    rows_per_file,
    three_splits,
    values,
    write_shard,
)

from tsclust_ooc.errors import BadInput
from tsclust_ooc.shards.listing import list_shards
from tsclust_ooc.shards.parsers import Parsers
from tsclust_ooc.shards.schema import Problem, Schema, Wanted
from tsclust_ooc.shards.survey import survey


@pytest.fixture(scope="module")
def look():
    with Parsers(2) as parsers:
        yield lambda source, **options: survey(source, parsers, **options)


def codes(found) -> dict[str, str]:
    return {p.path: p.code for p in found.problems}


def paths(found) -> list[str]:
    return [s.path for s in found.shards]


@pytest.mark.parametrize(("stored", "item"), [((7, 768), (7, 768)), ((1, 7, 768), (7, 768)), ((1, 768), (768,))])
def test_a_timekd_source_is_one_sample_a_shard(tmp_path, look, stored, item):
    for i, sample in enumerate(values(12, stored)):
        write_shard(tmp_path / "train" / f"{i}.h5", sample)
    found = look(tmp_path)
    assert found.schema == Schema("item-per-file", KEY, item, "<f4")
    assert paths(found) == [f"train/{i}.h5" for i in range(12)]
    assert (found.n_samples, found.problems, found.notes) == (12, (), ())
    assert found.n_bytes == sum(p.stat().st_size for p in tmp_path.rglob("*.h5"))
    assert len(found.templates) == 1


def test_a_clam_source_is_many_samples_a_shard_and_empty_ones_count_none(tmp_path, look):
    counts = (5, 0, 70, 1, 30)
    rows_per_file(tmp_path, counts)
    for path in tmp_path.glob("*.h5"):
        with h5py.File(path, "a") as file:
            file["coords"] = np.zeros((3, 2), "i8")
    found = look(tmp_path)
    assert found.schema == Schema("rows-per-file", "features", (16,), "<f4")
    assert [s.n_samples for s in found.shards] == list(counts)
    assert found.problems == ()


def test_ids_beside_the_vectors_do_not_matter(tmp_path, look):
    for i, sample in enumerate(values(6)):
        write_shard(tmp_path / f"{i}.h5", sample)
        with h5py.File(tmp_path / f"{i}.h5", "a") as file:
            file["ids"] = [f"window {i} {j}" for j in range(i + 1)]
    found = look(tmp_path)
    assert found.schema == Schema("item-per-file", KEY, ITEM, "<f4")
    assert len(found.shards) == 6


def test_datasets_that_are_samples_may_have_any_name_and_nest(tmp_path, look):
    dataset_per_item(tmp_path, {"a.h5": ["s|1", "s|2", "s|10"], "b.h5": ["a/b", "a/c"], "c.h5": ["only"]})
    found = look(tmp_path)
    assert found.schema == Schema("dataset-per-item", "", ITEM, "<f4")
    assert [s.n_samples for s in found.shards] == [3, 2, 1]


def test_two_possible_keys_are_named_not_chosen(tmp_path, look):
    with h5py.File(tmp_path / "0.h5", "w") as file:
        file["left"], file["right"] = values(1, (3, 16))[0], values(1, (3, 17))[0]
    with pytest.raises(BadInput, match=r"'left'.*'right'.*--key"):
        look(tmp_path)
    assert look(tmp_path, wanted=Wanted(key="right")).schema.item_shape == (3, 17)
    assert look(tmp_path, wanted=Wanted(key="left", layout="rows-per-file")).n_samples == 3


def test_splits_come_from_folders_in_one_order_whatever_their_spelling(tmp_path, look):
    for folder in ("TEST", "Validation", "train/a", "zz"):
        item_per_file(tmp_path / folder, 2)
    found = look(tmp_path)
    assert {name: len(shards) for name, shards in found.splits().items()} == {"train": 2, "val": 2, "test": 2, "all": 2}
    assert list(found.splits()) == ["train", "val", "test", "all"]
    assert "2 shards outside the split folders" in found.notes[0]


def test_rows_come_in_natural_order(tmp_path, look):
    for name in ("10.h5", "2.h5", "1.h5", "02.h5", "b/3.h5", "a 7.h5", "-rf.h5", "new\nline 1.h5"):
        write_shard(tmp_path / "train" / name, values(1)[0])
    names = [p.removeprefix("train/") for p in paths(look(tmp_path))]
    assert [n for n in names if n[0].isdecimal()] == ["1.h5", "02.h5", "2.h5", "10.h5"]
    assert set(names) == {"10.h5", "2.h5", "1.h5", "02.h5", "b/3.h5", "a 7.h5", "-rf.h5", "new\nline 1.h5"}


def test_a_name_that_is_not_utf8_is_a_shard(tmp_path, look):
    item_per_file(tmp_path, 3)
    os.rename(tmp_path / "2.h5", os.fsencode(tmp_path) + b"/2\xff.h5")
    assert paths(look(tmp_path)) == ["0.h5", "1.h5", os.fsdecode(b"2\xff.h5")]


def test_other_files_are_counted_and_hidden_ones_are_not(tmp_path, look):
    item_per_file(tmp_path, 3)
    for name in ("README.md", "notes.txt", ".hidden.h5", ".DS_Store"):
        (tmp_path / name).write_text("x")
    write_shard(tmp_path / ".cache" / "9.h5", values(1)[0])
    found = look(tmp_path)
    assert (len(found.shards), found.n_other, found.problems) == (3, 2, ())


def test_other_suffixes_are_shards_too(tmp_path, look):
    for name in ("0.h5", "1.hdf5", "2.HE5"):
        write_shard(tmp_path / name, values(1)[0])
    assert len(look(tmp_path).shards) == 3


def test_a_linked_folder_is_followed_and_a_loop_ends(tmp_path, look):
    item_per_file(tmp_path / "elsewhere", 3)
    source = tmp_path / "source"
    (source / "val").mkdir(parents=True)
    (source / "train").symlink_to(tmp_path / "elsewhere")
    (source / "val" / "up").symlink_to(source)
    found = look(source)
    assert paths(found) == ["train/0.h5", "train/1.h5", "train/2.h5"]
    assert found.problems == ()


def test_a_link_to_itself_is_one_problem_and_its_neighbours_stay(tmp_path, look):
    item_per_file(tmp_path / "train", 5)
    (tmp_path / "train" / "9.h5").symlink_to("9.h5")
    (tmp_path / "train" / "8.h5").symlink_to("gone.h5")
    found = look(tmp_path)
    assert codes(found) == {"train/8.h5": "unreadable", "train/9.h5": "unreadable"}
    assert len(found.shards) == 5


def test_the_same_file_twice_is_a_duplicate(tmp_path, look):
    item_per_file(tmp_path, 3)
    os.link(tmp_path / "0.h5", tmp_path / "copy.h5")
    (tmp_path / "link.h5").symlink_to("1.h5")
    found = look(tmp_path)
    assert codes(found) == {"copy.h5": "duplicate", "link.h5": "duplicate"}
    assert "the same file as 0.h5" in found.problems[0].detail


def test_a_single_file_is_a_source(tmp_path, look):
    rows_per_file(tmp_path, (30,))
    found = look(tmp_path / "slide_0.h5", wanted=Wanted(layout="rows-per-file"))
    assert (found.source, paths(found), found.n_samples) == (str(tmp_path), ["slide_0.h5"], 30)


def test_every_file_is_a_shard_or_a_problem_and_every_problem_has_its_code(tmp_path, look):
    item_per_file(tmp_path, 20)
    whole = (tmp_path / "0.h5").read_bytes()
    (tmp_path / "20.h5").write_bytes(whole[:-1])
    (tmp_path / "21.h5").write_bytes(b"")
    write_shard(tmp_path / "22.h5", values(1, (3, 12))[0])
    write_shard(tmp_path / "23.h5", values(1)[0], key="other")
    (tmp_path / "24.h5").mkdir()
    os.mkfifo(tmp_path / "25.h5")
    write_shard(tmp_path / "26.h5", values(1, dtype="f8")[0])
    found = look(tmp_path)
    assert codes(found) == {
        "20.h5": "truncated", "21.h5": "empty-file", "22.h5": "dim", "23.h5": "key-missing",
        "24.h5": "not-regular", "25.h5": "not-regular", "26.h5": "dtype",
    }  # fmt: skip
    assert paths(found) == [f"{i}.h5" for i in range(20)]


def test_a_tail_after_the_data_is_a_note_not_a_problem(tmp_path, look):
    item_per_file(tmp_path, 5)
    with (tmp_path / "3.h5").open("ab") as file:
        file.write(b"tail")
    found = look(tmp_path)
    assert len(found.shards) == 5
    assert found.notes == ("1 shard: 4 bytes after the end of the HDF5 data",)


def test_notes_count_all_shards_of_every_structure(tmp_path, look):
    for i, sample in enumerate(values(6)):
        write_shard(tmp_path / f"{i}.h5", sample, **({"chunks": ITEM} if i % 2 else {}))
        if i > 1:
            with (tmp_path / f"{i}.h5").open("ab") as file:
                file.write(b"tail")
    assert look(tmp_path).notes == ("4 shards: 4 bytes after the end of the HDF5 data",)


def test_what_an_earlier_read_found_is_a_problem_until_the_file_changes(tmp_path, look):
    item_per_file(tmp_path, 4)
    stamp = (tmp_path / "2.h5").stat()
    problem = Problem("2.h5", "checksum", "found while reading")
    bad = {("2.h5", stamp.st_size, stamp.st_mtime_ns): problem}
    assert look(tmp_path, known_bad=lambda *key: bad.get(key)).problems == (problem,)
    os.utime(tmp_path / "2.h5", ns=(0, 0))
    assert look(tmp_path, known_bad=lambda *key: bad.get(key)).problems == ()


def test_a_source_without_shards_says_what_it_found(tmp_path, look):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(BadInput, match="found 1 other file"):
        look(tmp_path)
    with pytest.raises(BadInput, match="is not there"):
        look(tmp_path / "nowhere")


def test_a_source_of_bad_shards_alone_names_them(tmp_path, look):
    for i in range(3):
        (tmp_path / f"{i}.h5").write_bytes(b"")
    with pytest.raises(BadInput, match=r"none of its 3 shards.*0\.h5: empty-file"):
        look(tmp_path)


def test_a_source_whose_every_shard_fails_the_layout_names_them(tmp_path, look):
    for i in range(3):
        with h5py.File(tmp_path / f"{i}.h5", "w") as file:
            file["s|1"], file["ids"] = values(1)[0], np.arange(3)
    with pytest.raises(BadInput, match=r"none of its 3 shards.*0\.h5: dtype"):
        look(tmp_path, wanted=Wanted(layout="dataset-per-item"))


def test_the_survey_changes_nothing(tmp_path, look):
    three_splits(tmp_path, (5, 2, 2))
    before = contents(tmp_path), {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    look(tmp_path)
    assert (contents(tmp_path), {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}) == before


def test_most_shards_never_reach_a_parser(tmp_path):
    item_per_file(tmp_path, 300)
    asked = []

    class Counting(Parsers):
        def probe(self, path: str, *, learn: bool = False):
            asked.append(Path(path).name)
            return super().probe(path, learn=learn)

    with Counting(1) as parsers:
        assert len(survey(tmp_path, parsers).shards) == 300
    assert asked == ["0.h5"]


def test_files_of_several_programs_are_each_read_as_they_lie(tmp_path, look):
    samples = values(30)
    for i, sample in enumerate(samples):
        options = [{}, {"chunks": ITEM, "compression": "gzip"}, {"chunks": (1, 16)}][i % 3]
        write_shard(tmp_path / f"{i}.h5", sample.astype(">f4") if i % 2 else sample, **options)
    found = look(tmp_path)
    assert (len(found.shards), found.problems) == (30, ())
    assert found.schema.dtype == "<f4"


def test_an_expression_tells_the_split_and_what_it_does_not_match_is_a_problem(tmp_path, look):
    for name in ("valid_0.h5", "train_10.h5", "train_9.h5", "fold2_0.h5", "fold10_0.h5", "all_0.h5", "0.h5"):
        write_shard(tmp_path / "test" / name, values(1)[0])
    found = look(tmp_path, wanted=Wanted(split_pattern=r"(?P<split>[a-z0-9]+)_\d"))
    assert {name: [s.path.rpartition("/")[2] for s in shards] for name, shards in found.splits().items()} == {
        "train": ["train_9.h5", "train_10.h5"], "val": ["valid_0.h5"],
        "fold10": ["fold10_0.h5"], "fold2": ["fold2_0.h5"], "all": ["all_0.h5"],
    }  # fmt: skip
    assert list(found.splits()) == ["train", "val", "fold10", "fold2", "all"]
    assert codes(found) == {"test/0.h5": "split"}


def test_where_no_shard_is_in_a_split_the_expression_is_named(tmp_path, look):
    item_per_file(tmp_path, 3)
    with pytest.raises(BadInput, match=r"none of its 3 shards.*0\.h5: split \(its path does not match"):
        look(tmp_path, wanted=Wanted(split_pattern="(?P<split>train)"))


def test_splits_of_several_sources_come_from_the_folders_themselves(tmp_path, look):
    three_splits(tmp_path / "runs", (4, 3, 2))
    found = look([tmp_path / "runs" / name for name in ("test", "train", "val")])
    whole = look(tmp_path / "runs")
    assert (found.source, found.shards, found.problems) == (whole.source, whole.shards, whole.problems)
    assert {s.split for s in look(tmp_path / "runs" / "train").shards} == {"all"}


def test_a_given_schema_is_not_guessed_and_what_does_not_fit_is_a_problem(tmp_path, look):
    item_per_file(tmp_path, 5, item=(3, 8))
    write_shard(tmp_path / "9.h5", values(1)[0])
    schema = Schema("item-per-file", KEY, ITEM, "<f4")
    found = look(tmp_path, schema=schema)
    assert (found.schema, paths(found)) == (schema, ["9.h5"])
    assert set(codes(found).values()) == {"dim"}
    (tmp_path / "9.h5").unlink()
    assert (look(tmp_path, schema=schema).shards, len(look(tmp_path, schema=schema).problems)) == ((), 5)


def test_a_listing_is_a_source_of_which_entries_can_be_left_away(tmp_path, look):
    item_per_file(tmp_path, 6)
    listing = list_shards(tmp_path)
    some = replace(listing, entries=listing.entries[3:])
    assert look(listing).shards == look(tmp_path).shards
    assert paths(look(some)) == ["3.h5", "4.h5", "5.h5"]
    assert look(replace(listing, entries=[]), schema=look(listing).schema).shards == ()
