"""status: what it says of a name is what was done there, whoever does it, and it never minds what vanishes."""

import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import publish
from datasets import three_splits as sampled
from sources import OPTIONS, contents, item_per_file, shared_parsers, values, write_shard

from tsclust_ooc import checkpoint, files, records
from tsclust_ooc.cli import main
from tsclust_ooc.errors import BadInput
from tsclust_ooc.pipeline import arrays, consolidating, progressing
from tsclust_ooc.pipeline.clustering import ClusterOptions, cluster
from tsclust_ooc.pipeline.consolidating import consolidate
from tsclust_ooc.pipeline.distancing import DistancesOptions, distances
from tsclust_ooc.pipeline.progressing import status

ROWS = 42  # of a partition: two chunks of 21 samples


@pytest.fixture(autouse=True, scope="module")
def _parsers():
    with shared_parsers(consolidating, arrays):
        yield


@pytest.fixture
def options(tmp_path):
    return replace(OPTIONS, scratch=tmp_path)


@pytest.fixture
def place(tmp_path, options):
    """A source of 230 shards, planned as six partitions of 42 samples, the last one of 20."""
    item_per_file(tmp_path / "source", 230)
    arrays.init(tmp_path / "source", tmp_path / "dataset", options)
    return tmp_path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("status"), sampled())


def write(place, options, *numbers):
    for number in numbers:
        arrays.write_partition(place / "source", place / "dataset", number, options)


def work(place, name="dataset"):
    (root,) = files.work_of(place / name)
    return root


def seen(place, name="dataset"):
    (one,) = status(place / name).work
    return one


def receipts_at(place, times):
    """Receipts as if they were written at these times."""
    for number, at in times.items():
        os.utime(work(place) / f"receipts/{number}.json", (at, at))


class Stop(Exception):
    """Ends a command."""


class Stopping:
    """A listener that ends the command once a stage is so far, or at a message that starts with `words`."""

    def __init__(self, after=10**9, words="no such words"):
        self.after, self.words = after, words

    def advance(self, stage, done, total):
        if done >= self.after:
            raise Stop

    def say(self, message):
        if message.startswith(self.words):
            raise Stop


# a consolidation


def test_partitions_are_done_or_missing_and_samples_are_counted(place, options):
    assert (seen(place).n_done, seen(place).n_units, seen(place).rate) == (0, 6, None)
    write(place, options, 4, 1, 5)
    found = status(place / "dataset")
    one = found.work[0]
    assert (found.state, found.published) == ("in work", None)
    assert (one.kind, one.unit, one.n_units, one.n_done, one.n_running, one.n_missing) == (
        "consolidation", "partition", 6, 3, 0, 3,
    )  # fmt: skip
    assert (one.missing, one.missing_array) == (("0", "2", "3"), "0,2-3")
    assert (one.n_samples, one.n_samples_done) == (230, 2 * ROWS + 20)


def test_the_rate_is_that_of_the_receipts_and_gives_the_time_left(place, options):
    write(place, options, 0, 1, 2)
    began = (work(place) / "plan.json").stat().st_mtime
    receipts_at(place, {0: began + 10, 1: began + 20, 2: began + 30})
    one = seen(place)
    assert one.rate == pytest.approx(3 * ROWS / 30, rel=1e-3)
    assert one.seconds_left == pytest.approx((230 - 3 * ROWS) / (3 * ROWS / 30), rel=1e-2)


def test_only_the_last_ten_minutes_count_and_no_receipt_that_was_taken_over(place, options):
    write(place, options, 0, 1, 2, 3)
    began = (work(place) / "plan.json").stat().st_mtime
    receipts_at(place, {0: began - 5000, 1: began + 3000, 2: began + 5000, 3: began + 5100})
    assert seen(place).rate == pytest.approx(ROWS / 100, rel=1e-3)
    receipts_at(place, {1: began - 1, 2: began - 1, 3: began - 1})
    assert (seen(place).rate, seen(place).seconds_left) == (None, None)


@pytest.mark.parametrize("name", [".0.0123456789ab.partial", "0"])
def test_fresh_files_without_a_receipt_are_a_partition_that_is_being_written(place, options, name):
    write(place, options, 0)
    chunk = work(place) / "dataset/data.zarr/all/embeddings/c/7/0" / name  # the second chunk of partition 3
    chunk.parent.mkdir(parents=True)
    chunk.write_bytes(b"half")
    one = seen(place)
    assert (one.running, one.n_running, one.missing_array) == (("3",), 1, "1-2,4-5")
    long_ago = time.time() - 3600
    for path in (chunk, *chunk.parents[:2]):
        os.utime(path, (long_ago, long_ago))
    assert (seen(place).n_running, seen(place).missing_array) == (0, "1-5")


def test_a_file_server_whose_clock_is_ahead_does_not_make_old_work_fresh(place, options):
    write(place, options, 0, 1)
    ahead = time.time() + 5000
    receipts_at(place, {0: ahead, 1: ahead + 100})
    chunk = work(place) / "dataset/data.zarr/all/embeddings/c/6/0/0"
    chunk.parent.mkdir(parents=True)
    chunk.write_bytes(b"half")
    for path in (chunk, *chunk.parents[:2]):
        os.utime(path, (ahead - 1000, ahead - 1000))
    assert (seen(place).n_running, seen(place).seconds_idle) == (0, 0.0)


def test_many_missing_partitions_are_counted_and_ten_are_named(tmp_path, options):
    item_per_file(tmp_path / "source", 600)
    arrays.init(tmp_path / "source", tmp_path / "dataset", options)
    one = seen(tmp_path)
    assert (one.n_missing, one.missing) == (15, tuple(map(str, range(10))))
    assert one.missing_array == "0-14"


def test_bad_shards_met_while_reading_and_those_the_survey_left_out_are_told(place, options):
    write_shard(place / "source/50.h5", values(1)[0], chunks=(3, 16), compression="gzip")
    data = (place / "source/50.h5").read_bytes()
    (place / "source/50.h5").write_bytes(data[:-40] + bytes(40))  # the end of the compressed data
    (place / "source/60.h5").write_bytes(b"")
    files.retire(work(place))
    arrays.init(place / "source", place / "dataset", options)
    with pytest.raises(BadInput):
        write(place, options, 1)
    one = seen(place)
    assert [problem.path for problem in one.bad] == ["50.h5"]
    assert (one.n_left_out, one.n_done) == (1, 0)


def test_work_of_two_plans_is_told_of_both(place, options):
    write(place, options, 0)
    arrays.init(place / "source", place / "dataset", replace(options, chunk_bytes="8192"))
    assert sorted((one.n_units, one.n_done) for one in status(place / "dataset").work) == [(3, 0), (6, 1)]


def test_work_that_has_no_plan_yet_and_work_of_another_version_are_known_as_such(place):
    plan = json.loads((work(place) / "plan.json").read_text())
    (work(place) / "plan.json").write_text(json.dumps({**plan, "format_version": 99}))
    assert seen(place).kind == "unknown"
    assert "99" in seen(place).note
    (work(place) / "plan.json").unlink()
    assert "nothing planned yet" in seen(place).note


def test_looking_changes_nothing(place, options):
    write(place, options, 2)
    before = contents(place)
    status(place / "dataset")
    assert contents(place) == before


# what is published


def test_a_published_dataset_is_named_by_its_manifest(place, options):
    write(place, options, *range(6))
    made = arrays.finalize(place / "source", place / "dataset", options)
    found = status(place / "dataset")
    assert (found.state, found.work) == ("published", ())
    assert (found.published.kind, found.published.digest) == ("dataset", made.digest)
    assert (found.published.n_rows, found.published.bytes) == ({"all": 230}, made.bytes)
    manifest = json.loads((place / "dataset/manifest.json").read_text())
    assert (found.published.created, found.published.host) == (
        manifest["provenance"]["created"], manifest["provenance"]["host"],
    )  # fmt: skip


def test_work_that_is_to_replace_what_is_published_is_told_beside_it(place, options):
    consolidate(place / "source", place / "dataset", options)
    arrays.init(place / "source", place / "dataset", replace(options, chunk_bytes="8192", overwrite=True))
    found = status(place / "dataset")
    assert (found.state, found.published.kind, found.work[0].n_missing) == ("in work", "dataset", 3)


# runs and distances


def test_a_run_is_at_the_pass_of_its_checkpoint_and_then_published(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "LEAST_SECONDS", 0.0)
    options = ClusterOptions(workers=2, scratch=tmp_path, init="random", tol=0.0)
    with pytest.raises(Stop):
        cluster(dataset, tmp_path / "run", 4, options, Stopping(words="pass 3 "))
    one = seen(tmp_path, "run")
    line = (work(tmp_path, "run") / "fit.checkpoint").read_bytes().partition(b"\n")[0]
    kept = json.loads(line)["record"]
    assert (one.kind, one.last_pass.n_iter) == ("run", kept["n_iter"])
    assert one.last_pass.n_passes == kept["passes_before"] + kept["n_passes"] > 0
    assert one.last_pass.inertia == kept["history"][-1]["inertia"]
    done = cluster(dataset, tmp_path / "run", 4, options)
    found = status(tmp_path / "run")
    assert (found.published.kind, found.work) == ("run", ())
    assert found.published.n_rows == {"train": 60, "val": 23, "test": 9}
    assert done.n_passes >= one.last_pass.n_passes


@pytest.mark.parametrize("line", [b"", b"no json\n", b"[1]\n", b'{"record": {}}\n', b'{"record": {"history": []}}\n'])
def test_a_checkpoint_that_says_nothing_is_no_error(tmp_path, line):
    (tmp_path / ".run.0123456789ab.wip").mkdir()
    (tmp_path / ".run.0123456789ab.wip/fit.checkpoint").write_bytes(line)
    assert seen(tmp_path, "run").last_pass is None
    assert "cannot be read" in seen(tmp_path, "run").note


def test_blocks_of_distances_are_counted_and_then_published(dataset, tmp_path):
    options = DistancesOptions(workers=1, scratch=tmp_path, block_bytes=str(4 * 25 * 25))
    with pytest.raises(Stop):
        distances(dataset, tmp_path / "out", options, Stopping(after=2))
    one = seen(tmp_path, "out")
    written = {path.stem for path in (work(tmp_path, "out") / "receipts").glob("*.json")}
    assert (one.kind, one.unit) == ("matrix of distances", "block")
    assert (one.n_done, one.n_missing + one.n_running) == (len(written), one.n_units - len(written))
    assert set(one.missing).isdisjoint(written)
    distances(dataset, tmp_path / "out", options)
    assert status(tmp_path / "out").published.kind == "matrix of distances"
    chunks = list((tmp_path / "out/distances.zarr/distances/c").glob("*/*"))
    assert one.n_units == sum(int(path.parent.name) <= int(path.name) for path in chunks)


# what changes meanwhile


def test_work_that_is_published_while_it_is_looked_at_is_found_published(place, options, monkeypatch):
    write(place, options, *range(6))
    load = records.load

    def finished_just_then(path, cls, version):
        if path.name == "plan.json" and path.exists() and not (place / "dataset").exists():
            monkeypatch.setattr(records, "load", load)
            arrays.finalize(place / "source", place / "dataset", options)
        return load(path, cls, version)

    monkeypatch.setattr(records, "load", finished_just_then)
    found = status(place / "dataset")
    assert (found.state, found.published.n_rows) == ("published", {"all": 230})


def test_somebody_who_looks_all_the_time_sees_only_what_is_true(tmp_path, options):
    item_per_file(tmp_path / "source", 230)
    done, failed = [], []
    over = threading.Event()

    def look():
        while not over.is_set():
            try:
                found = status(tmp_path / "dataset")
                done.append(230 if found.published else found.work[0].n_samples_done)
            except BadInput as error:
                if "nothing there" not in str(error):
                    failed.append(error)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        consolidate(tmp_path / "source", tmp_path / "dataset", options)
    finally:
        over.set()
        watcher.join()
    assert failed == []
    assert done == sorted(done)
    assert status(tmp_path / "dataset").published.n_rows == {"all": 230}


def test_files_that_vanish_between_listing_and_looking_are_left_out(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")  # listed, and not there when it is looked at
    assert [name for name, _ in progressing._listed(tmp_path)] == ["a"]
    assert progressing._listed(tmp_path / "no folder") == []
    assert len(progressing._mtimes(tmp_path)) == 2


# the command


def tsclust(capsys, *words):
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, Path.touch, lambda path: item_per_file(path, 1)])
def test_where_there_is_nothing_it_ends_with_65_and_says_so(tmp_path, capsys, make):
    make(tmp_path / "dataset")
    code, out, err = tsclust(capsys, "status", tmp_path / "dataset")
    assert (code, out) == (65, "")
    assert f"{tmp_path / 'dataset'} is no dataset, run or matrix of distances" in err


def test_a_manifest_that_cannot_be_read_is_named(tmp_path, capsys):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset/manifest.json").write_text('{"format_version": 77}')
    code, _, err = tsclust(capsys, "status", tmp_path / "dataset")
    assert code == 65
    assert "format_version 77" in err


def test_a_person_and_a_program_read_the_same(place, options, capsys):
    write(place, options, 0, 2, 5)
    began = (work(place) / "plan.json").stat().st_mtime
    receipts_at(place, {0: began + 10, 2: began + 20, 5: began + 26})
    code, out, _ = tsclust(capsys, "status", place / "dataset")
    assert code == 0
    for words in (
        f"{place / 'dataset'} is not published yet: consolidation, 3 of 6 partitions done, 0 being written, 3 missing",
        "104 of 230 samples · 4 samples/s · about 31.5 s left at that rate", "missing: 1, 3, 4   (counted from 0)",
    ):  # fmt: skip
        assert words in out, words
    said = json.loads(tsclust(capsys, "status", place / "dataset", "--json")[1])
    assert (said["state"], said["work"][0]["missing_array"], said["published"]) == ("in work", "1,3-4", None)


def test_work_that_nobody_is_at_says_how_to_go_on(place, options, capsys):
    write(place, options, 0, 1)
    long_ago = time.time() - 7200
    for path in (*work(place).rglob("*"), work(place)):
        os.utime(path, (long_ago, long_ago))
    out = tsclust(capsys, "status", place / "dataset")[1]
    assert "last file written 2:00:0" in out
    assert "nobody seems to be at it" in out
    assert "its step --partition for 2-5" in out
    write(place, options, *range(2, 6))
    assert "all is written" in tsclust(capsys, "status", place / "dataset")[1]
    arrays.finalize(place / "source", place / "dataset", options)
    out = tsclust(capsys, "status", place / "dataset")[1]
    assert "is published: dataset · all 230 · " in out
    assert "made 20" in out
    assert "digest " in out
