"""The node-local lock: one process at a time, free when its holder dies, and never the reason a run fails."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading

import pytest

from tsclust_ooc.errors import TryAgain
from tsclust_ooc.locks import hold, name_for

HOLDER = """
import subprocess, sys
from pathlib import Path
from tsclust_ooc.locks import hold
with hold(Path(sys.argv[1]), wait_seconds=0, busy="taken") as held:
    silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    child = subprocess.Popen(["sleep", "600"], **silent) if sys.argv[2] == "with child" else None
    print("held" if held else "not held", child.pid if child else "", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """Start another process that holds the lock; returns (process, pid of its child or '')."""
    started = []

    def start(child="alone"):
        words = [sys.executable, "-c", HOLDER, tmp_path / "a.lock", child]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        state, _, child_pid = process.stdout.readline().rstrip("\n").partition(" ")
        started.append((process, child_pid))
        assert state == "held"
        return process, child_pid

    yield start
    for process, child_pid in started:
        process.kill()
        process.communicate()
        if child_pid:
            os.kill(int(child_pid), signal.SIGKILL)


def test_the_second_process_is_told_who_holds_the_lock_and_to_try_again(tmp_path, holder):
    process, _ = holder()
    with pytest.raises(TryAgain) as caught, hold(tmp_path / "a.lock", wait_seconds=0, busy="another run is at ett"):
        pass
    assert caught.value.exit_code == 75
    assert str(caught.value).startswith("another run is at ett (held by process ")
    assert f"process {process.pid} on {os.uname().nodename}" in str(caught.value)


@pytest.mark.parametrize("child", ["alone", "with child"])
def test_the_lock_of_a_killed_process_is_free_at_once_even_if_its_child_lives_on(tmp_path, holder, child):
    process, _ = holder(child)
    process.kill()
    process.wait()
    with hold(tmp_path / "a.lock", wait_seconds=0, busy="taken") as held:
        assert held


def test_a_lock_that_is_given_back_while_one_waits_is_got(tmp_path, holder):
    process, _ = holder()
    soon = threading.Timer(0.1, process.communicate, ("\n",))
    soon.start()
    with hold(tmp_path / "a.lock", wait_seconds=30, busy="taken") as held:
        assert held
    soon.join()
    assert process.returncode == 0


def test_a_lock_is_given_back_when_the_block_fails(tmp_path):
    with pytest.raises(ValueError, match="inside"), hold(tmp_path / "a.lock", wait_seconds=0, busy="taken"):
        raise ValueError("inside")
    with hold(tmp_path / "a.lock", wait_seconds=0, busy="taken") as held:
        assert held


def test_locks_of_other_names_do_not_hinder(tmp_path, holder):
    holder()
    with hold(tmp_path / "b.lock", wait_seconds=0, busy="taken") as held:
        assert held


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EIO], ids=errno.errorcode.get)
def test_a_filesystem_that_cannot_lock_costs_one_line_and_not_the_run(tmp_path, monkeypatch, heard, code):
    def refuse(fd, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold(tmp_path / "a.lock", wait_seconds=0, busy="taken", listener=heard) as held:
        assert held is False
    (said,) = heard.messages
    assert str(tmp_path) in said
    assert os.strerror(code) in said


def test_a_lock_that_was_not_got_names_no_holder(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda fd, operation: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks")))
    with hold(tmp_path / "a.lock", wait_seconds=0, busy="taken"):
        assert not (tmp_path / "a.holder").exists()


def test_every_spelling_of_a_target_has_the_same_lock(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path / "data")
    spellings = [tmp_path / "data" / "x", tmp_path / "link" / "x", tmp_path / "data" / ".." / "data" / "x", "x"]
    assert len({name_for(tmp_path, "write", type(tmp_path)(s)) for s in spellings}) == 1


def test_other_targets_and_other_purposes_have_other_locks(tmp_path):
    odd = os.fsdecode(b"caf\xe9 'x'\n")
    found = {name_for(tmp_path, p, tmp_path / t) for p in ("write", "stage") for t in ("a", "b", odd)}
    assert len(found) == 6
    assert all(path.parent == tmp_path and path.suffix == ".lock" and path.name.isascii() for path in found)
