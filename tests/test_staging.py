"""Staging: what is copied, shared and given back, and that a copy is whole or not used."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest
from sources import contents

from tsclust_ooc import files, staging
from tsclust_ooc.errors import CannotWrite, UsageError
from tsclust_ooc.shards.schema import ShardError
from tsclust_ooc.shards.templates import stamp_of
from tsclust_ooc.staging import SMALL_BYTES, Stage, decide

# Children that only copy a file and die: no lock of another thread is theirs to wait for.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

FORK = multiprocessing.get_context("fork")
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def shard(tmp_path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "0.h5").write_bytes(os.urandom(100_000))
    return tmp_path / "source" / "0.h5"


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "stage"


def always(folder: Path) -> Stage:
    return Stage(folder, "always", on_network=False)


def fetch(stage: Stage, shard: Path) -> bytes:
    with stage.local(str(shard), stamp_of(shard)) as path:
        assert path != str(shard)
        return Path(path).read_bytes()


def left(folder: Path) -> set[str]:
    """Files that a stage left behind, but for the lock files that all shards share."""
    return {p.name for p in folder.rglob("*") if p.is_file() and p.suffix not in (".lock", ".holder")}


def damage(folder: Path) -> None:
    """Flip a byte of the staged copy and keep its size and times."""
    (copy,) = folder.rglob("*.shard")
    stamp = copy.stat()
    data = bytearray(copy.read_bytes())
    data[5000] ^= 1
    copy.write_bytes(data)
    os.utime(copy, ns=(stamp.st_mtime_ns, stamp.st_mtime_ns))


@pytest.mark.parametrize(
    ("size", "mode", "on_network", "answer"),
    [
        (1, "never", True, "direct"),
        (SMALL_BYTES + 1, "never", True, "direct"),
        (1, "always", False, "copy"),
        (1, "always", True, "copy"),
        (1, "auto", False, "direct"),
        (1, "auto", True, "direct"),
        (SMALL_BYTES, "auto", True, "direct"),
        (SMALL_BYTES + 1, "auto", True, "copy"),
        (SMALL_BYTES + 1, "auto", False, "direct"),
    ],
)
def test_what_is_copied(size, mode, on_network, answer):
    assert decide(size, mode, on_network=on_network) == answer


def test_an_unknown_mode_is_a_usage_error():
    with pytest.raises(UsageError, match="auto, always, never"):
        decide(1, "sometimes", on_network=True)


def test_a_shard_that_is_not_copied_is_read_where_it_lies(shard, folder):
    with Stage(folder, "never", on_network=True) as stage, stage.local(str(shard), stamp_of(shard)) as path:
        assert path == str(shard)
    assert not folder.exists()


def test_a_copy_is_made_once_has_the_stamp_of_its_source_and_is_given_back(shard, folder):
    with always(folder) as stage:
        for _ in range(3):
            assert fetch(stage, shard) == shard.read_bytes()
        with stage.local(str(shard), stamp_of(shard)) as path:
            assert stamp_of(path) == stamp_of(shard)
        assert (stage.copied, stage.reused) == (1, 0)
    assert left(folder) == set()


def test_another_process_reuses_a_copy_and_the_last_one_removes_it(shard, folder):
    first = always(folder)
    fetch(first, shard)
    with FORK.Pool(1) as pool:
        assert pool.apply(_in_another_process, (folder, shard)) == (0, 1, shard.read_bytes())
    assert list(folder.rglob("*.shard"))  # ours is still leased
    first.close()
    assert left(folder) == set()


def _in_another_process(folder: Path, shard: Path) -> tuple[int, int, bytes]:
    with always(folder) as stage:
        data = fetch(stage, shard)
        return stage.copied, stage.reused, data


def test_two_processes_at_once_copy_a_shard_once(shard, folder):
    (shard.parent / "1.h5").write_bytes(os.urandom(100_000))
    barrier, answers = SPAWN.Barrier(2), SPAWN.Queue()
    workers = [SPAWN.Process(target=_race, args=(folder, shard.parent, barrier, answers)) for _ in range(2)]
    for worker in workers:
        worker.start()
    counts = [answers.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sum(copied for copied, _ in counts) == 2  # two shards, each once
    assert sum(reused for _, reused in counts) == 2
    assert left(folder) == set()


def _race(folder: Path, source: Path, barrier, answers) -> None:
    stage = always(folder)
    barrier.wait(60)
    for shard in sorted(source.iterdir()):
        assert fetch(stage, shard) == shard.read_bytes()
    barrier.wait(60)
    stage.close()
    answers.put((stage.copied, stage.reused))


def die_holding(folder: Path, shard: Path, do=lambda stage: None) -> None:
    """A process that fetches the shard, does something, and is killed."""
    pid = os.fork()
    if pid == 0:
        stage = always(folder)
        fetch(stage, shard)
        do(stage)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)


def test_what_a_dead_process_left_is_reused_when_whole_and_swept_in_the_end(shard, folder):
    die_holding(folder, shard)
    assert len(left(folder)) == 3  # copy, digest, lease
    with always(folder) as stage:
        assert fetch(stage, shard) == shard.read_bytes()
        assert (stage.copied, stage.reused) == (0, 1)
    assert left(folder) == set()


def test_a_damaged_copy_is_never_used(shard, folder):
    die_holding(folder, shard)
    damage(folder)
    with always(folder) as stage:
        assert fetch(stage, shard) == shard.read_bytes()
        assert (stage.copied, stage.reused) == (1, 0)


def test_no_thread_uses_a_copy_that_another_has_not_checked_yet(shard, folder, monkeypatch):
    die_holding(folder, shard)
    damage(folder)
    checking, go_on = threading.Event(), threading.Event()
    real = files.checksum

    def slow(path):
        checking.set()
        assert go_on.wait(30)
        return real(path)

    monkeypatch.setattr(files, "checksum", slow)
    got = []
    with always(folder) as stage:
        threads = [threading.Thread(target=lambda: got.append(fetch(stage, shard))) for _ in range(3)]
        threads[0].start()
        assert checking.wait(30)
        for thread in threads[1:]:
            thread.start()
        go_on.set()
        for thread in threads:
            thread.join()
    assert got == [shard.read_bytes()] * 3


def test_a_crashed_copy_is_never_reused_and_its_pieces_are_swept(shard, folder, monkeypatch):
    monkeypatch.setattr(staging, "_COPY_BYTES", 1000)
    folder.mkdir()
    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr(os, "fsync", lambda fd: os.kill(os.getpid(), signal.SIGKILL))
        fetch(always(folder), shard)
        os._exit(1)
    os.waitpid(pid, 0)
    assert {name.rpartition(".")[2] for name in left(folder)} == {"partial", "lease"}
    other = shard.with_name("1.h5")
    other.write_bytes(b"another shard")
    with always(folder) as stage:
        fetch(stage, other)
    assert left(folder) == set()


def test_a_copy_without_a_digest_is_made_again(shard, folder):
    die_holding(folder, shard)
    next(folder.rglob("*.digest")).unlink()
    with always(folder) as stage:
        fetch(stage, shard)
        assert stage.copied == 1


def test_a_live_process_keeps_its_copy_when_others_close(shard, folder):
    ready, done = FORK.Event(), FORK.Event()
    keeper = FORK.Process(target=_keep, args=(folder, shard, ready, done))
    keeper.start()
    assert ready.wait(30)
    with always(folder) as stage:
        fetch(stage, shard)
    assert len(list(folder.rglob("*.shard"))) == 1
    done.set()
    keeper.join()
    assert keeper.exitcode == 0
    assert left(folder) == set()


def _keep(folder: Path, shard: Path, ready, done) -> None:
    with always(folder) as stage, stage.local(str(shard), stamp_of(shard)) as path:
        ready.set()
        assert done.wait(30)
        assert Path(path).read_bytes() == shard.read_bytes()


def test_a_changed_shard_is_another_shard(shard, folder):
    with always(folder) as stage:
        fetch(stage, shard)
        shard.write_bytes(b"new content")
        assert fetch(stage, shard) == b"new content"
        assert stage.copied == 2


@pytest.mark.parametrize("change", ["longer", "shorter", "mtime"])
def test_a_source_that_changes_while_it_is_copied_is_unstable(shard, folder, monkeypatch, change):
    stamp = stamp_of(shard)
    real = files.atomic_file

    def meddling(path):
        if path.suffix == ".shard":
            if change == "mtime":
                os.utime(shard, ns=(1, 1))
            else:
                os.truncate(shard, 100_001 if change == "longer" else 10)
        return real(path)

    monkeypatch.setattr(files, "atomic_file", meddling)
    with always(folder) as stage:
        with pytest.raises(ShardError) as caught, stage.local(str(shard), stamp):
            pass
        assert caught.value.problem.code == "unstable"
        assert not list(folder.rglob("*.shard"))
    assert left(folder) == set()


def test_idle_copies_make_room_and_those_in_use_stay(shard, folder, monkeypatch):
    other = shard.with_name("1.h5")
    other.write_bytes(os.urandom(100_000))
    third = shard.with_name("2.h5")
    third.write_bytes(os.urandom(100_000))
    room = 300_000

    def free(path):
        return room - sum(p.stat().st_size for p in folder.rglob("*.shard"))

    monkeypatch.setattr(files, "free_bytes", free)
    with always(folder) as stage:
        fetch(stage, shard)
        with stage.local(str(other), stamp_of(other)) as path:
            assert fetch(stage, third) == third.read_bytes()
            assert Path(path).read_bytes() == other.read_bytes()
            assert len(list(folder.rglob("*.shard"))) == 2  # the first was idle
        assert fetch(stage, shard) == shard.read_bytes()
        assert stage.copied == 4


def test_a_full_scratch_is_named_with_what_to_do(shard, folder, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    with always(folder) as stage, pytest.raises(CannotWrite, match=r"1\.00 kB free.*100 kB.*--stage never"):
        fetch(stage, shard)


def test_the_source_is_never_touched(shard, folder):
    before = contents(shard.parent), stamp_of(shard)
    with always(folder) as stage:
        fetch(stage, shard)
    assert (contents(shard.parent), stamp_of(shard)) == before


def test_lock_files_do_not_grow_with_the_number_of_shards(shard, folder):
    with always(folder) as stage:
        for i in range(40):
            path = shard.with_name(f"n{i}.h5")
            path.write_bytes(b"x")
            fetch(stage, path)
    assert all(len(path.stem) == 2 for path in folder.iterdir())  # at most 256 names, whatever is staged
