"""Durable verbs: under its final name a file or directory is absent, old or whole, whatever fails or is killed.

Run as a script (`python test_files.py FOLDER exchange|aside`) this kills a writer at each of its file events.
"""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import resource
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import xxhash

from tsclust_ooc import files
from tsclust_ooc.errors import CannotWrite

KILLED = 137
OLD, NEW = {"a": b"old a", "in/b": b"old b"}, {"a": b"new a" * 5000, "in/b": b"", "in/c": b"new c"}
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "ctypes.dlsym"}


def build(folder, content):
    """A directory with `content`, written durably."""
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(folder / name, data)
    files.fsync_tree(folder)
    return folder


def tree(folder):
    """Every file below `folder` with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# ---- one file


@pytest.mark.parametrize("before", [None, b"old"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_writer_that_fails_leaves_what_was_there_and_nothing_else(tmp_path, before, error):
    path = tmp_path / "labels"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(error), files.atomic_file(path) as file:  # noqa: PT012 - the failure is inside
        file.write(b"half")
        file.flush()
        raise error
    assert names(tmp_path) == ([] if before is None else ["labels"])
    assert before is None or path.read_bytes() == before


@pytest.mark.parametrize("data", [b"", b"x", memoryview(b"some bytes"), os.urandom(3 << 20)], ids=len)
def test_what_is_written_is_there_and_alone(tmp_path, data):
    path = tmp_path / "a name with 'quotes'\nand a line"
    path.write_bytes(b"old")
    files.write_atomic(path, data)
    assert path.read_bytes() == bytes(data)
    assert names(tmp_path) == [path.name]


def test_until_the_block_ends_readers_see_the_old_file(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_bytes(b"old")
    with files.atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_a_file_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "chunk", []
    real_fsync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(os.readlink(f"/proc/self/fd/{fd}")), real_fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (seen.append("rename"), real_rename(a, b))[1])
    files.write_atomic(path, b"x")
    assert seen[0].endswith(".partial")
    assert seen[1:] == ["rename", str(tmp_path)]


def test_a_directory_that_went_away_is_not_made_again(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.write_atomic(tmp_path / "swept" / "chunk", b"x")
    assert names(tmp_path) == []


# ---- disks that do not take it


@pytest.fixture
def full_disk(tmp_path, monkeypatch):
    """A disk of 1 MB; where mounting is not allowed, a disk that says at fsync that it is full (as NFS does)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tsclust-test", disk], capture_output=True, check=False
    ).returncode == 0  # fmt: skip
    if not mounted:
        monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    yield disk
    if mounted:
        subprocess.run(["umount", disk], check=True)


def test_a_full_disk_ends_in_73_with_the_path_and_leaves_no_partial(full_disk):
    path = full_disk / "labels.parquet"
    with pytest.raises(CannotWrite, match="No space left") as caught:
        files.write_atomic(path, bytes(2 << 20))
    assert caught.value.exit_code == 73
    assert str(path) in str(caught.value)
    assert "run the same command again" in str(caught.value)
    assert names(full_disk) == []


def test_a_limit_on_file_size_ends_in_73_too(tmp_path):
    path, (soft, hard) = tmp_path / "big", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_bytes(b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CannotWrite, match="too large"):
            files.write_atomic(path, bytes(8192))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tree(tmp_path) == {"big": b"old"}


def test_a_name_that_is_too_long_is_named(tmp_path):
    with pytest.raises(CannotWrite, match=r"x{200}: File name too long"):
        files.write_atomic(tmp_path / ("x" * 250), b"")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG])
def test_what_a_user_can_mend_is_an_error_with_the_place(tmp_path, code):
    with pytest.raises(CannotWrite, match=os.strerror(code)), files.naming_the_place(tmp_path / "there"):
        raise OSError(code, os.strerror(code))


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EIO, errno.ESTALE])
def test_other_failures_keep_their_own_kind(tmp_path, code):
    with pytest.raises(OSError) as caught, files.naming_the_place(tmp_path):
        raise OSError(code, "other")
    assert caught.value.errno == code


# ---- directories


@pytest.fixture(params=["exchange", "aside"])
def swapping(request, monkeypatch):
    """With the kernel's exchange of two names, and without."""
    if request.param == "aside":
        monkeypatch.setattr(files, "exchange", lambda a, b: False)
    return request.param


@pytest.mark.parametrize("replace", [False, True])
def test_a_finished_directory_gets_its_name(tmp_path, replace):
    files.publish_dir(build(tmp_path / "work", NEW), tmp_path / "final", replace=replace)
    assert names(tmp_path) == ["final"]
    assert tree(tmp_path / "final") == NEW


def test_an_empty_directory_may_be_published_over(tmp_path):
    (tmp_path / "final").mkdir()
    files.publish_dir(build(tmp_path / "work", NEW), tmp_path / "final")
    assert tree(tmp_path / "final") == NEW


@pytest.mark.parametrize("taken_by", ["directory", "file", "link", "dangling link"])
def test_a_name_that_is_taken_is_refused_and_both_stay(tmp_path, taken_by):
    work, final = build(tmp_path / "work", NEW), tmp_path / "final"
    build(tmp_path / "other", OLD)
    {
        "directory": lambda: build(final, OLD),
        "file": lambda: final.write_bytes(b"mine"),
        "link": lambda: final.symlink_to(tmp_path / "other"),
        "dangling link": lambda: final.symlink_to(tmp_path / "nowhere"),
    }[taken_by]()
    before = os.lstat(final).st_ino
    with pytest.raises(CannotWrite, match=r"final already exists\. Use --overwrite"):
        files.publish_dir(work, final)
    assert tree(work) == NEW
    assert os.lstat(final).st_ino == before
    assert tree(tmp_path / "other") == OLD


@pytest.mark.parametrize("taken_by", ["directory", "file", "link", "dangling link"])
def test_replacing_puts_the_new_in_place_and_leaves_nothing_else(tmp_path, swapping, taken_by):
    place = tmp_path / "place"
    place.mkdir()
    final = place / "final"
    build(tmp_path / "other", OLD)
    {
        "directory": lambda: build(final, OLD),
        "file": lambda: final.write_bytes(b"old"),
        "link": lambda: final.symlink_to(tmp_path / "other"),
        "dangling link": lambda: final.symlink_to(tmp_path / "nowhere"),
    }[taken_by]()
    files.publish_dir(build(place / "work", NEW), final, replace=True)
    assert names(place) == ["final"]
    assert tree(final) == NEW
    assert tree(tmp_path / "other") == OLD


def test_replacing_never_leaves_the_name_without_a_directory(tmp_path, monkeypatch):
    final, seen = build(tmp_path / "final", OLD), []
    real = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: (seen.append(tree(final)), real(a, b), seen.append(tree(final))))
    work = build(tmp_path / "work", NEW)
    seen.clear()
    assert exchange_works(tmp_path), "this filesystem cannot exchange names; run the tests on ext4, xfs, btrfs or tmpfs"
    files.publish_dir(work, final, replace=True)
    assert seen == [NEW, NEW]


def exchange_works(folder):
    (folder / "x").mkdir()
    (folder / "y").mkdir()
    return files.exchange(folder / "x", folder / "y")


def test_exchange_swaps_two_names(tmp_path):
    one, other = build(tmp_path / "one", OLD), build(tmp_path / "other", NEW)
    assert files.exchange(one, other)
    assert (tree(one), tree(other)) == (NEW, OLD)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM])
def test_a_kernel_or_filesystem_without_exchange_is_no_error(tmp_path, monkeypatch, code):
    monkeypatch.setattr(ctypes, "get_errno", lambda: code)
    assert files.exchange(tmp_path / "nothing", tmp_path / "nothing too") is False


def test_exchange_of_what_is_not_there_is_an_error_with_the_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="final"):
        files.exchange(build(tmp_path / "work", NEW), tmp_path / "final")


def test_when_the_new_cannot_be_put_in_place_the_old_keeps_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "exchange", lambda a, b: False)
    work, final, real = build(tmp_path / "work", NEW), build(tmp_path / "final", OLD), os.rename

    def refusing(source, target):
        if source == work:
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", refusing)
    with pytest.raises(OSError, match="Input/output"):
        files.publish_dir(work, final, replace=True)
    assert names(tmp_path) == ["final", "work"]
    assert tree(final) == OLD


@pytest.mark.parametrize("replace", [False, True])
def test_a_rename_that_was_done_and_reported_as_failed_counts_as_done(tmp_path, monkeypatch, replace, swapping):
    work, final, real = build(tmp_path / "work", NEW), tmp_path / "final", os.rename
    if replace:
        build(final, OLD)

    def lost_reply(source, target):
        real(source, target)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", source)

    monkeypatch.setattr(os, "rename", lost_reply)
    files.publish_dir(work, final, replace=replace)
    files.write_atomic(tmp_path / "note", b"too")
    assert names(tmp_path) == ["final", "note"]
    assert tree(final) == NEW


def test_publishing_what_another_process_took_away_is_an_error_even_where_something_lies_there(tmp_path):
    build(tmp_path / "final", OLD)
    with pytest.raises(FileNotFoundError):
        files.publish_dir(tmp_path / "work", tmp_path / "final")
    assert tree(tmp_path / "final") == OLD


# ---- removing


def test_a_retired_tree_is_gone_and_retiring_it_again_is_no_error(tmp_path):
    build(tmp_path / "old", OLD)
    files.retire(tmp_path / "old")
    files.retire(tmp_path / "old")
    assert names(tmp_path) == []


def test_a_tree_has_lost_its_name_before_the_first_of_its_files_goes(tmp_path, monkeypatch):
    old, seen = build(tmp_path / "old", OLD), []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: seen.append((old.exists(), tree(path))))
    files.retire(old)
    assert seen == [(False, OLD)]


@pytest.mark.parametrize("name", ["ett", "ett[1]*?", ".hidden", "a b\n'c'"])
def test_a_sweep_takes_what_was_on_its_way_out_and_nothing_else(tmp_path, name):
    mine = [tmp_path / name, tmp_path / f".{name.lstrip('.')}.0123456789ab.wip"]
    others = [tmp_path / "other", tmp_path / f"{name}.v2", tmp_path / f"x{name}"]
    for path in [*mine, *others]:
        build(files.deleting_name(path), OLD)
        build(path, OLD)
    (files.deleting_name(mine[0])).symlink_to(tmp_path / "other")
    (tmp_path / f".{name}.abc.partial").write_bytes(b"of somebody else")
    kept = {p.name for p in [*mine, *others]} | {f".{name}.abc.partial"}
    files.sweep(tmp_path, name)
    left = set(names(tmp_path))
    assert kept <= left
    assert len(left) == len(kept) + len(others)
    assert tree(tmp_path / "other") == OLD


def test_a_sweep_of_a_folder_that_is_not_there_is_no_error(tmp_path):
    files.sweep(tmp_path / "nowhere", "x")


def test_partial_files_are_found_at_every_depth(tmp_path):
    build(tmp_path / "d", OLD)
    for folder in ("d", "d/in"):
        (tmp_path / folder / ".c.0123.partial").write_bytes(b"half")
    files.sweep_partials(tmp_path / "d")
    assert tree(tmp_path / "d") == OLD


# ---- looking


@pytest.mark.parametrize("n_bytes", [0, 1, (1 << 20) - 1, 1 << 20, (2 << 20) + 7])
def test_a_checksum_is_the_xxh3_of_the_bytes(tmp_path, n_bytes):
    data = os.urandom(n_bytes)
    (tmp_path / "x").write_bytes(data)
    expected = xxhash.xxh3_128(data).hexdigest()
    assert files.checksum(tmp_path / "x") == files.checksum_bytes(data) == expected
    assert len(expected) == 32


def test_walking_finds_the_wanted_files_and_does_not_follow_links(tmp_path):
    build(tmp_path / "d", NEW)
    (tmp_path / "d" / "loop").symlink_to(tmp_path / "d")
    assert {p.relative_to(tmp_path / "d") for p in files.walk_files(tmp_path / "d")} == set(map(Path, NEW))
    assert [p.name for p in files.walk_files(tmp_path, lambda name: name == "c")] == ["c"]


def test_free_space_is_that_of_the_filesystem_that_will_hold_the_path(tmp_path):
    free = files.free_bytes(tmp_path / "not" / "yet" / "there")
    stat = os.statvfs(tmp_path)
    assert 0 < free <= stat.f_blocks * stat.f_frsize
    assert files.existing_parent(tmp_path / "not" / "yet") == tmp_path
    assert files.existing_parent(tmp_path) == tmp_path


# ---- killed at every file event


@pytest.mark.parametrize("how", ["exchange", "aside"])
def test_a_writer_killed_at_any_file_event_leaves_old_or_new_whole(tmp_path, how):
    done = subprocess.run([sys.executable, __file__, tmp_path, how], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [tuple(one) for one in json.loads(done.stdout)]
    killed, states = seen[:-1], {state for _, state, _ in seen}
    assert seen[-1] == (0, "new", "new")
    assert len(killed) > 20
    assert {(status, then) for status, _, then in killed} == {(KILLED, "new")}
    assert {"old", "new"} <= states <= ({"old", "new"} if how == "exchange" else {"old", "new", "absent"})


def work_on(world):
    """What is killed: sweep what was left, write a directory, put it in place of the old, note it in a file."""
    files.sweep(world, "final")
    files.sweep_partials(world)
    files.retire(world / ".final.00.wip")
    files.publish_dir(build(world / ".final.00.wip", NEW), world / "final", replace=True)
    files.write_atomic(world / "note", b"new")


def state_of(world):
    note = (world / "note").read_bytes()
    assert note in (b"old", b"new"), note
    if not (world / "final").exists():
        return "absent"
    found = tree(world / "final")
    assert found in (OLD, NEW), found
    assert note == b"old" or found == NEW
    return "old" if found == OLD else "new"


def in_fork(action, n=0):
    """Exit status of `action` in a fork that dies at its n-th file event."""
    pid = os.fork()
    if pid == 0:
        count, status = 0, 70

        def hook(event, args):
            nonlocal count
            if event in EVENTS:
                count += 1
                if count == n:
                    os._exit(KILLED)

        try:
            sys.addaudithook(hook)
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def crash_sweep(world):
    """Kill at the 1st, 2nd, ... event, look, run again, look; until the work completes."""
    n, status, seen = 0, KILLED, []
    while status == KILLED:
        n += 1
        shutil.rmtree(world, ignore_errors=True)
        build(world / "final", OLD)
        files.write_atomic(world / "note", b"old")
        status = in_fork(lambda: work_on(world), n)
        after = state_of(world)
        assert in_fork(lambda: work_on(world)) == 0
        assert names(world) == ["final", "note"], names(world)
        seen.append((status, after, state_of(world)))
    return seen


if __name__ == "__main__":
    os.fsync = lambda fd: None  # a killed process loses nothing the kernel already has
    if sys.argv[2] == "aside":
        files.exchange = lambda a, b: False
    print(json.dumps(crash_sweep(Path(sys.argv[1], "world"))))


@pytest.mark.parametrize("name", ["result", ".hidden"])
def test_work_is_found_again_whatever_the_name_begins_with(tmp_path, name):
    work = files.work_name(tmp_path / name, "0123456789abcdef")
    work.mkdir()
    assert files.work_of(tmp_path / name) == [work]


def page_aligned(n):
    return memoryview(mmap.mmap(-1, n + 8192))


@pytest.mark.parametrize("place", ["disk", "memory"])
@pytest.mark.parametrize("shift", [0, 16], ids=["at a page", "beside a page"])
@pytest.mark.parametrize("n", [1, 4095, 4096, 4097, 3 * 4096, 1_000_003])
def test_what_is_poured_is_there_byte_for_byte(tmp_path, n, shift, place):
    folder = tmp_path if place == "disk" else Path("/dev/shm")
    memory = page_aligned(n)
    data = memory[shift : shift + n]
    data[:] = os.urandom(n)
    path = folder / f"poured-{os.getpid()}-{n}-{shift}"
    try:
        with files.atomic_file(path) as file:
            files.pour(file, data)
        assert path.read_bytes() == bytes(data)
    finally:
        path.unlink(missing_ok=True)


def test_read_only_memory_is_poured_too(tmp_path):
    with files.atomic_file(tmp_path / "a") as file:
        files.pour(file, memoryview(b"x" * 5000))
    assert (tmp_path / "a").read_bytes() == b"x" * 5000


def test_a_filesystem_that_cannot_go_past_the_cache_gets_the_bytes_the_usual_way(tmp_path, monkeypatch):
    real, refused = os.write, []

    def write(fd, data):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT and len(refused) < 1:
            refused.append(len(data))
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, data)

    data = page_aligned(20_000)[:20_000]
    data[:] = os.urandom(20_000)
    monkeypatch.setattr(os, "write", write)
    with files.atomic_file(tmp_path / "a") as file:
        files.pour(file, data)
    assert refused == [16_384]
    assert (tmp_path / "a").read_bytes() == bytes(data)


def test_a_full_disk_is_seen_past_the_cache_too(full_disk):
    data = page_aligned(4 * 2**20)[: 4 * 2**20]
    with pytest.raises(CannotWrite, match="No space left"), files.atomic_file(full_disk / "a") as file:
        files.pour(file, data)
    assert list(full_disk.glob("*")) == []
