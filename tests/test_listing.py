"""The listing of a source: natural order, every file once, and the same of the same files however they are named."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sources import item_per_file, values, write_shard

from tsclust_ooc.errors import BadInput
from tsclust_ooc.shards.listing import is_root_of, list_shards, name_key, rebased, sort_key
from tsclust_ooc.shards.schema import natural_key

PARTS = st.text(alphabet="ab0019.- \u00e9\udcff\x01\x02\u0661", min_size=1, max_size=6)


@given(st.lists(st.lists(PARTS, min_size=1, max_size=3).map("/".join), max_size=20))
def test_paths_sort_as_by_natural_key(paths):
    assert sorted(paths, key=sort_key) == sorted(paths, key=natural_key)


@given(st.lists(PARTS, max_size=20))
def test_names_sort_as_their_paths_do(names):
    assert [name_key(name) for name in names] == [sort_key(name) for name in names]


def test_entries_have_the_stamp_of_what_a_link_leads_to(tmp_path):
    item_per_file(tmp_path / "elsewhere", 1)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.h5").symlink_to(tmp_path / "elsewhere" / "0.h5")
    os.utime(tmp_path / "elsewhere" / "0.h5", ns=(5, 7))
    (entry,) = list_shards(tmp_path / "source").entries
    assert entry == ("a.h5", (tmp_path / "elsewhere" / "0.h5").stat().st_size, 7)


def test_of_several_names_of_a_file_the_first_in_order_stays(tmp_path):
    item_per_file(tmp_path, 3)
    for name in ("10.h5", "b.h5"):
        os.link(tmp_path / "2.h5", tmp_path / name)
    found = list_shards(tmp_path)
    assert [entry.path for entry in found.entries] == ["0.h5", "1.h5", "2.h5"]
    assert [(p.path, p.detail) for p in found.problems] == [
        ("10.h5", "the same file as 2.h5"),
        ("b.h5", "the same file as 2.h5"),
    ]


def paths(listing):
    return [entry.path for entry in listing.entries]


def problems(listing):
    return {problem.path: problem.code for problem in listing.problems}


def splits(folder):
    """train/ with 3 and val/ with 2 shards; all their paths in natural order."""
    item_per_file(folder / "train", 3)
    item_per_file(folder / "val", 2)
    return ["train/0.h5", "train/1.h5", "train/2.h5", "val/0.h5", "val/1.h5"]


def test_a_folder_goes_by_its_own_name_not_by_that_of_a_link_to_it(tmp_path):
    wanted = splits(tmp_path)
    (tmp_path / "a").symlink_to("val")
    (tmp_path / "zz").symlink_to("train")
    assert paths(list_shards(tmp_path)) == wanted


# several sources


def test_several_folders_are_named_relative_to_what_they_have_in_common(tmp_path):
    wanted = splits(tmp_path)
    for sources in (["train", "val"], ["val", "train"], ["val", "train", "val"], ["val", "", "train"]):
        found = list_shards([tmp_path / source for source in sources])
        assert (found.root, paths(found), found.problems) == (str(tmp_path), wanted, []), sources
    assert set(list_shards([tmp_path / "val", tmp_path / "train"]).folders) == {f"{tmp_path}/train", f"{tmp_path}/val"}


def test_one_source_is_its_own_root_whatever_it_is_called(tmp_path):
    splits(tmp_path)
    assert list_shards(tmp_path / "train").root == str(tmp_path / "train")
    alone = list_shards([tmp_path / "train" / "1.h5"])
    assert (alone.root, paths(alone)) == (str(tmp_path / "train"), ["1.h5"])


def test_two_names_of_one_folder_are_one_folder(tmp_path):
    splits(tmp_path)
    (tmp_path / "again").symlink_to("train")
    found = list_shards([tmp_path / "train", tmp_path / "again"])
    assert (paths(found), found.problems) == ([f"again/{i}.h5" for i in range(3)], [])


def test_a_file_that_is_in_a_folder_too_is_there_once(tmp_path):
    wanted = splits(tmp_path)
    found = list_shards([tmp_path / "val" / "1.h5", tmp_path])
    assert (paths(found), found.problems) == (wanted, [])


def test_ways_with_dots_and_links_lead_where_the_system_says(tmp_path):
    splits(tmp_path / "far")
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "link").symlink_to("../far/train")
    found = list_shards([tmp_path / "near/link/../val", tmp_path / "near/.././far//train/"])
    assert (found.root, len(paths(found))) == (str(tmp_path / "far"), 5)


def test_a_source_that_is_not_there_is_named(tmp_path):
    splits(tmp_path)
    with pytest.raises(BadInput, match=r"nowhere is not there\. Give a folder"):
        list_shards([tmp_path / "train", tmp_path / "nowhere"])


# a list of paths


def listed(tmp_path, *lines, name="list.txt", raw=None):
    (tmp_path / name).write_bytes(raw if raw is not None else "\n".join(lines).encode())
    return list_shards(tmp_path / name)


def test_a_list_names_files_and_folders_in_any_order(tmp_path):
    wanted = splits(tmp_path)
    lines = ["# shards of today", "", "val", f"{tmp_path}/train/2.h5", "train/0.h5", "./train/../train/1.h5", "  "]
    for some in (lines, lines[::-1]):
        found = listed(tmp_path, *some)
        assert (found.root, paths(found), found.problems, found.notes) == (str(tmp_path), wanted, [], ())
    assert listed(tmp_path, *lines, name="list.LIST").entries == list_shards(tmp_path).entries


def test_lines_may_end_as_on_windows_and_names_need_not_be_text(tmp_path):
    splits(tmp_path)
    odd = os.fsdecode(b"9\xff.h5")
    os.rename(tmp_path / "val/0.h5", tmp_path / "val" / odd)
    found = listed(tmp_path, raw=b"\xef\xbb\xbftrain/0.h5\r\nval/9\xff.h5\r\n\r\n")
    assert (paths(found), found.problems) == (["train/0.h5", f"val/{odd}"], [])


def test_what_a_list_names_and_is_no_shard_is_a_problem(tmp_path):
    splits(tmp_path)
    (tmp_path / "notes.md").write_text("x")
    os.mkfifo(tmp_path / "pipe.h5")
    (tmp_path / "gone.h5").symlink_to("nowhere")
    found = listed(tmp_path, "train", "val/7.h5", "notes.md", "pipe.h5", "gone.h5")
    assert len(found.entries) == 3
    assert problems(found) == {
        "val/7.h5": "unreadable", "notes.md": "not-hdf5", "pipe.h5": "not-regular", "gone.h5": "unreadable",
    }  # fmt: skip
    assert problems(listed(tmp_path, raw=b"train\na\0b.h5")) == {"a\0b.h5": "unreadable"}


def test_a_line_twice_is_one_file_and_a_note_but_two_names_are_a_duplicate(tmp_path):
    splits(tmp_path)
    os.link(tmp_path / "train/0.h5", tmp_path / "train/5.h5")
    found = listed(tmp_path, "train/0.h5", "train/0.h5", "train/./0.h5", "train/5.h5")
    assert (found.root, paths(found)) == (str(tmp_path / "train"), ["0.h5"])
    assert problems(found) == {"5.h5": "duplicate"}
    assert found.notes == ("2 repeated lines in the list, taken once",)


def test_arrays_of_numpy_are_shards_where_a_list_names_them(tmp_path):
    splits(tmp_path)
    for folder in ("train", "other"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "labels.npy").write_bytes(b"")
    found = listed(tmp_path, "train", "other/labels.npy")
    assert (paths(found)[0], len(found.entries), found.n_other) == ("other/labels.npy", 4, 1)


@pytest.mark.parametrize("raw", [b"", b"# nothing\n\n \n"])
def test_a_list_of_nothing_is_refused(tmp_path, raw):
    with pytest.raises(BadInput, match="names no shard"):
        listed(tmp_path, raw=raw)


def test_a_missing_file_does_not_change_what_the_others_are_called(tmp_path):
    splits(tmp_path)
    assert paths(listed(tmp_path, "train/0.h5", "val/9.h5")) == ["train/0.h5"]
    assert paths(listed(tmp_path, "train/0.h5")) == ["0.h5"]


# the root


def test_a_listing_can_be_named_from_further_above(tmp_path):
    splits(tmp_path / "a")
    (tmp_path / "a/train/9.h5").symlink_to("nowhere")
    found = rebased(list_shards(tmp_path / "a" / "train"), str(tmp_path))
    assert (found.root, paths(found)) == (str(tmp_path), [f"a/train/{i}.h5" for i in range(3)])
    assert problems(found) == {"a/train/9.h5": "unreadable"}
    assert paths(rebased(found, str(tmp_path))) == paths(found)


def test_a_root_is_told_from_sources_without_reading_lists(tmp_path):
    splits(tmp_path)
    write_shard(tmp_path / "other" / "0.h5", values(1)[0])
    (tmp_path / "train/link.h5").symlink_to("../other/0.h5")
    listed(tmp_path, "train")
    train, val = tmp_path / "train", tmp_path / "val"
    assert is_root_of(str(tmp_path), [tmp_path / "list.txt"])
    assert is_root_of(str(train), [train])
    assert is_root_of(str(train), [train / "link.h5"])
    assert not is_root_of(str(tmp_path), [train])
    assert is_root_of(str(tmp_path), [train, val])
    assert is_root_of("/", [train, val])
    assert not is_root_of(str(train), [train, val])
