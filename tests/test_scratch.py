"""The private directory on a disk of this node."""

import os
import stat
import subprocess

import pytest

from tsclust_ooc import scratch
from tsclust_ooc.errors import CannotWrite
from tsclust_ooc.scratch import filesystem_type, is_network, scratch_dir


def mode(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


def test_the_directory_is_below_the_place_asked_for_ours_alone_and_found_again(tmp_path):
    made = scratch_dir(tmp_path)
    assert made.parent == tmp_path
    assert mode(made) == 0o700
    assert os.lstat(made).st_uid == os.getuid()
    assert scratch_dir(tmp_path) == made


@pytest.mark.parametrize("planted", ["link", "open to others", "file"])
def test_a_directory_somebody_else_prepared_is_not_used(tmp_path, planted):
    expected = tmp_path / f"tsclust-{os.getuid()}"
    (tmp_path / "trap").mkdir(mode=0o700)
    if planted == "link":
        expected.symlink_to(tmp_path / "trap")
    elif planted == "file":
        expected.write_text("")
    else:
        expected.mkdir()
        expected.chmod(0o777)
    made = scratch_dir(tmp_path)
    assert made not in (expected, tmp_path / "trap")
    assert mode(made) == 0o700
    assert not made.is_symlink()


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_place_that_is_no_directory_is_refused_by_name(tmp_path, kind):
    place = tmp_path / "place"
    if kind == "file":
        place.write_text("")
    with pytest.raises(CannotWrite, match="not a writable directory") as caught:
        scratch_dir(place)
    assert str(place) in str(caught.value)
    assert "--scratch" in str(caught.value)


@pytest.fixture
def mounts(tmp_path, monkeypatch):
    """A pretended mount table; returns a function that writes it, from {path below tmp_path: type}."""

    def write(table):
        lines = ["/dev/vda / ext4 rw 0 0\n"]
        for name, kind in table.items():
            path = tmp_path / name
            path.mkdir(parents=True, exist_ok=True)
            octal = str(path).replace("\\", "\\134").replace(" ", "\\040").replace("\n", "\\012").replace("\t", "\\011")
            lines.append(f"server:/x {octal} {kind} rw 0 0\n")
        table_path = tmp_path / "mounts"
        table_path.write_bytes(os.fsencode("".join(lines)))
        monkeypatch.setattr(scratch, "_MOUNTS", table_path)

    return write


@pytest.mark.parametrize(
    "name", ["plain", "a b", "tab\tnewline\n", "back\\slash", "é b", os.fsdecode(b"caf\xe9 b"), "\\040"]
)
def test_the_mount_is_found_whatever_its_name(tmp_path, mounts, name):
    mounts({name: "nfs4"})
    assert filesystem_type(tmp_path / name / "not yet there") == "nfs4"
    assert is_network(tmp_path / name)
    assert filesystem_type(tmp_path) == "ext4"


def test_the_innermost_mount_counts_and_names_that_only_begin_alike_do_not(tmp_path, mounts):
    mounts({"a": "lustre", "a/in": "xfs"})
    (tmp_path / "ab").mkdir()
    kinds = {name: filesystem_type(tmp_path / name) for name in ("a", "a/in", "a/in/x", "a/inner", "ab")}
    assert kinds == {"a": "lustre", "a/in": "xfs", "a/in/x": "xfs", "a/inner": "lustre", "ab": "ext4"}


def test_of_two_mounts_at_one_place_the_later_counts(tmp_path, mounts):
    mounts({"a": "autofs"})
    with (tmp_path / "mounts").open("a") as table:
        table.write(f"server:/x {tmp_path / 'a'} nfs4 rw 0 0\n")
    assert filesystem_type(tmp_path / "a") == "nfs4"


def test_a_link_to_a_network_filesystem_is_seen_through(tmp_path, mounts):
    mounts({"nfs": "nfs"})
    (tmp_path / "link").symlink_to(tmp_path / "nfs")
    assert is_network(tmp_path / "link")


def test_without_a_mount_table_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch, "_MOUNTS", tmp_path / "none")
    assert filesystem_type(tmp_path) == ""
    assert not is_network(tmp_path)


def test_the_real_mount_table_agrees_with_df(tmp_path):
    shown = subprocess.run(["df", "--output=fstype", tmp_path], capture_output=True, text=True, check=True).stdout
    assert filesystem_type(tmp_path) == shown.split()[-1]


def test_by_default_network_and_memory_filesystems_are_passed_over(tmp_path, mounts, monkeypatch):
    mounts({"nfs": "nfs4", "ram": "tmpfs", "disk": "ext4"})
    monkeypatch.setattr(scratch, "_places", lambda: [tmp_path / name for name in ("gone", "nfs", "ram", "disk")])
    assert scratch_dir().parent == tmp_path / "disk"


def test_a_network_place_that_was_asked_for_is_used(tmp_path, mounts):
    mounts({"nfs": "nfs4"})
    assert scratch_dir(tmp_path / "nfs").parent == tmp_path / "nfs"


def test_the_scheduler_s_directory_comes_first(tmp_path, mounts, monkeypatch):
    mounts({"job": "xfs", "tmp": "xfs"})
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "job"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    assert scratch_dir().parent == tmp_path / "job"
    monkeypatch.delenv("SLURM_TMPDIR")
    assert scratch_dir().parent == tmp_path / "tmp"


def test_when_no_place_will_do_each_is_named_with_its_reason(tmp_path, mounts, monkeypatch):
    mounts({"nfs": "nfs4"})
    monkeypatch.setattr(scratch, "_places", lambda: [tmp_path / "gone", tmp_path / "nfs"])
    with pytest.raises(CannotWrite) as caught:
        scratch_dir()
    assert f"{tmp_path / 'gone'} (not a writable directory), {tmp_path / 'nfs'} (nfs4)" in str(caught.value)
