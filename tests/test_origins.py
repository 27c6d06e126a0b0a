"""A source on an object store: what is read of it is what is read of the same files in a folder."""

import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from objects import bucket, environment, proxied, put_tree, s3_server
from sources import (
    OPTIONS,
    contents,
    data_of,
    dataset_per_item,
    item_per_file,
    rows_per_file,
    shared_parsers,
    three_splits,
    values,
    write_shard,
)
from test_remote import through

from tsclust_ooc import mirror as mirror_module
from tsclust_ooc import source as source_module
from tsclust_ooc.cli import main
from tsclust_ooc.dataset import open_dataset, read_rejected
from tsclust_ooc.errors import BadInput, UsageError
from tsclust_ooc.pipeline import arrays, consolidating, estimating, looking, verifying
from tsclust_ooc.pipeline.consolidating import consolidate
from tsclust_ooc.pipeline.looking import InspectOptions, inspect
from tsclust_ooc.pipeline.verifying import verify
from tsclust_ooc.remote import Remote
from tsclust_ooc.shards.listing import list_shards
from tsclust_ooc.shards.objects import list_objects
from tsclust_ooc.source import open_source

SIZES = 30, 9, 8
N = sum(SIZES)


@pytest.fixture(scope="module")
def server():
    modules = consolidating, looking, verifying, arrays, source_module
    with s3_server() as port, environment(port), shared_parsers(*modules):
        yield port


@pytest.fixture(scope="module")
def splits(server, tmp_path_factory):
    """Three splits in a folder and in a bucket: folder, URL, values."""
    folder = tmp_path_factory.mktemp("splits")
    samples = three_splits(folder, SIZES)
    return folder, put(server, folder), samples


def put(server, folder):
    name, fs = bucket(server)
    put_tree(fs, f"{name}/some/source", folder)
    return f"s3://{name}/some/source"


@pytest.fixture
def options(tmp_path):
    (tmp_path / "scratch").mkdir()
    return replace(OPTIONS, scratch=tmp_path / "scratch")


def mirrored(options):
    """What mirrors left on scratch."""
    return [name for name in contents(options.scratch) if f"/{mirror_module.FOLDER}/" in name]


def test_a_dataset_made_of_objects_holds_what_one_made_of_files_holds(splits, options, tmp_path):
    folder, url, samples = splits
    done = consolidate(url, tmp_path / "remote", options)
    consolidate(folder, tmp_path / "local", options)
    assert (done.n_shards, done.n_samples, done.n_rejected) == (N, N, 0)
    skipped = {"shards.parquet"}  # stamps
    a, b = data_of(tmp_path / "remote"), data_of(tmp_path / "local")
    assert {k: v for k, v in a.items() if k not in skipped} == {k: v for k, v in b.items() if k not in skipped}
    opened = open_dataset(tmp_path / "remote")
    assert opened.manifest.source == url
    for split, expected in samples.items():
        np.testing.assert_array_equal(np.asarray(opened[split].array[:]), expected)
    assert mirrored(options) == []


@pytest.mark.parametrize("more", [{"stride": 3}, {"scheduler": "local"}, {"stage": "always"}])
def test_every_way_of_reading_reads_objects(splits, options, tmp_path, more):
    folder, url, _ = splits
    done = consolidate(url, tmp_path / "remote", replace(options, **more))
    local = consolidate(folder, tmp_path / "local", replace(options, stride=more.get("stride")))
    assert done.digest == local.digest
    assert mirrored(options) == []


def large(folder):
    for i in range(3):
        write_shard(folder / f"{i}.h5", values(500, (64,), "<f4", i), "features", chunks=(16, 64), compression="gzip")


@pytest.mark.parametrize(
    "build",
    [
        rows_per_file,
        lambda folder: dataset_per_item(folder, {"a.h5": ["a1", "y|1", "z"], "b.h5": ["b/1", "c", "d"]}),
        lambda folder: item_per_file(folder, 20, compression="gzip", chunks=(1, 16)),
        lambda folder: [np.save(folder / f"{i}.npy", values(7, (16,), "<f2", i)) for i in range(5)],
        large,
    ],
    ids=["rows-per-file", "dataset-per-item", "compressed", "npy", "large"],
)
def test_every_layout_is_read_from_objects_as_from_files(server, options, tmp_path, build):
    (tmp_path / "s").mkdir()
    build(tmp_path / "s")
    done = consolidate(put(server, tmp_path / "s"), tmp_path / "remote", options)
    assert done.digest == consolidate(tmp_path / "s", tmp_path / "local", options).digest
    index = [name for name in data_of(tmp_path / "local") if name.startswith("index/")]
    assert index
    assert all(data_of(tmp_path / "remote")[name] == data_of(tmp_path / "local")[name] for name in index)


def test_a_shard_larger_than_the_mirror_keeps_is_read_by_several_partitions(server, options, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror_module, "MOST_BYTES", 1000)
    (tmp_path / "s").mkdir()
    large(tmp_path / "s")
    done = consolidate(put(server, tmp_path / "s"), tmp_path / "remote", options)
    assert done.digest == consolidate(tmp_path / "s", tmp_path / "local", options).digest


def test_each_shard_is_fetched_once_and_many_at_once(server, splits, options, tmp_path, monkeypatch):
    _, url, _ = splits
    with proxied(server) as proxy:
        through(proxy, monkeypatch)
        consolidate(url, tmp_path / "remote", options)
    gets = {path: n for (method, path), n in proxy.seen.items() if method == "GET" and path.endswith(".h5")}
    assert len(gets) == N
    assert set(gets.values()) == {1}
    assert proxy.most >= 4


def test_one_object_is_a_source(server, options, tmp_path):
    samples = rows_per_file(tmp_path / "s", [40])
    url = put(server, tmp_path / "s") + "/slide_0.h5"
    consolidate(url, tmp_path / "d", replace(options, layout="rows-per-file"))
    np.testing.assert_array_equal(np.asarray(open_dataset(tmp_path / "d")["all"].array[:]), samples)
    assert inspect(url, InspectOptions(layout="rows-per-file")).n_samples == 40


def test_bad_objects_are_named_and_left_out_when_asked(server, options, tmp_path):
    item_per_file(tmp_path / "s", 20)
    good = (tmp_path / "s" / "0.h5").read_bytes()
    (tmp_path / "s" / "4.h5").write_bytes(good[:-100])
    (tmp_path / "s" / "5.h5").write_bytes(bytes(len(good)))
    url = put(server, tmp_path / "s")
    with pytest.raises(BadInput, match="2 bad shards in s3://"):
        consolidate(url, tmp_path / "d", options)
    assert consolidate(url, tmp_path / "d", replace(options, on_bad="skip")).n_samples == 18
    assert {problem.path for problem in read_rejected(tmp_path / "d")} == {"4.h5", "5.h5"}


def test_objects_that_cannot_be_fetched_are_bad_shards_that_may_be_good_next_time(
    server, options, tmp_path, monkeypatch
):
    item_per_file(tmp_path / "s", 20)
    url = put(server, tmp_path / "s")
    refuse = proxied(server, lambda method, path, n: 403 if path.endswith("/7.h5") else None)
    with refuse as proxy, monkeypatch.context() as patch:
        through(proxy, patch)
        with pytest.raises(BadInput, match=r"1 bad shard .*\n  7\.h5   unreadable   no"):
            consolidate(url, tmp_path / "d", options)
    assert consolidate(url, tmp_path / "d", options).n_samples == 20


def test_passing_failures_of_the_store_are_tried_again_and_counted(server, splits, options, tmp_path, monkeypatch):
    folder, url, _ = splits
    fails = lambda method, path, n: (500, 503)[hash(path) % 2] if n == 1 and path.endswith("3.h5") else None  # noqa: E731
    with proxied(server, fails) as proxy:
        through(proxy, monkeypatch)
        done = consolidate(url, tmp_path / "remote", options)
    assert done.digest == consolidate(folder, tmp_path / "local", options).digest
    assert done.n_retries == sum(proxy.answered[status] for status in (500, 503)) > 0


def test_a_shard_that_is_replaced_while_it_is_read_is_unstable(server, options, tmp_path, monkeypatch):
    item_per_file(tmp_path / "s", 40)
    url = put(server, tmp_path / "s")
    new = (tmp_path / "s" / "0.h5").read_bytes()
    fs = bucket(server)[1]

    def replaces(method, path, n):
        if method == "GET" and path.endswith("/39.h5"):
            fs.pipe_file(f"{url.removeprefix('s3://')}/11.h5", new)

    with proxied(server, replaces) as proxy, monkeypatch.context() as patch:
        through(proxy, patch)
        with pytest.raises(BadInput, match=r"11\.h5   unstable   replaced since it was surveyed"):
            consolidate(url, tmp_path / "d", options)
    assert not (tmp_path / "d").exists()
    consolidate(url, tmp_path / "d", options)
    with h5py.File(tmp_path / "s" / "0.h5") as file:
        np.testing.assert_array_equal(np.asarray(open_dataset(tmp_path / "d")["all"].array[11]), file["embeddings"][()])


def test_new_objects_are_appended(server, options, tmp_path):
    samples = item_per_file(tmp_path / "s", 30)
    url = put(server, tmp_path / "s")
    consolidate(url, tmp_path / "d", options)
    more = values(5, seed=7)
    for i, sample in enumerate(more):
        write_shard(tmp_path / "s" / f"{30 + i}.h5", sample)
        path = f"{url.removeprefix('s3://')}/{30 + i}.h5"
        bucket(server)[1].pipe_file(path, (tmp_path / "s" / f"{30 + i}.h5").read_bytes())
    done = consolidate(url, tmp_path / "d", replace(options, append=True))
    assert done.n_appended == 5
    everything = np.asarray(open_dataset(tmp_path / "d")["all"].array[:])
    np.testing.assert_array_equal(everything, np.concatenate([samples, more]))
    assert consolidate(url, tmp_path / "d", replace(options, append=True)).reused


def test_steps_of_a_job_array_read_objects(splits, options, tmp_path):
    folder, url, _ = splits
    made = arrays.init(url, tmp_path / "d", options)
    assert url in made.commands[0]
    for i in reversed(range(made.n_partitions)):
        arrays.write_partition(url, tmp_path / "d", i, options)
    with pytest.raises(UsageError, match="initialized from"):
        arrays.write_partition(folder, tmp_path / "d", 0, options)
    done = arrays.finalize(url, tmp_path / "d", options)
    assert done.digest == consolidate(folder, tmp_path / "local", options).digest


def test_inspect_says_of_objects_what_it_says_of_files(splits):
    folder, url, _ = splits
    found, local = inspect(url), inspect(folder)
    assert found.source == url
    for name in ("n_shards", "n_samples", "bytes", "key", "layout", "item_shape", "dtype", "splits", "sizes"):
        assert getattr(found, name) == getattr(local, name), name
    assert found.next_command == f"tsclust consolidate {url} source"


def test_inspect_fetches_what_it_must_and_says_what_it_presumes(server, splits, monkeypatch):
    _, url, _ = splits
    monkeypatch.setattr(estimating, "_PLACES", 1)  # what it reads to tell the time
    with proxied(server) as proxy:
        through(proxy, monkeypatch)
        found = inspect(url)
    fetched = [path for method, path in proxy.seen if method == "GET" and path.endswith(".h5")]
    assert any(note.startswith(f"{N} objects not fetched: presumed") for note in found.notes)
    assert len(fetched) < N


def test_verify_compares_with_objects(splits, options, tmp_path, server):
    folder, url, _ = splits
    consolidate(folder, tmp_path / "d", options)
    found = verify(tmp_path / "d", against=url)
    assert (found.n_samples_compared, found.damage) == (N, ())
    item_per_file(tmp_path / "s", 20)
    other = put(server, tmp_path / "s")
    assert verify(tmp_path / "d", against=other).damage


def test_a_lazy_source_reads_objects(splits):
    _, url, samples = splits
    opened = open_source(url, chunk_bytes=4096)
    for split, expected in samples.items():
        np.testing.assert_array_equal(opened[split].compute(), expected)


def test_a_file_url_is_a_path(tmp_path, options):
    samples = item_per_file(tmp_path / "a source", 20)
    done = consolidate(f"file://{tmp_path}/a source", f"file://{tmp_path}/d", options)
    assert done.dataset == str(tmp_path / "d")
    np.testing.assert_array_equal(np.asarray(open_dataset(tmp_path / "d")["all"].array[:]), samples)


def test_objects_are_listed_as_files_are(server, tmp_path):
    names = ["10.h5", "2.h5", "b/1.HDF5", "b/a/3.h5", ".hidden.h5", "b/.x/1.h5", "labels.npy", "notes.txt", "a..b/c.h5"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    url = put(server, tmp_path)
    found, expected = list_objects(Remote(url)), list_shards(tmp_path)
    assert [entry[:2] for entry in found.entries] == [entry[:2] for entry in expected.entries]
    assert (found.root, found.said, found.n_other, found.problems) == (url, url, expected.n_other, [])


def test_names_that_no_file_could_have_are_problems(server):
    name, fs = bucket(server)
    for key in ("d/../x.h5", "d/a//b.h5", "d/good.h5"):
        fs.call_s3("put_object", Bucket=name, Key=key, Body=b"x")
    found = list_objects(Remote(f"s3://{name}/d"))
    assert [entry.path for entry in found.entries] == ["good.h5"]
    assert {(problem.path, problem.code) for problem in found.problems} == {
        ("../x.h5", "not-regular"),
        ("a//b.h5", "not-regular"),
    }


def test_a_url_is_the_only_source(splits, tmp_path, options):
    folder, url, _ = splits
    with pytest.raises(UsageError, match="only source"):
        consolidate([url, str(folder)], tmp_path / "d", options)


def test_a_url_without_objects_is_not_there(server, tmp_path, options):
    name, _ = bucket(server)
    with pytest.raises(BadInput, match=f"s3://{name}/x is not there"):
        consolidate(f"s3://{name}/x", tmp_path / "d", options)
    with pytest.raises(BadInput, match="is not there"):
        inspect("s3://no-such-bucket-anywhere/x")


def test_no_password_of_a_url_is_recorded_or_said(options, tmp_path, capsys, heard):
    source = Remote("memory://someone:hunter2@place/x")
    assert "hunter2" not in str(source)
    with pytest.raises(BadInput) as told:
        consolidate(source.url, tmp_path / "d", options, heard)
    assert "hunter2" not in str(told.value)
    assert not any("hunter2" in message for message in heard.messages)


# ---- the command line


def run(*words, **env):
    return main([str(word) for word in words])


@pytest.fixture
def _quiet_signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("_quiet_signals")
def test_commands_take_urls(splits, server, tmp_path, capsys):
    folder, url, samples = splits
    there = f"s3://{bucket(server)[0]}/dataset"
    common = ["--scratch", str(tmp_path), "--chunk-bytes", "4096", "--workers", "2"]
    assert run("inspect", url, "--json") == 0
    command = json.loads(capsys.readouterr().out)["next_command"]
    words = shlex.split(command)[1:]
    assert words[:2] == ["consolidate", url]
    assert run("consolidate", url, there, "--json", *common) == 0
    assert json.loads(capsys.readouterr().out)["dataset"] == there
    assert run("status", there, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["published"]["n_rows"] == {name: len(x) for name, x in samples.items()}
    assert run("consolidate", url, there, *common) == 0
    assert "Nothing to do" in capsys.readouterr().out
    assert run("consolidate", folder, tmp_path / "d", "--quiet", *common) == 0
    assert run("verify", tmp_path / "d", "--against", url) == 0


@pytest.mark.usefixtures("_quiet_signals")
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["verify", "s3://b/d"], 2, "s3://b/d is a URL"),
        (["cluster", "s3://b/d", "run", "-k", "3"], 2, "s3://b/d is a URL"),
        (["consolidate", "{folder}", "s3://b/d", "--init"], 2, "s3://b/d is a URL"),
        (["consolidate", "{folder}", "s3://b/d", "--append"], 2, "--append: s3://b/d is a URL"),
        (["status", "s3://no-such-bucket-anywhere/d"], 65, "is not a dataset: nothing there"),
        (["consolidate", "gopher://x/y", "d"], 2, "gopher:// is not known"),
    ],
)
def test_what_takes_no_url_says_so(splits, tmp_path, capsys, monkeypatch, words, code, said):
    monkeypatch.chdir(tmp_path)
    assert run(*(word.format(folder=splits[0]) for word in words)) == code
    assert said in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_quiet_signals")
def test_a_url_is_submitted_as_it_is_but_no_password_with_it(splits, tmp_path, capsys):
    _, url, _ = splits
    words = ["submit", "consolidate", url, tmp_path / "d", "--scheduler", "slurm", "--print", "--json"]
    assert run(*words) == 0
    texts = json.loads(capsys.readouterr().out)["texts"]
    assert any(url in text for text in texts.values())
    words[2] = "sftp://me:hunter2@host/a"
    assert run(*words) == 2
    told = capsys.readouterr()
    assert "sftp://me@host/a was given with a password" in " ".join((told.out + told.err).split())
    assert "hunter2" not in told.out + told.err


@pytest.mark.usefixtures("_quiet_signals")
def test_a_workflow_and_a_library_call_that_need_a_directory_say_so(tmp_path, capsys):
    (tmp_path / "flow.toml").write_text('[flow]\nsource = "s3://b/s"\ndataset = "d"\n[consolidate]\n')
    assert run("run", tmp_path / "flow.toml") == 2
    assert "s3://b/s, a URL, and a workflow works on directories" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UsageError, match=r"s3://b/d is a URL.*zarr\.open_group\('s3://b/d/data\.zarr'"):
        open_dataset("s3://b/d")


def test_a_killed_consolidation_of_objects_goes_on_and_leaves_no_mirror(server, splits, options, tmp_path):
    folder, url, _ = splits
    with proxied(server, lambda method, path, n: kill(child) if path.endswith("test/5.h5") else None) as proxy:
        env = {**os.environ, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
        command = [sys.executable, "-m", "tsclust_ooc", "consolidate", url, str(tmp_path / "d"), "--quiet"]
        command += ["--chunk-bytes", "4096", "--workers", "2", "--scratch", str(options.scratch)]
        child = subprocess.Popen(command, env=env)
        assert child.wait() == -signal.SIGKILL
    assert not Path(tmp_path / "d").exists()
    assert mirrored(options)
    done = consolidate(url, tmp_path / "d", options)
    assert done.digest == consolidate(folder, tmp_path / "local", options).digest
    assert mirrored(options) == []


def kill(child):
    child.kill()
    child.wait()
