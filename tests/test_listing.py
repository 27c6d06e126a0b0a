"""The listing of a source: one key a path gives the order that natural_key gives; names of one file are one entry."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st
from sources import item_per_file

from tsclust_ooc.shards.listing import list_shards, sort_key
from tsclust_ooc.shards.schema import natural_key

PARTS = st.text(alphabet="ab0019.- \u00e9\udcff\x01\x02\u0661", min_size=1, max_size=6)


@given(st.lists(st.lists(PARTS, min_size=1, max_size=3).map("/".join), max_size=20))
def test_paths_sort_as_by_natural_key(paths):
    assert sorted(paths, key=sort_key) == sorted(paths, key=natural_key)


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
