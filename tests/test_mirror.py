"""Local copies of objects: there while they are used, gone when nobody does, never where a name of an object says."""

import os
import signal
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
from objects import bucket, environment, proxied, s3_server
from test_remote import QUICK, through

from tsclust_ooc import files
from tsclust_ooc import mirror as mirror_module
from tsclust_ooc.errors import CannotWrite
from tsclust_ooc.mirror import FOLDER, Mirror
from tsclust_ooc.patience import PASSING, Patience
from tsclust_ooc.remote import Found, Remote


@pytest.fixture(scope="module")
def server():
    with s3_server() as port, environment(port):
        yield port


class Counting(Remote):
    """A remote in memory that notes what is fetched."""

    def fetch(self, path, size, target):
        with _noting:
            _fetched.append(path)
        super().fetch(path, size, target)


_fetched, _noting = [], threading.Lock()


@pytest.fixture
def place():
    """A fresh folder of a filesystem in memory, and its URL."""
    fs = fsspec.filesystem("memory")
    fs.rm("/place", recursive=True) if fs.exists("/place") else None
    _fetched.clear()
    return fs, Counting("memory://place")


def put(fs, n, size=10, name="{}.h5"):
    for i in range(n):
        fs.pipe_file("/place/" + name.format(i), bytes([i]) * size)


def by_name(remote):
    return sorted(remote.objects(), key=lambda found: found.path)


def kept(mirror):
    return list(files.walk_files(mirror.folder))


def test_what_is_brought_is_there_with_its_bytes_and_its_stamp(place, tmp_path):
    fs, remote = place
    put(fs, 30)
    entries = by_name(remote)
    with Mirror(remote, tmp_path) as mirror, mirror.bring(entries) as local:
        for entry in entries:
            found = os.stat(local(entry.path))
            assert (found.st_size, found.st_mtime_ns) == (entry.size, entry.mtime_ns)
            with open(local(entry.path), "rb") as file:
                assert file.read() == fs.cat_file(f"/place/{entry.path}")


def test_a_closed_mirror_leaves_nothing(place, tmp_path):
    fs, remote = place
    put(fs, 3)
    with Mirror(remote, tmp_path) as mirror:
        with mirror.bring(remote.objects()):
            assert stat.S_IMODE(mirror.folder.stat().st_mode) == 0o700
        assert len(kept(mirror)) == 3
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_what_is_asked_for_again_is_not_fetched_again(place, tmp_path):
    fs, remote = place
    put(fs, 5)
    with Mirror(remote, tmp_path) as mirror:
        for _ in range(3):
            with mirror.bring(remote.objects()):
                pass
        assert sorted(_fetched) == [f"{i}.h5" for i in range(5)]
        assert (mirror.n_fetched, mirror.bytes_fetched) == (5, 50)


def test_another_version_of_an_object_is_fetched(place, tmp_path):
    fs, remote = place
    put(fs, 1)
    with Mirror(remote, tmp_path) as mirror:
        with mirror.bring(remote.objects()):
            pass
        (entry,) = remote.objects()
        fs.pipe_file("/place/0.h5", b"another it")
        later = Found(entry.path, entry.size, entry.mtime_ns + 1, "")
        with mirror.bring([later]) as local, open(local("0.h5"), "rb") as file:
            assert file.read() == b"another it"


def test_what_was_used_longest_ago_goes_when_the_limit_is_reached(place, tmp_path):
    fs, remote = place
    put(fs, 4)
    entries = by_name(remote)
    with Mirror(remote, tmp_path, limit_bytes=20) as mirror:
        for i in (0, 1, 0, 2):
            with mirror.bring([entries[i]]):
                pass
        assert len(kept(mirror)) == 2
        _fetched.clear()
        for i in (0, 2, 1):
            with mirror.bring([entries[i]]):
                pass
        assert _fetched == ["1.h5"]


def test_what_is_in_use_stays_whatever_the_limit(place, tmp_path):
    fs, remote = place
    put(fs, 6)
    entries = by_name(remote)
    with Mirror(remote, tmp_path, limit_bytes=15) as mirror:
        with mirror.bring(entries[:4]) as local:
            with mirror.bring(entries[3:]) as others:
                assert all(os.path.exists(local(entry.path)) for entry in entries[:4])
                assert all(os.path.exists(others(entry.path)) for entry in entries[3:])
            assert os.path.exists(local("3.h5"))
        assert len(kept(mirror)) == 1


def test_two_threads_that_want_the_same_fetch_it_once(place, tmp_path):
    fs, remote = place
    put(fs, 40)
    entries = by_name(remote)

    def read(_):
        with mirror.bring(entries) as local:
            return [open_and_read(local(entry.path)) for entry in entries]

    with Mirror(remote, tmp_path) as mirror, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(read, range(8)))
    assert answers == [[bytes([i]) * 10 for i in sorted(range(40), key=str)]] * 8
    assert len(_fetched) == 40


def open_and_read(path):
    with open(path, "rb") as file:
        return file.read()


def test_copies_stay_right_while_many_threads_come_and_go_under_a_tight_limit(place, tmp_path):
    fs, remote = place
    put(fs, 50)
    entries = remote.objects()

    def read(i):
        some = entries[i % 40 : i % 40 + 7]
        with mirror.bring(some) as local:
            return all(open_and_read(local(e.path)) == fs.cat_file(f"/place/{e.path}") for e in some)

    with Mirror(remote, tmp_path, limit_bytes=100) as mirror, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(400)))
        assert len(kept(mirror)) <= 10


@pytest.mark.parametrize(
    "name",
    ["../out.h5", "/absolute.h5", "a/../../out.h5", "x" * 300 + ".h5", "a b%20?x#y+z.h5", "\u00fc.h5", "a//b.h5"],
)
def test_no_name_of_an_object_reaches_the_filesystem(server, tmp_path, name):
    where, fs = bucket(server)
    key = f"{where}/d/{name}"
    fs.call_s3("put_object", Bucket=where, Key=f"d/{name}", Body=b"hostile")
    found = [one for one in Remote(f"s3://{where}/d").objects() if one.size == 7]
    assert [one.path for one in found] == [name], key
    (tmp_path / "scratch").mkdir()
    with Mirror(Remote(f"s3://{where}/d"), tmp_path / "scratch") as mirror, mirror.bring(found) as local:
        path = local(name)
        assert open_and_read(path) == b"hostile"
        assert os.path.realpath(path).startswith(f"{mirror.folder}/")
        assert path.endswith(".h5")
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]


def test_an_object_that_vanished_or_changed_is_a_failure_of_its_own(place, tmp_path):
    fs, remote = place
    put(fs, 4)
    entries = by_name(remote)
    fs.rm_file("/place/1.h5")
    fs.pipe_file("/place/2.h5", b"longer than it was")
    with Mirror(remote, tmp_path) as mirror, mirror.bring(entries) as local:
        assert os.path.exists(local("0.h5"))
        with pytest.raises(FileNotFoundError):
            local("1.h5")
        with pytest.raises(OSError, match="10 bytes then, 18 now") as told:
            local("2.h5")
        assert told.value.errno not in PASSING
        assert os.path.exists(local("3.h5"))
    assert len(entries) == 4


def test_a_failure_that_passed_is_not_remembered(server, tmp_path, monkeypatch):
    name, fs = bucket(server)
    fs.pipe_file(f"{name}/a.h5", b"abc")
    entries = Remote(f"s3://{name}").objects()
    with proxied(server, lambda method, path, n: 503 if n <= 3 else None) as proxy:
        through(proxy, monkeypatch)
        patience = Patience(tries=2, **QUICK)
        with Mirror(Remote(f"s3://{name}", patience), tmp_path) as mirror:
            with mirror.bring(entries) as local, pytest.raises(OSError, match="no"):
                local("a.h5")
            with mirror.bring(entries) as local:
                assert open_and_read(local("a.h5")) == b"abc"
    assert patience.n_retries == 2


def test_scratch_without_room_is_refused_with_both_figures(place, tmp_path, monkeypatch):
    fs, remote = place
    put(fs, 3, size=2000)
    with Mirror(remote, tmp_path) as mirror:
        monkeypatch.setattr(files, "free_bytes", lambda path: 4000)
        with (
            pytest.raises(CannotWrite, match=r"4\.00 kB free.* memory://place has 6\.00 kB.*--scratch"),
            mirror.bring(remote.objects()),
        ):
            pass


def test_what_a_killed_process_left_is_swept_and_what_is_alive_stays(place, tmp_path):
    _, remote = place
    code = (
        "import sys, time, pathlib, fsspec\n"
        "from tsclust_ooc.mirror import Mirror\nfrom tsclust_ooc.remote import Remote\n"
        "fsspec.filesystem('memory').pipe_file('/place/a.h5', b'abc'); r = Remote('memory://place')\n"
        "m = Mirror(r, pathlib.Path(sys.argv[1])); m.bring(r.objects()).__enter__()\n"
        "print(m.folder, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as dead,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as alive,
    ):
        try:
            left, used = dead.stdout.readline().strip(), alive.stdout.readline().strip()
            dead.kill()
            dead.wait()
            assert len(list(files.walk_files(left))) == 1
            with Mirror(remote, tmp_path):
                assert not os.path.exists(left)
                assert len(list(files.walk_files(used))) == 1
        finally:
            alive.send_signal(signal.SIGKILL)
    with Mirror(remote, tmp_path):
        pass
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_to_a_reader_it_is_a_stage_on_which_every_shard_has_to_be(place, tmp_path):
    fs, remote = place
    put(fs, 3)
    with Mirror(remote, tmp_path) as mirror:
        assert not mirror.reads_directly(10)
        with mirror.ahead(remote.objects):
            assert sorted(_fetched) == ["0.h5", "1.h5", "2.h5"]
            for one in remote.objects():
                with mirror.local(f"{remote}/{one.path}", (one.size, one.mtime_ns)) as path:
                    assert open_and_read(path) == fs.cat_file(f"/place/{one.path}")


def test_what_is_too_much_to_be_brought_ahead_is_brought_one_by_one(place, tmp_path, monkeypatch):
    fs, remote = place
    put(fs, 3)
    monkeypatch.setattr(mirror_module, "GROUP_BYTES", 29)
    with Mirror(remote, tmp_path) as mirror, mirror.ahead(remote.objects):
        assert _fetched == []
        (first, *_) = remote.objects()
        with mirror.local(first.path, first[1:3]) as path:
            assert os.path.getsize(path) == 10
        assert _fetched == [first.path]


def test_the_url_of_one_object_can_be_mirrored(place, tmp_path):
    fs, _ = place
    put(fs, 1)
    remote = Remote("memory://place/0.h5")
    (found,) = remote.objects()
    with Mirror(remote, tmp_path) as mirror, mirror.local(str(remote), found[1:3]) as path:
        assert os.path.getsize(path) == 10
