"""A dataset consolidated to an object store: as the local one, whole, and nothing of it left on scratch."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import dask.array
import numpy as np
import pytest
import xarray
import zarr
from objects import bucket, environment, objects, proxied, s3_server
from sources import OPTIONS, contents, data_of, item_per_file, shared_parsers, three_splits, write_shard
from test_remote import through

from tsclust_ooc.errors import BadInput, CannotWrite, TryAgain, UsageError
from tsclust_ooc.pipeline import consolidating, sending
from tsclust_ooc.pipeline.consolidating import consolidate
from tsclust_ooc.remote import Remote
from tsclust_ooc.uploading import MARKER


@pytest.fixture(scope="module")
def server():
    with s3_server() as port, environment(port), shared_parsers(consolidating):
        yield port


@pytest.fixture
def place(server):
    """A URL in a fresh bucket, and what is there."""
    name, fs = bucket(server)
    return f"s3://{name}/some/dataset", lambda: objects(fs, f"{name}/some/dataset")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return folder, three_splits(folder, (30, 9, 3))


@pytest.fixture
def options(tmp_path):
    (tmp_path / "scratch").mkdir()
    return replace(OPTIONS, scratch=tmp_path / "scratch")


def left(options):
    return [name for name in contents(options.scratch) if "/sent/" in name]


def test_a_dataset_at_a_url_is_that_of_a_directory(place, source, options, tmp_path):
    url, there = place
    done = consolidate(source[0], url, options)
    local = consolidate(source[0], tmp_path / "local", options)
    assert (done.dataset, done.digest, done.n_samples) == (url, local.digest, local.n_samples)
    assert {k: v for k, v in there().items() if k != "manifest.json"} == data_of(tmp_path / "local")
    assert json.loads(there()["manifest.json"])["digest"] == local.digest
    assert left(options) == []


def test_plain_tools_open_it_where_it_is(place, source, options):
    url, _ = place
    consolidate(source[0], url, options)
    group = zarr.open_group(f"{url}/data.zarr", mode="r")
    for split, expected in source[1].items():
        np.testing.assert_array_equal(group[f"{split}/embeddings"][:], expected)
        lazy = dask.array.from_zarr(f"{url}/data.zarr", component=f"{split}/embeddings")
        np.testing.assert_array_equal(lazy.compute(), expected)
    opened = xarray.open_zarr(f"{url}/data.zarr", group="val", consolidated=False)
    np.testing.assert_array_equal(opened["embeddings"].to_numpy(), source[1]["val"])


def test_the_same_command_again_finds_it_done(place, source, options):
    url, there = place
    consolidate(source[0], url, options)
    before = there()
    again = consolidate(source[0], url, options)
    assert (again.reused, again.dataset) == (True, url)
    assert there() == before
    assert left(options) == []


def test_other_shards_are_refused_without_overwrite_and_replace_it_with_it(place, source, options, tmp_path):
    url, there = place
    consolidate(source[0], url, options)
    item_per_file(tmp_path / "other", 30, seed=9)
    before = there()
    with pytest.raises(CannotWrite, match=f"{url} already exists and was not made from these"):
        consolidate(tmp_path / "other", url, options)
    assert there() == before
    done = consolidate(tmp_path / "other", url, replace(options, overwrite=True))
    assert done.n_samples == 30
    assert {name.split("/")[1] for name in there() if name.startswith("data.zarr/")} == {"all", "zarr.json"}


def test_bad_shards_publish_nothing(place, options, tmp_path):
    url, there = place
    item_per_file(tmp_path / "s", 10)
    (tmp_path / "s" / "3.h5").write_bytes(b"no hdf5")
    with pytest.raises(BadInput, match="1 bad shard"):
        consolidate(tmp_path / "s", url, options)
    assert there() == {}
    assert consolidate(tmp_path / "s", url, replace(options, on_bad="skip")).n_rejected == 1
    assert "3.h5" in there()["rejected.json"].decode()


def test_a_dry_run_sends_nothing(place, source, options):
    url, there = place
    done = consolidate(source[0], url, replace(options, dry_run=True))
    assert (done.dataset, done.n_samples) == (url, 42)
    assert there() == {}


def test_something_else_at_the_url_is_left_alone(place, source, options, server):
    url, there = place
    bucket(server)[1].pipe_file(f"{url.removeprefix('s3://')}/photo.png", b"x")
    with pytest.raises(CannotWrite, match=r"holds 1 object .*photo\.png"):
        consolidate(source[0], url, replace(options, overwrite=True))
    assert there() == {"photo.png": b"x"}


@pytest.mark.parametrize("change", [{"append": True}, {"scheduler": "slurm"}])
def test_what_cannot_be_done_at_a_url_is_refused_before_any_work(place, source, options, change):
    url, there = place
    with pytest.raises(UsageError, match=r"--(append|scheduler)"):
        consolidate(source[0], url, replace(options, **change))
    assert there() == {}


KILLED = """
import sys
from pathlib import Path
from tsclust_ooc.pipeline.consolidating import ConsolidateOptions, consolidate
options = ConsolidateOptions(chunk_bytes="4096", workers=2, scratch=Path(sys.argv[3]), overwrite=sys.argv[4] == "yes")
consolidate(sys.argv[1], sys.argv[2], options)
"""


@pytest.mark.parametrize("overwrite", ["no", "yes"])
def test_a_command_that_was_killed_while_it_sent_goes_on_without_reading_shards_again(
    server, place, options, tmp_path, overwrite
):
    url, there = place
    if overwrite == "yes":
        item_per_file(tmp_path / "old", 5, seed=3)
        consolidate(tmp_path / "old", url, options)
    samples = item_per_file(tmp_path / "s", 60)

    def kill(method, path, n):
        if method == "PUT" and path.endswith("/c/2/0/0"):
            os.kill(child.pid, signal.SIGKILL)
            child.wait()

    with proxied(server, kill) as proxy:
        env = {**os.environ, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
        command = [sys.executable, "-c", KILLED, str(tmp_path / "s"), url, str(options.scratch), overwrite]
        child = subprocess.Popen(command, env=env)
        assert child.wait() == -signal.SIGKILL
    assert "manifest.json" not in there()
    assert MARKER in there()
    made = [name for name in left(options) if name.endswith("manifest.json")]
    assert len(made) == 1
    before = os.stat(options.scratch / made[0]).st_ino
    done = consolidate(tmp_path / "s", url, replace(options, overwrite=overwrite == "yes"))
    assert before
    assert done.n_samples == 60
    np.testing.assert_array_equal(zarr.open_group(f"{url}/data.zarr", mode="r")["all/embeddings"][:], samples)
    assert set(json.loads(there()["manifest.json"])["files"]) == set(there()) - {"manifest.json"}
    assert left(options) == []


def test_what_an_interrupted_command_left_on_scratch_gives_way_to_other_shards(
    server, place, options, tmp_path, monkeypatch
):
    url, there = place
    item_per_file(tmp_path / "s", 30)
    refuse = proxied(server, lambda method, path, n: 403 if path.endswith("/c/0/0/0") else None)
    with refuse as proxy, monkeypatch.context() as patch:
        through(proxy, patch)
        with pytest.raises(CannotWrite, match=r"cannot write s3://.*keys"):
            consolidate(tmp_path / "s", url, options)
    assert any(name.endswith("manifest.json") for name in left(options))
    write_shard(tmp_path / "s" / "30.h5", np.ones((3, 16), "<f4"))
    assert consolidate(tmp_path / "s", url, options).n_samples == 31
    assert set(json.loads(there()["manifest.json"])["files"]) == set(there()) - {"manifest.json"}


def test_an_upload_that_is_unfinished_is_told_from_nothing(server, place, source, options, monkeypatch):
    url, _ = place
    with pytest.raises(BadInput, match="nothing there"):
        sending.read_manifest(Remote(url))
    refuse = proxied(server, lambda method, path, n: 403 if path.endswith("manifest.json") else None)
    with refuse as proxy, monkeypatch.context() as patch:
        through(proxy, patch)
        with pytest.raises(CannotWrite):
            consolidate(source[0], url, options)
    with pytest.raises(TryAgain, match="unfinished upload"):
        sending.read_manifest(Remote(url))
