"""Listing, fetching and sending objects: against a real S3 API on loopback, with failures in between."""

import errno
import hashlib
import os
import pickle
import subprocess
import sys
import threading
import time
from functools import lru_cache

import fsspec
import pytest
from objects import Proxy, bucket, environment, proxied, s3_server

from tsclust_ooc import remote as remote_module
from tsclust_ooc.errors import UsageError
from tsclust_ooc.patience import Patience
from tsclust_ooc.remote import Remote, at_once, is_url, plain_path, shown, tag_of

QUICK = {"first_wait_seconds": 0.001}


@pytest.fixture(scope="module")
def server():
    with s3_server() as port, environment(port):
        yield port


@pytest.fixture
def place(server):
    """A fresh bucket and a filesystem to look at it with."""
    return bucket(server)


def through(proxy, monkeypatch):
    """Until the end of the test, requests go through the proxy."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    connected = _connected_to.setdefault(proxy.port, lru_cache(remote_module._connected.__wrapped__))
    monkeypatch.setattr(remote_module, "_connected", connected)


_connected_to = {}


def connect_anew(monkeypatch):
    monkeypatch.setattr(remote_module, "_connected", lru_cache(remote_module._connected.__wrapped__))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket/key", True),
        ("sftp://me@host/a b", True),
        ("file:///tmp/x", True),
        ("/tmp/x", False),
        ("a/b", False),
        ("C:/x", False),
        ("s3:/bucket", False),
        ("", False),
    ],
)
def test_a_url_is_told_from_a_path(text, expected):
    assert is_url(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("file:///tmp/a b", "/tmp/a b"),
        ("local:///tmp/x", "/tmp/x"),
        ("file://localhost/x", "/x"),
        ("relative/x", "relative/x"),
        ("s3://bucket/x", "s3://bucket/x"),
    ],
)
def test_a_file_url_is_the_path_it_names(text, expected):
    assert plain_path(text) == expected


def test_a_file_url_of_another_machine_is_refused():
    with pytest.raises(UsageError, match="of this machine"):
        plain_path("file://elsewhere/x")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("sftp://me:pass@word@host:22/a", "sftp://me@host:22/a"),
        ("S3://key:secret@bucket", "s3://key@bucket"),
        ("https://host/a?X-Amz-Signature=abc", "https://host/a"),
        ("https://host/a#frag", "https://host/a"),
    ],
)
def test_no_secret_of_a_url_is_shown(url, expected):
    assert shown(url) == expected
    remote = Remote(url)
    assert str(remote) == expected
    assert not any(secret in repr(remote) for secret in ("pass@word", "secret", "abc"))


def test_a_remote_travels_to_another_process_with_what_it_needs_to_connect():
    remote = Remote("sftp://me:password@host/a")
    assert pickle.loads(pickle.dumps(remote)).url == remote.url


@pytest.mark.parametrize("url", ["zip://a.zip::s3://bucket/key", "bucket/key", "/tmp/x"])
def test_what_is_no_url_of_one_place_is_refused(url):
    with pytest.raises(UsageError, match="no URL of one place"):
        Remote(url)


def test_an_unknown_protocol_is_refused_with_those_that_are_known():
    with pytest.raises(UsageError, match=r"gopher:// is not known.* s3"):
        Remote("gopher://host/a").objects()


def test_objects_are_listed_with_their_sizes_below_the_url_only(place):
    name, fs = place
    for key, size in (("d/a.h5", 3), ("d/e/b.h5", 0), ("d2/c.h5", 5), ("d/folder/", 0)):
        fs.pipe_file(f"{name}/{key}", b"x" * size)
    found = Remote(f"s3://{name}/d").objects()
    assert {one.path: one.size for one in found} == {"a.h5": 3, "e/b.h5": 0}
    assert Remote(f"s3://{name}/nothing").objects() == []
    assert Remote("s3://no-such-bucket/x").objects() == []


def test_a_url_of_one_object_lists_just_that(place):
    name, fs = place
    fs.pipe_file(f"{name}/d/a.h5b/a.h5", b"no")
    fs.pipe_file(f"{name}/d/a.h5", b"abc")
    remote = Remote(f"s3://{name}/d/a.h5")
    (found,) = remote.objects()
    assert (found.path, found.size) == ("", 3)
    assert remote.parent().read(remote.name) == b"abc"


def test_the_stamp_of_an_object_changes_with_its_content_within_the_same_second(place):
    name, fs = place
    remote, stamps = Remote(f"s3://{name}"), set()
    for i in range(5):
        fs.pipe_file(f"{name}/a", b"same size %d" % i)
        (found,) = remote.objects()
        assert abs(found.mtime_ns / 1e9 - time.time()) < 10
        assert found == remote.look("a")
        stamps.add(found.mtime_ns)
    assert len(stamps) == 5


def test_large_and_small_objects_are_fetched_whole(place, tmp_path):
    name, fs = place
    remote = Remote(f"s3://{name}")
    for i, size in enumerate((0, 1, 2**20, 2**20 + 1, 5_000_001)):
        data = os.urandom(size)
        fs.pipe_file(f"{name}/{i}", data)
        remote.fetch(str(i), size, tmp_path / "got")
        assert (tmp_path / "got").read_bytes() == data


def test_an_object_of_another_size_than_was_listed_is_stale(place, tmp_path):
    name, fs = place
    fs.pipe_file(f"{name}/a", b"longer now")
    with pytest.raises(OSError, match="4 bytes then, 10 now") as told:
        Remote(f"s3://{name}").fetch("a", 4, tmp_path / "got")
    assert told.value.errno == errno.ESTALE


@pytest.mark.parametrize("size", [0, 5, 2**23, 11 * 2**20])
def test_what_is_sent_is_there_with_the_tag_that_was_expected(place, tmp_path, size, monkeypatch):
    name, fs = place
    monkeypatch.setattr(remote_module, "PART_BYTES", 5 * 2**20)  # the least that S3 allows
    data = os.urandom(size)
    (tmp_path / "x").write_bytes(data)
    found = Remote(f"s3://{name}/d").send(tmp_path / "x", "e/x")
    assert fs.cat_file(f"{name}/d/e/x") == data
    assert found.size == size
    assert found.tag == fs.info(f"{name}/d/e/x")["ETag"].strip('"') == tag_of(tmp_path / "x")
    assert ("-" in found.tag) is (size >= 2 * remote_module.PART_BYTES)
    if "-" not in found.tag:
        assert found.tag == hashlib.md5(data).hexdigest()


def test_removing_takes_what_is_there_and_does_not_mind_what_is_not(place):
    name, fs = place
    for i in range(20):
        fs.pipe_file(f"{name}/{i}", b"")
    Remote(f"s3://{name}").remove([*map(str, range(19)), "nothing"])
    assert fs.find(name) == [f"{name}/19"]


def test_what_is_not_there_is_a_file_that_is_not_found(place):
    name, _ = place
    remote = Remote(f"s3://{name}")
    assert remote.look("a") is None
    with pytest.raises(FileNotFoundError) as told:
        remote.read("a")
    assert told.value.filename == f"s3://{name}/a"


@pytest.mark.parametrize("status", [500, 503])
def test_a_passing_failure_is_tried_again_and_counted(server, place, monkeypatch, tmp_path, status):
    name, fs = place
    fs.pipe_file(f"{name}/a", b"abc")
    (tmp_path / "x").write_bytes(b"sent")
    with proxied(server, lambda method, path, n: status if n <= 2 else None) as proxy:
        through(proxy, monkeypatch)
        patience = Patience(**QUICK)
        remote = Remote(f"s3://{name}", patience)
        assert [found.path for found in remote.objects()] == ["a"]
        assert patience.n_retries == 2
        assert remote.read("a") == b"abc"
        assert patience.n_retries == 4
        remote.send(tmp_path / "x", "x")
    assert fs.cat_file(f"{name}/x") == b"sent"
    assert proxy.answered[status] == patience.n_retries


def test_a_failure_that_does_not_pass_ends_after_the_tries_and_one_that_never_does_at_once(server, place, monkeypatch):
    name, fs = place
    fs.pipe_file(f"{name}/a", b"abc")
    for status, kind, tries in ((503, OSError, 3), (403, PermissionError, 1)):
        with proxied(server, lambda method, path, n, status=status: status) as proxy:
            through(proxy, monkeypatch)
            with pytest.raises(kind) as told:
                Remote(f"s3://{name}", Patience(tries=3, **QUICK)).read("a")
            assert sum(proxy.seen.values()) == tries
            assert told.value.filename == f"s3://{name}/a"
            assert told.value.errno in (errno.EAGAIN, errno.EACCES)


def test_a_server_that_is_not_there_is_a_failure_of_the_wire(place, monkeypatch):
    name, _ = place
    with Proxy(0) as proxy:
        through(proxy, monkeypatch)
    with pytest.raises(ConnectionError):
        Remote(f"s3://{name}/other", Patience(tries=2, **QUICK)).read("a")


def test_missing_keys_are_a_matter_of_rights_not_of_patience(place, monkeypatch):
    name, _ = place
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    connect_anew(monkeypatch)
    patience = Patience(**QUICK)
    with pytest.raises(PermissionError, match="credentials"):
        Remote(f"s3://{name}/d", patience).read("a")
    assert patience.n_retries == 0


def test_many_are_fetched_at_once(server, place, monkeypatch, tmp_path):
    name, fs = place
    for i in range(64):
        fs.pipe_file(f"{name}/{i}", b"abc")
    with proxied(server, together=16) as proxy:
        through(proxy, monkeypatch)
        remote = Remote(f"s3://{name}")
        assert set(at_once(remote.read, [str(i) for i in range(64)])) == {b"abc"}
    assert proxy.most >= 16


def test_what_has_not_begun_when_one_fails_never_does():
    begun = []

    def work(i):
        begun.append(i)
        time.sleep(0.001)
        if i == 3:
            raise OSError(errno.EACCES, "no")

    with pytest.raises(PermissionError):
        list(at_once(work, range(2_000), 2))
    assert len(begun) < 1_000


def test_a_filesystem_that_is_not_asynchronous_is_used_by_many_threads(tmp_path):
    fs = fsspec.filesystem("memory")
    for i in range(20):
        fs.pipe_file(f"/many/{i}.h5", b"%d" % i)
    remote = Remote("memory://many")
    found = remote.objects()
    assert sorted(one.path for one in found) == sorted(f"{i}.h5" for i in range(20))
    assert sorted(at_once(remote.read, [one.path for one in found])) == sorted(b"%d" % i for i in range(20))
    (tmp_path / "x").write_bytes(b"x")
    assert remote.send(tmp_path / "x", "deep/x").size == 1
    remote.remove(["deep/x"])
    assert not fs.exists("/many/deep/x")


def test_a_password_in_the_text_of_a_failure_is_left_out(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("cannot reach sftp://me:hunter2@host/a")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "cat_file", refuse)
    monkeypatch.setattr(remote_module, "_LOCAL", ())
    with pytest.raises(ConnectionError) as told:
        Remote("memory://me:hunter2@host/a", Patience(tries=1)).read("x")
    assert "hunter2" not in str(told.value)


def test_fsspec_is_not_loaded_before_a_url_is_used():
    code = "import sys, tsclust_ooc.remote as r; r.Remote('s3://b/k'); sys.exit('fsspec' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_threads_share_one_connection(place, monkeypatch):
    name, fs = place
    fs.pipe_file(f"{name}/a", b"abc")
    connect_anew(monkeypatch)
    remote, seen = Remote(f"s3://{name}"), []
    threads = [threading.Thread(target=lambda: seen.append(remote.read("a"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [b"abc"] * 8
    assert remote_module._connected.cache_info().currsize == 1
