"""A result on an object store: complete or without a manifest, whatever kills the upload; nothing of others touched."""

import json
import os
import signal
import subprocess
import sys

import pytest
from objects import bucket, environment, objects, proxied, s3_server
from test_remote import QUICK, through

from tsclust_ooc import files, uploading
from tsclust_ooc.errors import BadInput, CannotWrite, TryAgain
from tsclust_ooc.patience import Patience
from tsclust_ooc.remote import Remote
from tsclust_ooc.uploading import MARKER, upload


@pytest.fixture(scope="module")
def server():
    with s3_server() as port, environment(port):
        yield port


@pytest.fixture
def place(server):
    """A fresh URL, what is there now, and the filesystem that says so."""
    name, fs = bucket(server)
    return Remote(f"s3://{name}/data/set"), lambda: objects(fs, f"{name}/data/set"), (fs, f"{name}/data/set")


def result(folder, digest="d1", **contents):
    """A finished result with files of these contents (__ in a name is /)."""
    named = {name.replace("__", "/"): data for name, data in contents.items()}
    for name, data in named.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    entries = {name: vars(files.entry_of(folder / name)) for name in named}
    (folder / "manifest.json").write_text(json.dumps({"digest": digest, "files": entries, "more": 1}))
    return folder


def of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_file_is_there_afterwards_and_nothing_else(place, tmp_path):
    remote, there, _ = place
    source = result(tmp_path / "r", a=b"1", deep__er__b=b"2" * 1000, c=b"")
    done = upload(source, remote)
    assert there() == of(source)
    assert (done.n_files, done.n_copied, done.bytes, done.reused) == (3, 3, 1001, False)
    assert done.target == str(remote)


def test_the_manifest_comes_last(server, place, tmp_path, monkeypatch):
    remote, _, _ = place
    order = []
    with proxied(server, lambda method, path, n: order.append((method, path.rpartition("/set/")[2]))) as proxy:
        through(proxy, monkeypatch)
        upload(result(tmp_path / "r", a=b"1", b=b"2"), remote)
    puts = [name for method, name in order if method == "PUT"]
    assert puts[0] == MARKER
    assert sorted(puts[1:3]) == ["a", "b"]
    assert puts[3:] == ["manifest.json"]


def test_the_same_result_again_is_left_as_it_is(place, tmp_path):
    remote, there, _ = place
    source = result(tmp_path / "r", a=b"1")
    upload(source, remote)
    before = there()
    again = upload(source, remote)
    assert (again.n_copied, again.reused) == (0, True)
    assert there() == before


def test_another_result_is_replaced_only_when_asked_and_leaves_nothing_behind(place, tmp_path):
    remote, there, (fs, where) = place
    upload(result(tmp_path / "old", "d1", a=b"1", b=b"same", c=b"3"), remote)
    fs.pipe_file(f"{where}/of-the-user", b"stays")
    source = result(tmp_path / "new", "d2", a=b"x", b=b"same", d=b"4")
    with pytest.raises(CannotWrite, match=r"another result.*--overwrite"):
        upload(source, remote)
    assert there()["a"] == b"1"
    done = upload(source, remote, overwrite=True)
    assert there() == {**of(source), "of-the-user": b"stays"}
    assert done.n_copied == 2


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["photo.png", "manifest.json", MARKER])
def test_what_is_not_ours_is_never_touched(place, tmp_path, name, overwrite):
    remote, there, (fs, where) = place
    fs.pipe_file(f"{where}/{name}", b"{}" if name != "photo.png" else b"x")
    before = there()
    with pytest.raises(CannotWrite, match="another URL"):
        upload(result(tmp_path / "r", a=b"1"), remote, overwrite=overwrite)
    assert there() == before


def test_a_sibling_whose_name_begins_alike_is_not_below_the_url(place, tmp_path):
    remote, there, (fs, where) = place
    fs.pipe_file(f"{where}-of-another/x", b"x")
    upload(result(tmp_path / "r", a=b"1"), remote)
    assert set(there()) == {"a", "manifest.json"}


def test_a_damaged_result_is_not_sent(place, tmp_path):
    remote, there, _ = place
    source = result(tmp_path / "r", a=b"1", b=b"2")
    (source / "b").write_bytes(b"longer")
    with pytest.raises(BadInput, match=r"b has 6 bytes, its manifest says 1"):
        upload(source, remote)
    assert "manifest.json" not in there()


def test_passing_failures_are_tried_again(server, place, tmp_path, monkeypatch):
    remote, there, _ = place
    source = result(tmp_path / "r", **{f"f{i}": b"%d" % i for i in range(8)})
    with proxied(server, lambda method, path, n: (500, 503)[n % 2] if n < 3 else None) as proxy:
        through(proxy, monkeypatch)
        patience = Patience(**QUICK)
        upload(source, Remote(remote.url, patience))
    assert there() == of(source)
    assert patience.n_retries >= 16


def test_a_store_that_refuses_to_be_written_is_said_to(server, place, tmp_path, monkeypatch):
    remote, there, _ = place
    with proxied(server, lambda method, path, n: 403 if method == "PUT" else None) as proxy:
        through(proxy, monkeypatch)
        with pytest.raises(CannotWrite, match=r"cannot write s3://.*keys"):
            upload(result(tmp_path / "r", a=b"1"), remote)
    assert there() == {}


KILLED = """
import sys
from pathlib import Path
from tsclust_ooc.remote import Remote
from tsclust_ooc.uploading import upload
upload(Path(sys.argv[1]), Remote(sys.argv[2]), overwrite=True)
"""


@pytest.mark.parametrize(
    ("method", "name", "n_before"),
    [
        ("DELETE", "manifest.json", 0),
        ("PUT", "f7", 0),
        ("PUT", "manifest.json", 8),
        ("DELETE", "old", 8),
    ],
)
def test_an_upload_that_was_killed_left_no_mixture_and_goes_on(server, place, tmp_path, method, name, n_before):
    remote, there, (fs, where) = place
    old = result(tmp_path / "old", "d1", old=b"old", f1=b"was another", f2=b"2")
    upload(old, remote)
    new = result(tmp_path / "new", "d2", **{f"f{i}": b"%d" % i for i in range(9)})

    def kill(asked, path, n):
        if asked == method and path.endswith(f"/{name}"):
            os.kill(child.pid, signal.SIGKILL)
            child.wait()

    with proxied(server, kill) as proxy:
        env = {**os.environ, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(new), remote.url], env=env)
        assert child.wait() == -signal.SIGKILL
    now = there()
    assert "manifest.json" not in now or now["manifest.json"] in (of(old)["manifest.json"], of(new)["manifest.json"])
    if now.get("manifest.json") == of(new)["manifest.json"]:
        assert of(new).items() <= now.items()
    done = upload(new, remote, overwrite=True)
    assert there() == of(new)
    assert done.n_copied <= 8 - n_before
    assert fs.exists(where)


def test_after_a_killed_upload_another_result_takes_its_place_and_leaves_nothing_behind(
    server, place, tmp_path, monkeypatch
):
    remote, there, _ = place
    first = result(tmp_path / "a", "d1", x=b"1", y=b"2")
    refuse = proxied(server, lambda method, path, n: 403 if path.endswith("manifest.json") else None)
    with refuse as proxy, monkeypatch.context() as patch:
        through(proxy, patch)
        with pytest.raises(CannotWrite):
            upload(first, remote)
    assert set(there()) == {MARKER, "x", "y"}
    second = result(tmp_path / "b", "d2", y=b"3", z=b"4")
    upload(second, remote)
    assert there() == of(second)


def test_two_writers_at_one_url_are_noticed_before_the_manifest(place, tmp_path, monkeypatch):
    remote, there, (fs, where) = place
    sent = uploading._send_all

    def and_another(*args, **kwargs):
        told = sent(*args, **kwargs)
        fs.pipe_file(f"{where}/a", b"X")  # of the same size
        return told

    monkeypatch.setattr(uploading, "_send_all", and_another)
    with pytest.raises(TryAgain, match=r"set/a is not what was sent: another process"):
        upload(result(tmp_path / "r", a=b"1", b=b"2"), remote)
    assert "manifest.json" not in there()
    monkeypatch.undo()
    upload(result(tmp_path / "r", a=b"1", b=b"2"), remote)
    assert there()["a"] == b"1"


def test_progress_is_told(place, tmp_path, heard):
    remote, _, _ = place
    upload(result(tmp_path / "r", a=b"1", b=b"2"), remote, listener=heard)
    assert heard.steps[-1] == ("upload", 2, 2)
