"""The consolidate command: done, refused or to be run again, and never anything in between."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
import zarr
from sources import (
    ITEM,
    KEY,
    OPTIONS,
    contents,
    data_of,
    item_per_file,
    read_shard,
    shared_parsers,
    three_splits,
    values,
    write_shard,
)

from tsclust_ooc import budget, files, locks, scratch, tasks
from tsclust_ooc import consolidate as steps
from tsclust_ooc import work as work_dir
from tsclust_ooc.dataset import open_dataset, read_rejected, verify
from tsclust_ooc.errors import BadInput, CannotWrite, TryAgain, UsageError
from tsclust_ooc.pipeline import consolidating
from tsclust_ooc.pipeline.consolidating import BadShards, Consolidated, ConsolidateOptions, DryRun, consolidate
from tsclust_ooc.plan import make_plan
from tsclust_ooc.runtime import LEAST_WORKER_BYTES, Jobs
from tsclust_ooc.shards.parsers import Parsers
from tsclust_ooc.shards.survey import survey
from tsclust_ooc.staging import Staging

# distributed leaves a connection that was being made to a worker when that was killed to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")

SKIP = replace(OPTIONS, on_bad="skip")
OVERWRITE = replace(OPTIONS, overwrite=True)


class Hearing:
    """A listener that keeps what it hears."""

    def __init__(self):
        self.stages, self.said = [], []

    def advance(self, stage, done, total):
        self.stages.append((stage, done, total))

    def say(self, message):
        self.said.append(message)


def stored(dataset: Path, split: str = "all") -> np.ndarray:
    return zarr.open_array(dataset / "data.zarr" / split / KEY, mode="r")[:]


def beside(final: Path) -> set[str]:
    """Names that hold work for a dataset, or remains of it."""
    return {p.name for p in final.parent.iterdir() if p.name.startswith(f".{final.name}.")}


def inodes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_ino for p in folder.rglob("*") if p.is_file() and "/c/" in str(p)}


@pytest.fixture(scope="module", autouse=True)
def parsers():
    with shared_parsers(consolidating):
        yield


@pytest.fixture(autouse=True)
def own_scratch(tmp_path_factory, monkeypatch):
    """Locks and staged shards of each test in a folder of its own."""
    monkeypatch.setenv("TMPDIR", str(tmp_path_factory.mktemp("scratch")))
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)


def test_a_source_becomes_a_dataset_and_the_result_says_what_it_holds(tmp_path):
    wrote = three_splits(tmp_path / "source")
    hearing = Hearing()
    done = consolidate(tmp_path / "source", tmp_path / "ds", OPTIONS, hearing)
    assert isinstance(done, Consolidated)
    assert (done.n_shards, done.n_samples, done.n_rejected, done.reused) == (82, 82, 0, False)
    assert (done.item_shape, done.dtype, done.splits) == (ITEM, "<f4", {"train": 50, "val": 9, "test": 23})
    assert done.n_chunks == len(inodes(tmp_path / "ds")) == 3 + 1 + 2
    assert done.bytes == sum(len(data) for data in data_of(tmp_path / "ds").values())
    assert done.digest == open_dataset(tmp_path / "ds").manifest.digest
    assert done.peak_bytes > 0
    for split, samples in wrote.items():
        assert np.array_equal(stored(tmp_path / "ds", split), samples)
    assert beside(tmp_path / "ds") == set()
    assert ("write", 82, 82) in hearing.stages
    assert ("survey", 82, 82) in hearing.stages


def test_the_same_command_again_changes_nothing(tmp_path):
    three_splits(tmp_path / "source")
    first = consolidate(tmp_path / "source", tmp_path / "ds", OPTIONS)
    before = contents(tmp_path / "ds"), inodes(tmp_path / "ds")
    again = consolidate(tmp_path / "source", tmp_path / "ds", OPTIONS)
    assert (again.reused, again.digest, again.n_samples) == (True, first.digest, first.n_samples)
    assert (contents(tmp_path / "ds"), inodes(tmp_path / "ds")) == before


def test_the_source_is_never_changed(tmp_path):
    three_splits(tmp_path / "source")
    before = contents(tmp_path / "source"), {p: p.stat().st_mtime_ns for p in (tmp_path / "source").rglob("*")}
    consolidate(tmp_path / "source", tmp_path / "ds", OPTIONS)
    after = contents(tmp_path / "source"), {p: p.stat().st_mtime_ns for p in (tmp_path / "source").rglob("*")}
    assert after == before


def test_workers_and_staging_do_not_change_a_byte(tmp_path):
    three_splits(tmp_path / "source", (70, 9, 23))
    digests, datas = set(), []
    for i, change in enumerate([{"workers": 1}, {"workers": 2}, {"workers": 4}, {"stage": "always"}]):
        done = consolidate(tmp_path / "source", tmp_path / f"ds{i}", replace(OPTIONS, **change))
        digests.add(done.digest)
        datas.append(data_of(tmp_path / f"ds{i}"))
    assert len(digests) == 1
    assert all(data == datas[0] for data in datas)


def test_staged_shards_are_given_back(tmp_path):
    item_per_file(tmp_path / "source", 30)
    (tmp_path / "scratch").mkdir()
    consolidate(tmp_path / "source", tmp_path / "ds", replace(OPTIONS, stage="always", scratch=tmp_path / "scratch"))
    left = [p for p in (tmp_path / "scratch").rglob("*") if p.is_file() and p.suffix not in (".lock", ".holder")]
    assert left == []


# Bad shards


def three_bad(source: Path, n: int) -> np.ndarray:
    """`n` shards, three of them bad: one cut, one of another shape, one that only a read finds. The good samples."""
    samples = item_per_file(source, n)
    (source / "111.h5").write_bytes((source / "111.h5").read_bytes()[:-1])
    write_shard(source / "222.h5", values(1, (3, 12))[0])
    write_shard(source / "333.h5", samples[333], chunks=ITEM, fletcher32=True)
    with h5py.File(source / "333.h5") as file:
        at = file[KEY].id.get_chunk_info(0).byte_offset
    data = bytearray((source / "333.h5").read_bytes())
    data[at] ^= 1
    (source / "333.h5").write_bytes(data)
    return np.delete(samples, [111, 222, 333], axis=0)


def test_three_bad_shards_among_a_thousand_are_all_named_then_skipped_and_nothing_good_is_done_twice(tmp_path):
    source, final = tmp_path / "source", tmp_path / "ds"
    good = three_bad(source, 1000)
    wanted = {"111.h5": "truncated", "222.h5": "dim", "333.h5": "checksum"}
    with pytest.raises(BadShards, match=r"3 bad shards.*nothing was published") as caught:
        consolidate(source, final, OPTIONS)
    assert caught.value.exit_code == 65
    assert {p.path: p.code for p in caught.value.problems} == wanted
    assert all(f"{path}   {code}" in str(caught.value) for path, code in wanted.items())
    assert not final.exists()
    (work,) = (tmp_path / name for name in beside(final))
    assert len(list((work / "receipts").iterdir())) == 23  # of 24 partitions of 42 rows
    kept = inodes(work / "dataset")
    with pytest.raises(BadShards) as again:
        consolidate(source, final, OPTIONS)
    assert {p.path: p.code for p in again.value.problems} == wanted
    done = consolidate(source, final, SKIP)
    assert (done.n_shards, done.n_samples, done.n_rejected) == (997, 997, 3)
    assert np.array_equal(stored(final), good)
    assert {p.path: p.code for p in read_rejected(final)} == wanted
    assert json.loads((final / "rejected.json").read_text())["rejected"][0]["detail"]
    before_the_gap = {name for name in kept if int(name.split("/")[-3]) < 14}
    published = inodes(final)
    assert {published[name] for name in before_the_gap} == {kept[name] for name in before_the_gap}
    assert verify(open_dataset(final)) == []
    assert beside(final) == set()


def test_bad_shards_found_only_while_reading_are_skipped_in_one_command(tmp_path):
    source = tmp_path / "source"
    good = three_bad(source, 400)
    hearing = Hearing()
    assert consolidate(source, tmp_path / "ds", SKIP, hearing).n_rejected == 3
    assert np.array_equal(stored(tmp_path / "ds"), good)
    assert hearing.said == ["1 shard found bad while reading; planning again without them"]


def test_a_mended_shard_is_read_again_and_the_rest_is_kept(tmp_path):
    source, final = tmp_path / "source", tmp_path / "ds"
    samples = item_per_file(source, 100)
    (source / "90.h5").write_bytes(b"")
    with pytest.raises(BadShards):
        consolidate(source, final, OPTIONS)
    (work,) = (tmp_path / name for name in beside(final))
    kept = inodes(work / "dataset")
    write_shard(source / "90.h5", samples[90])
    consolidate(source, final, OPTIONS)
    assert np.array_equal(stored(final), samples)
    published = inodes(final)
    for chunk in range(4):
        name = f"data.zarr/all/embeddings/c/{chunk}/0/0"
        assert published[name] == kept[name]


def test_what_was_skipped_is_still_an_error_for_a_command_that_does_not_skip(tmp_path):
    source, final = tmp_path / "source", tmp_path / "ds"
    item_per_file(source, 30)
    (source / "7.h5").write_bytes(b"")
    consolidate(source, final, SKIP)
    before = contents(final)
    assert consolidate(source, final, SKIP).reused
    with pytest.raises(BadShards, match=r"7\.h5"):
        consolidate(source, final, OPTIONS)
    assert contents(final) == before


def test_a_shard_that_is_bad_in_addition_is_never_left_out_in_silence(tmp_path):
    source, final = tmp_path / "source", tmp_path / "ds"
    item_per_file(source, 30)
    consolidate(source, final, SKIP)
    (source / "99.h5").write_bytes(b"")
    with pytest.raises(CannotWrite, match="--overwrite"):
        consolidate(source, final, SKIP)
    assert consolidate(source, final, replace(SKIP, overwrite=True)).n_rejected == 1
    assert [p.path for p in read_rejected(final)] == ["99.h5"]


def test_a_shard_that_changes_while_it_is_read_is_named_and_never_skipped(tmp_path, monkeypatch):
    source = tmp_path / "source"
    item_per_file(source, 30)
    real = os.preadv

    def touching(fd, buffers, offset):
        os.utime(source / "3.h5", ns=(1, 1))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", touching)
    with pytest.raises(BadShards, match=r"3\.h5   unstable"):
        consolidate(source, tmp_path / "ds", SKIP)
    monkeypatch.undo()
    assert consolidate(source, tmp_path / "ds", SKIP).n_samples == 30


# What is in the way


def test_another_dataset_is_replaced_only_when_asked(tmp_path):
    item_per_file(tmp_path / "one", 30)
    item_per_file(tmp_path / "two", 40, seed=3)
    consolidate(tmp_path / "one", tmp_path / "ds", OPTIONS)
    before = contents(tmp_path / "ds")
    with pytest.raises(CannotWrite, match=r"was not made from these shards and options.*--overwrite") as caught:
        consolidate(tmp_path / "two", tmp_path / "ds", OPTIONS)
    assert caught.value.exit_code == 73
    assert contents(tmp_path / "ds") == before
    consolidate(tmp_path / "two", tmp_path / "ds", OVERWRITE)
    assert np.array_equal(stored(tmp_path / "ds"), values(40, seed=3))
    assert beside(tmp_path / "ds") == set()


def test_a_damaged_dataset_is_made_anew_with_overwrite(tmp_path):
    samples = item_per_file(tmp_path / "source", 30)
    consolidate(tmp_path / "source", tmp_path / "ds", OPTIONS)
    chunk = tmp_path / "ds/data.zarr/all/embeddings/c/0/0/0"
    chunk.write_bytes(bytes(chunk.stat().st_size))
    assert not consolidate(tmp_path / "source", tmp_path / "ds", OVERWRITE).reused
    assert np.array_equal(stored(tmp_path / "ds"), samples)


@pytest.mark.parametrize("options", [OPTIONS, OVERWRITE])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_not_ours_is_never_replaced(tmp_path, options, kind):
    item_per_file(tmp_path / "source", 5)
    thesis = tmp_path / "ds" / "thesis.tex" if kind == "folder" else tmp_path / "ds"
    thesis.parent.mkdir(exist_ok=True)
    thesis.write_text("ten years")
    with pytest.raises(CannotWrite):
        consolidate(tmp_path / "source", tmp_path / "ds", options)
    assert thesis.read_text() == "ten years"


def test_an_empty_folder_is_no_obstacle(tmp_path):
    item_per_file(tmp_path / "source", 5)
    (tmp_path / "ds").mkdir()
    assert consolidate(tmp_path / "source", tmp_path / "ds", OPTIONS).n_samples == 5


@pytest.mark.parametrize("place", ["source/ds", "source/train/../ds", "link/ds", "source"])
def test_a_dataset_inside_its_source_is_refused(tmp_path, place):
    item_per_file(tmp_path / "source" / "train", 3)
    (tmp_path / "link").symlink_to(tmp_path / "source")
    before = contents(tmp_path / "source")
    with pytest.raises(UsageError, match="which is only read from"):
        consolidate(tmp_path / "source", tmp_path / place, OPTIONS)
    assert contents(tmp_path / "source") == before


def test_a_source_that_is_not_there_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="is not there"):
        consolidate(tmp_path / "nowhere", tmp_path / "ds", OPTIONS)


@pytest.mark.parametrize(("name", "value"), [("on_bad", "ignore"), ("stage", "maybe")])
def test_options_that_cannot_be_meant_are_refused(name, value):
    with pytest.raises(UsageError, match=value):
        ConsolidateOptions(**{name: value})


# Budgets


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(tmp_path):
    three_splits(tmp_path / "source")
    (tmp_path / "source" / "train" / "7.h5").write_bytes(b"")
    before = contents(tmp_path)
    plan = consolidate(tmp_path / "source", tmp_path / "ds", replace(OPTIONS, dry_run=True, memory="2GB"))
    assert isinstance(plan, DryRun)
    assert (plan.n_shards, plan.n_samples, plan.n_rejected) == (81, 81, 1)
    assert (plan.n_chunks, plan.n_partitions) == (3 + 1 + 2, 2 + 1 + 1)
    assert plan.disk_bytes == (3 * 21 + 9 + 2 * 21) * 192
    assert plan.n_workers == 2
    assert contents(tmp_path) == before
    assert beside(tmp_path / "ds") == set()


def test_memory_that_cannot_be_enough_is_refused_with_what_would_be(tmp_path, monkeypatch):
    item_per_file(tmp_path / "source", 10, item=(20, 768))
    monkeypatch.setattr(budget, "BASE_BYTES", 100 * 10**6)
    tight = replace(OPTIONS, chunk_bytes="16MiB", memory="101MB")
    for options in (tight, replace(tight, dry_run=True)):
        with pytest.raises(CannotWrite, match="--memory allows 101 MB") as caught:
            consolidate(tmp_path / "source", tmp_path / "ds", options)
        assert caught.value.exit_code == 73
    assert beside(tmp_path / "ds") == set()
    assert consolidate(tmp_path / "source", tmp_path / "ds", replace(tight, chunk_bytes="200000")).n_samples == 10


def test_a_disk_that_is_too_small_is_refused_before_a_chunk_is_written(tmp_path, monkeypatch):
    item_per_file(tmp_path / "source", 50)
    monkeypatch.setattr(files, "free_bytes", lambda path: 9000)
    with pytest.raises(CannotWrite, match=r"needs 12\.3 kB.*9\.00 kB free"):
        consolidate(tmp_path / "source", tmp_path / "ds", OPTIONS)
    assert beside(tmp_path / "ds") == set()


# Others at the same work, and ends before the end

COMMAND = """
import sys
import time
from tsclust_ooc.pipeline.consolidating import ConsolidateOptions, consolidate
consolidate(sys.argv[1], sys.argv[2], ConsolidateOptions(chunk_bytes="4096", workers=2))
"""


def test_who_comes_second_is_told_to_try_again(tmp_path):
    item_per_file(tmp_path / "source", 5)
    lock = locks.name_for(scratch.scratch_dir(), "consolidate", tmp_path / "ds")
    with locks.hold(lock, wait_seconds=1, busy=""), pytest.raises(TryAgain, match="Run the same command") as caught:
        consolidate(tmp_path / "source", tmp_path / "ds", OPTIONS)
    assert caught.value.exit_code == 75
    assert consolidate(tmp_path / "source", tmp_path / "ds", OPTIONS).n_samples == 5


def test_a_killed_command_is_finished_by_the_same_command_with_the_same_bytes(tmp_path):
    source, final = tmp_path / "source", tmp_path / "ds"
    three_splits(source, (150, 30, 60))
    consolidate(source, tmp_path / "whole", OPTIONS)
    head, _, tail = COMMAND.partition("consolidate(sys")
    killer = (
        f"{head}import os, signal\nfrom tsclust_ooc import consolidate as steps\nreal = steps._write_partition\n"
        "def dying(work, reader, partition):\n"
        "    if partition.index == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(work, reader, partition)\n"
        f"steps._write_partition = dying\nconsolidate(sys{tail}"
    )
    ended = subprocess.run([sys.executable, "-c", killer, source, final], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not final.exists()
    (work,) = (tmp_path / name for name in beside(final))
    kept = inodes(work / "dataset")
    done = consolidate(source, final, OPTIONS)
    assert not done.reused
    assert data_of(final) == data_of(tmp_path / "whole")
    published = inodes(final)
    assert not any("partial" in name for name in published)
    assert any(published.get(name) == inode for name, inode in kept.items())  # what had a receipt was not done again


# Processes

LOCAL = replace(OPTIONS, scheduler="local", workers=2, memory="2GB", stage="always")


class Striking(Hearing):
    """Ends a process of this command with SIGKILL when the first partition is done; `parsers` are those it had."""

    def __init__(self, whom):
        super().__init__()
        self.whom, self.parsers = whom, []

    def advance(self, stage, done, total):
        if stage == "write" and self.whom:
            victim = self.whom()
            self.whom = None
            self.parsers = [child.pid for child in victim.children()]
            victim.kill()


def a_worker() -> psutil.Process:
    """A worker process of this one that has a parser."""
    return next(
        worker
        for worker in psutil.Process().children()
        if any("tsclust_ooc.shards.child" in child.cmdline() for child in worker.children())
    )


def needing_parsers(source: Path, n: int) -> np.ndarray:
    """Shards that no template fits, so that worker processes have parsers."""
    return item_per_file(source, n, chunks=ITEM, fletcher32=True)


def in_scratch(place: Path) -> list[Path]:
    """Files of staging and clusters that were left in scratch."""
    return [p for p in place.rglob("*") if p.is_file() and p.suffix not in (".lock", ".holder")]


def test_worker_processes_write_the_same_bytes_even_when_one_is_killed(tmp_path):
    needing_parsers(tmp_path / "source", 400)
    (tmp_path / "scratch").mkdir()
    threads = consolidate(tmp_path / "source", tmp_path / "threads", OPTIONS)
    striking = Striking(a_worker)
    asked = replace(LOCAL, scratch=tmp_path / "scratch")
    local = consolidate(tmp_path / "source", tmp_path / "local", asked, striking)
    assert striking.parsers
    assert not any(psutil.pid_exists(pid) for pid in striking.parsers)
    assert local.digest == threads.digest
    assert data_of(tmp_path / "local") == data_of(tmp_path / "threads")
    assert local.dashboard.startswith("http://127.0.0.1:")
    assert in_scratch(tmp_path / "scratch") == []


def test_a_command_killed_with_its_cluster_is_finished_by_the_same_command(tmp_path):
    needing_parsers(tmp_path / "source", 400)
    (tmp_path / "scratch").mkdir()
    consolidate(tmp_path / "source", tmp_path / "threads", OPTIONS)
    places = [str(tmp_path / name) for name in ("source", "local", "scratch")]
    ended = subprocess.run([sys.executable, __file__, *places], stderr=subprocess.DEVNULL, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "local").exists()
    # Its workers notice soon that they are alone. Until then they hold leases, which nobody takes from the living.
    deadline = time.monotonic() + 60
    while [p for p in tmp_path.rglob("*.lease") if Path("/proc", p.name.split(".")[-2]).exists()]:
        assert time.monotonic() < deadline, "workers outlive their cluster"
        time.sleep(0.05)
    asked = replace(LOCAL, scheduler="threads", scratch=tmp_path / "scratch")
    done = consolidate(tmp_path / "source", tmp_path / "local", asked)
    assert not done.reused
    assert data_of(tmp_path / "local") == data_of(tmp_path / "threads")
    assert in_scratch(tmp_path / f"scratch/tsclust-{os.getuid()}/stage") == []


def test_a_task_is_small_named_and_does_what_a_thread_does(tmp_path, monkeypatch):
    source = tmp_path / "source"
    needing_parsers(source, 500)
    consolidate(source, tmp_path / "whole", OPTIONS)
    with Parsers(1) as parsers:
        plan = make_plan(survey(source, parsers), OPTIONS.plan_options())
    work = steps.init(tmp_path / "ds", plan, ())
    staging = Staging("always", asked=tmp_path / "scratch")
    (tmp_path / "scratch").mkdir()
    assert tasks.write_task(work, Staging("never")).task_name == "write-chunk"
    task = tasks.write_task(work, staging)
    assert task.task_name == "stage-write-chunk"
    assert len(pickle.dumps((task, plan.partitions[0]))) < 1000
    monkeypatch.setattr(tasks, "_IDLE_SECONDS", 0.2)
    assert steps.run(work, task, map) == []
    (bench,) = tasks._benches.values()
    bench.closing.join(10)
    assert tasks._benches == {}
    assert in_scratch(tmp_path / "scratch") == []
    steps.finalize(work, replace_existing=False)
    assert data_of(tmp_path / "ds") == data_of(tmp_path / "whole")
    with pytest.raises(work_dir.Superseded):
        task(plan.partitions[0])


def test_workers_are_as_many_as_the_memory_holds(tmp_path):
    item_per_file(tmp_path / "source", 200)
    asked = replace(OPTIONS, dry_run=True, workers=4)
    plan_bytes = 200 * 700
    base, least = budget.BASE_BYTES + plan_bytes, LEAST_WORKER_BYTES + 2 * 4032 + 21 * 560 + plan_bytes
    for n in (1, 2, 3):
        local = replace(asked, scheduler="local", memory=str(base + n * least))
        plan = consolidate(tmp_path / "source", tmp_path / "ds", local)
        assert (plan.n_workers, plan.memory_bytes) == (n, base + n * least)
    with pytest.raises(CannotWrite, match="consolidation needs 800 MB of memory with one worker"):
        consolidate(tmp_path / "source", tmp_path / "ds", replace(local, memory=str(base + least - 1)))
    slurm = replace(asked, scheduler="slurm", memory="500MB", jobs=Jobs(job_memory="1GB", job_cores=4, interface="lo"))
    with pytest.raises(CannotWrite, match=r"--job-memory"):
        consolidate(tmp_path / "source", tmp_path / "ds", slurm)
    assert consolidate(tmp_path / "source", tmp_path / "ds", replace(slurm, jobs=Jobs(interface="lo"))).n_workers == 4
    assert consolidate(tmp_path / "source", tmp_path / "ds", asked).n_workers == 4


def test_a_single_file_is_a_source(tmp_path):
    write_shard(tmp_path / "all.h5", values(50, (16,)))
    done = consolidate(tmp_path / "all.h5", tmp_path / "ds", replace(OPTIONS, layout="rows-per-file"))
    assert done.n_samples == 50
    assert np.array_equal(stored(tmp_path / "ds"), read_shard(tmp_path / "all.h5"))


def test_home_is_understood(tmp_path, monkeypatch):
    samples = item_per_file(tmp_path / "source", 3)
    monkeypatch.setenv("HOME", str(tmp_path))
    consolidate("~/source", "~/made/deep/ds", OPTIONS)
    assert np.array_equal(stored(tmp_path / "made/deep/ds"), samples)


if __name__ == "__main__":  # a command that dies with SIGKILL when its first partition is written by a worker process
    consolidate(*sys.argv[1:3], replace(LOCAL, scratch=Path(sys.argv[3])), Striking(psutil.Process))
