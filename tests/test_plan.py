"""The plan: every row once, whole chunks, the same on every machine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsclust_ooc import budget
from tsclust_ooc.errors import UsageError
from tsclust_ooc.plan import Options, make_plan
from tsclust_ooc.shards.schema import Schema, Shard
from tsclust_ooc.shards.survey import Survey

SCHEMA = Schema("rows-per-file", "x", (16,), "<f4")


def surveyed(counts, schema=SCHEMA, source="/data"):
    """A survey of shards with these sample counts: {split: [counts]}."""
    shards = tuple(
        Shard(f"{split}/{i}.h5", split, 1000 + n, 10**18 + i, n)
        for split, ns in counts.items()
        for i, n in enumerate(ns)
    )
    return Survey(source, schema, "told", shards, (), (), (), 0)


def planned(counts, chunk_bytes=4096, schema=SCHEMA):
    return make_plan(surveyed(counts, schema), Options(chunk_bytes))


counts_of_a_split = st.lists(st.integers(0, 300), min_size=1, max_size=12)
sources = st.dictionaries(st.sampled_from(["train", "val", "test"]), counts_of_a_split, min_size=1)


@settings(max_examples=150, deadline=None)
@given(sources, st.integers(2**12, 2**15))
def test_partitions_cover_every_row_once_in_whole_chunks(counts, chunk_bytes):
    plan = planned(counts, chunk_bytes)
    assert [p.index for p in plan.partitions] == list(range(len(plan.partitions)))
    for split, ns in counts.items():
        mine = [p for p in plan.partitions if p.split == split]
        rows = [row for p in mine for row in range(p.start, p.stop)]
        assert rows == list(range(sum(ns)))
        step = plan.chunk_rows[split]
        assert all(p.start % step == 0 and (p.stop % step == 0 or p.stop == sum(ns)) for p in mine)
        chunks = [c for p in mine for c in plan.chunks_of(p)]
        assert chunks == [(at, min(at + step, sum(ns))) for at in range(0, sum(ns), step)]
    assert plan.n_chunks == sum(len(list(plan.chunks_of(p))) for p in plan.partitions)


@settings(max_examples=150, deadline=None)
@given(counts_of_a_split, st.data())
def test_the_segments_of_any_rows_are_those_rows_of_the_shards_end_to_end(counts, data):
    n = sum(counts)
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    plan = planned({"train": counts})
    wanted = [(f"train/{i}.h5", row) for i, count in enumerate(counts) for row in range(count)][start:stop]
    segments = list(plan.segments("train", start, stop))
    assert [(s.shard.path, row) for s in segments for row in range(s.start, s.stop)] == wanted
    ends = np.cumsum([start] + [s.stop - s.start for s in segments])
    assert [s.row for s in segments] == list(ends[:-1])


def test_a_chunk_holds_whole_samples_and_at_least_one():
    assert planned({"train": [1000]}, 4096).chunk_rows == {"train": 4096 // 64}
    assert planned({"train": [1000]}, 4100).chunk_rows == {"train": 64}
    large = Schema("item-per-file", "x", (70, 768), "<f8")
    assert planned({"train": [5]}, 4096, large).chunk_rows == {"train": 1}


def test_a_split_smaller_than_a_chunk_is_not_padded():
    plan = planned({"train": [1000], "val": [3]})
    assert plan.chunk_rows == {"train": 64, "val": 3}
    assert plan.disk_bytes == (16 * 64 + 3) * 64
    assert plan.n_bytes == 1003 * 64


def test_a_split_of_empty_shards_has_no_partition():
    plan = planned({"train": [10], "test": [0, 0]})
    assert {p.split for p in plan.partitions} == {"train"}
    assert plan.disk_bytes == 640


def test_the_plan_depends_on_no_machine(monkeypatch):
    here = planned({"train": [500, 20], "val": [9]})
    monkeypatch.setattr(budget, "available_cores", lambda: 96)
    monkeypatch.setattr(budget, "memory_limit", lambda: 2**50)
    there = planned({"train": [500, 20], "val": [9]})
    assert (there, there.digest, there.partitions) == (here, here.digest, here.partitions)


BASE = {"train": [100, 100, 100], "val": [5]}


SMALL = Options(4096)


def inputs(survey, options=SMALL):
    plan = make_plan(survey, options)
    return plan.digest, [plan.inputs_digest(p) for p in plan.partitions]


def changed(survey, at, **values):
    return replace(survey, shards=tuple(replace(s, **values) if i == at else s for i, s in enumerate(survey.shards)))


@pytest.mark.parametrize(
    ("survey", "options"),
    [
        (surveyed(BASE, replace(SCHEMA, key="y")), Options(4096)),
        (surveyed(BASE, replace(SCHEMA, dtype="<f8")), Options(8192)),
        (surveyed(BASE, source="/other"), Options(4096)),
        (surveyed(BASE), Options(4096, "zstd")),
        (surveyed(BASE), Options(4160)),
    ],
)
def test_what_decides_all_bytes_changes_every_digest(survey, options):
    plan, partitions = inputs(surveyed(BASE))
    other_plan, others = inputs(survey, options)
    assert plan != other_plan
    assert not set(partitions) & set(others)


@pytest.mark.parametrize("change", [{"mtime_ns": 1}, {"size": 7}, {"path": "train/1b.h5"}])
def test_a_changed_shard_changes_the_digests_of_its_partitions_alone(change):
    plan, before = inputs(surveyed(BASE))
    other, after = inputs(changed(surveyed(BASE), 1, **change))
    assert plan != other
    parts = make_plan(surveyed(BASE), Options(4096)).partitions  # 128 rows each; the shard has rows 100 to 200
    touched = [p.split == "train" and p.start < 200 and p.stop > 100 for p in parts]
    assert [a != b for a, b in zip(before, after, strict=True)] == touched
    assert touched == [True, True, False, False]


def test_what_does_not_decide_bytes_changes_no_digest():
    survey = surveyed(BASE)
    assert inputs(replace(survey, notes=("odd",), n_other=9, reason="guessed")) == inputs(survey)


def test_more_shards_at_the_end_leave_the_partitions_before_them_as_they_are():
    _, before = inputs(surveyed({"train": [100, 100]}))
    _, after = inputs(surveyed({"train": [100, 100, 500]}))
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_options_that_cannot_be_meant_are_refused():
    with pytest.raises(UsageError, match="16MiB"):
        Options(100)
    with pytest.raises(UsageError, match="zstd or blosc-lz4"):
        Options(codec="gzip")
