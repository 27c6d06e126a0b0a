"""Sources that are far away, through a real mount: read many at a time, and faults in passing leave no trace."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr
from fuse.mounting import far_away
from sources import KEY, item_per_file, rows_per_file, values, write_shard

from tsclust_ooc import patience
from tsclust_ooc.cli import main
from tsclust_ooc.patience import Patience
from tsclust_ooc.pipeline.consolidating import BadShards, ConsolidateOptions, consolidate
from tsclust_ooc.plan import Options, make_plan
from tsclust_ooc.reading import RowReader
from tsclust_ooc.shards.parsers import Parsers
from tsclust_ooc.shards.schema import ROWS_PER_FILE, Wanted
from tsclust_ooc.shards.survey import survey
from tsclust_ooc.staging import NO_STAGE, Stage

N = 300
QUIET = ConsolidateOptions(workers=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("near")
    item_per_file(folder / "train", N)
    return folder


@pytest.fixture(scope="module")
def expected(source) -> np.ndarray:
    """What h5py reads, one shard after another."""
    found = []
    for i in range(N):
        with h5py.File(source / "train" / f"{i}.h5") as file:
            found.append(file[KEY][()])
    return np.stack(found)


@pytest.fixture(scope="module")
def parsers():
    with Parsers(2) as made:
        yield made


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """One short wait, then none."""
    monkeypatch.setattr(patience, "_GROWTH", 0.0)


def rows_of(dataset: Path, split: str = "train") -> np.ndarray:
    return np.asarray(zarr.open_group(dataset / "data.zarr", mode="r")[f"{split}/embeddings"][...])


def read_all(folder: Path, parsers: Parsers, ours: Patience) -> tuple[np.ndarray, list]:
    found = survey(folder, parsers, patience=ours)
    plan = make_plan(found, Options())
    out = np.empty((plan.n_rows, *plan.schema.item_shape), plan.schema.dtype)
    ids, problems = RowReader(plan, parsers, NO_STAGE, patience=ours).read("train", 0, plan.n_rows, out)
    assert ids.sample_ids == [str(i) for i in range(N) if f"train/{i}.h5" not in {p.path for _, p in problems}]
    return out, problems


def test_many_shards_of_a_slow_source_are_under_way_and_the_values_are_those_of_h5py(tmp_path, source, expected):
    with far_away(source, tmp_path, delay_ms=2) as far:
        done = consolidate(far.path, tmp_path / "dataset", QUIET)
    assert done.n_samples == N
    np.testing.assert_array_equal(rows_of(tmp_path / "dataset"), expected)
    assert far.served["most_in_flight"] >= 16


def test_a_shard_costs_one_open_and_one_read(tmp_path, source):
    with far_away(source, tmp_path, delay_ms=2) as far:
        consolidate(far.path, tmp_path / "dataset", QUIET)
    # Those that the parser opens to learn what the others look like come on top.
    assert far.served["n_opens"] <= N + 3
    assert far.served["n_reads"] <= N + 3


def test_a_survey_that_opens_every_shard_has_many_under_way(tmp_path, source, parsers):
    with far_away(source, tmp_path, delay_ms=2) as far:
        found = survey(far.path, parsers)
    assert (len(found.shards), found.problems) == (N, ())
    assert far.served["most_in_flight"] >= 16


def test_a_near_source_is_read_a_shard_at_a_time(tmp_path, source, parsers):
    with far_away(source, tmp_path, delay_ms=0) as far:
        read_all(far.path, parsers, Patience())
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("reads")]


def test_no_thread_outlives_a_read_of_a_slow_source(tmp_path, source, parsers):
    before = threading.active_count()
    with far_away(source, tmp_path, delay_ms=2) as far:
        read_all(far.path, parsers, Patience())
    assert threading.active_count() == before


@pytest.mark.parametrize(  # no stale open: the kernel itself tries that again, once
    ("operation", "number", "delay_ms"),
    [("open", "EIO", 2), ("read", "EIO", 0), ("read", "ESTALE", 2), ("open", "ETIMEDOUT", 0)],
)
def test_faults_now_and_then_change_nothing_and_are_all_counted(
    tmp_path, source, expected, parsers, operation, number, delay_ms
):
    ours, before = Patience(), parsers.patience.n_retries
    with far_away(source, tmp_path, delay_ms=delay_ms, fail_every=50, errno=number, operation=operation) as far:
        out, problems = read_all(far.path, parsers, ours)
    assert problems == []
    np.testing.assert_array_equal(out, expected)
    assert far.served["n_failed"] >= N // 50
    assert ours.n_retries + parsers.patience.n_retries - before == far.served["n_failed"]


@pytest.mark.parametrize(("operation", "every"), [("list", 1), ("list", 2), ("stat", 3)])
def test_a_folder_that_fails_in_passing_is_listed_again_and_one_that_fails_for_good_is_named(
    tmp_path, source, parsers, operation, every
):
    ours = Patience()
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "deep").symlink_to(source / "train")
    item_per_file(tmp_path / "near" / "flat", 20)
    match = "*/flat" if operation == "list" else "*"
    with far_away(tmp_path / "near", tmp_path, fail_every=every, operation=operation, match=match) as far:
        found = survey(far.path, parsers, patience=ours)
    if every > 1:
        assert (len(found.shards), found.problems) == (N + 20, ())
    else:
        assert [(p.path, p.code) for p in found.problems] == [("flat", "unreadable")]
        assert "(EIO, 5 tries)" in found.problems[0].detail
    assert (ours.n_retries > 0) == (far.served["n_failed"] > 0)


def test_a_dataset_from_a_faulty_source_is_the_one_from_a_good_source(tmp_path, source):
    good = consolidate(source, tmp_path / "good", QUIET)
    with far_away(source, tmp_path, delay_ms=1, fail_every=50) as far:
        faulty = consolidate(far.path, tmp_path / "faulty", QUIET)
    assert faulty.digest == good.digest
    assert faulty.n_retries == far.served["n_failed"] > 0
    assert good.n_retries == 0


def test_a_copy_to_scratch_that_failed_in_passing_is_made_again(tmp_path, parsers):
    expected, ours, before = item_per_file(tmp_path / "near", 40), Patience(), parsers.patience.n_retries
    with (
        far_away(tmp_path / "near", tmp_path, fail_every=10) as far,
        Stage(tmp_path / "stage", "always", on_network=True) as stage,
    ):
        plan = make_plan(survey(far.path, parsers, patience=ours), Options())
        out = np.empty_like(expected)
        _, problems = RowReader(plan, parsers, stage, patience=ours).read("all", 0, 40, out)
    assert problems == []
    np.testing.assert_array_equal(out, expected)
    assert ours.n_retries + parsers.patience.n_retries - before == far.served["n_failed"] > 0


@pytest.mark.parametrize("number", ["EIO", "ESTALE"])
def test_a_shard_that_fails_for_good_is_named_with_its_error_and_its_tries(tmp_path, source, capsys, number):
    with far_away(source, tmp_path, fail_every=1, errno=number, match="*/7.h5") as far:
        code = main(["consolidate", str(far.path), str(tmp_path / "dataset"), "--json"])
    assert code == 65
    problems = json.loads(capsys.readouterr().out.splitlines()[-1])["problems"]
    assert [(p["path"], p["code"]) for p in problems] == [("train/7.h5", "unreadable")]
    assert f"({number}, 5 tries)" in problems[0]["detail"]
    assert not (tmp_path / "dataset").exists()


def test_a_shard_that_failed_is_read_by_the_same_command_when_the_disk_is_well_again(tmp_path, source, expected):
    with (
        far_away(source, tmp_path / "ill", fail_every=1, match="*/7.h5") as far,
        pytest.raises(BadShards, match="unreadable"),
    ):
        consolidate(far.path, tmp_path / "dataset", QUIET)
    consolidate(source, tmp_path / "dataset", QUIET)
    np.testing.assert_array_equal(rows_of(tmp_path / "dataset"), expected)


def test_a_source_that_goes_away_while_it_is_read_is_not_waited_for_shard_by_shard(tmp_path, source, parsers):
    plan = make_plan(survey(source, parsers), Options())
    out = np.empty((N, *plan.schema.item_shape), plan.schema.dtype)
    with far_away(source, tmp_path, fail_every=1, errno="EHOSTDOWN") as far:
        gone = replace(plan, source=str(far.path))
        _, problems = RowReader(gone, parsers, NO_STAGE, patience=Patience()).read("train", 0, N, out)
    assert [p.path for _, p in problems] == [f"train/{i}.h5" for i in range(N)]
    assert {p.code for _, p in problems} == {"unreadable"}
    # Twenty in a row, and what was under way meanwhile; all others once.
    assert far.served["n_opens"] <= 5 * (20 + 64) + N


def test_shards_of_rows_of_a_slow_source_are_those_of_h5py(tmp_path, parsers):
    expected = rows_per_file(tmp_path / "near" / "train", [7] * 40)
    ours = Patience()
    with far_away(tmp_path / "near", tmp_path, delay_ms=2, fail_every=20) as far:
        plan = make_plan(survey(far.path, parsers, Wanted(layout=ROWS_PER_FILE), patience=ours), Options())
        out = np.empty((plan.n_rows, 16), "<f4")
        _, problems = RowReader(plan, parsers, NO_STAGE, patience=ours).read("train", 3, plan.n_rows, out[3:])
    assert problems == []
    np.testing.assert_array_equal(out[3:], expected[3:])


def test_what_the_mount_shows_is_what_lies_there(tmp_path):
    write_shard(tmp_path / "near" / "a" / "0.h5", values(1)[0])
    (tmp_path / "near" / "link.h5").symlink_to("a/0.h5")
    with far_away(tmp_path / "near", tmp_path) as far:
        assert {p.relative_to(far.path) for p in far.path.rglob("*")} == {
            p.relative_to(tmp_path / "near") for p in (tmp_path / "near").rglob("*")
        }
        assert (far.path / "a" / "0.h5").read_bytes() == (tmp_path / "near" / "a" / "0.h5").read_bytes()
        assert os.readlink(far.path / "link.h5") == "a/0.h5"
        assert far.so_far()["n_opens"] == 1
        with pytest.raises(OSError, match="Read-only"):
            (far.path / "new").write_bytes(b"")
