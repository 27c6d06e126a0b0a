"""distances on small datasets: what is published, that it is true, that it goes on, and what is refused."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr
from datasets import count_reads, publish, rows_of, three_splits
from scipy.spatial.distance import cdist
from sources import contents
from test_crashes import check, consolidate, sweep, world  # noqa: F401 - a fixture

from tsclust_ooc import budget, files, matrix
from tsclust_ooc.cli import main
from tsclust_ooc.dataset import open_dataset
from tsclust_ooc.distance.dense import METRICS
from tsclust_ooc.errors import BadInput, CannotWrite, TryAgain, UsageError
from tsclust_ooc.pipeline import distancing
from tsclust_ooc.pipeline.distancing import DistancesOptions, distances
from tsclust_ooc.runtime import ClusterSpec, Jobs

SAMPLES = three_splits()
SIDE = 25
BLOCK = str(4 * SIDE * SIDE)

# distributed leaves a connection that was being made to a worker when that was killed to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("distancing"), SAMPLES)


@pytest.fixture
def options(tmp_path):
    return DistancesOptions(workers=2, scratch=tmp_path, block_bytes=BLOCK)


def array_of(out):
    return zarr.open_group(out / "distances.zarr", mode="r")["distances"]


def blocks_of(out):
    return {name: data for name, data in contents(out).items() if name.startswith("distances.zarr/")}


class Stopping:
    """A listener that ends the command when so many blocks are done."""

    def __init__(self, after):
        self.after = after

    def advance(self, stage, done, total):
        if done >= self.after:
            raise KeyboardInterrupt

    def say(self, message):
        pass


# what is published


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("view", ["flatten", "variable", "mean"])
def test_a_split_with_itself_gives_the_distances_of_scipy(dataset, options, tmp_path, metric, view):
    done = distances(dataset, tmp_path / "out", replace(options, metric=metric, view=view))
    x = rows_of(SAMPLES["train"], view)
    exact = cdist(x, x, metric)
    np.fill_diagonal(exact, 0)
    found = array_of(tmp_path / "out")[:]
    np.testing.assert_allclose(found, exact, rtol=1e-6)
    np.testing.assert_array_equal(found, found.T)
    assert not np.diag(found).any()
    assert (done.n_rows, done.n_columns, done.n_computed, done.metric) == (len(x), len(x), done.n_blocks, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_a_split_against_another_gives_the_distances_of_scipy(dataset, options, tmp_path, metric):
    asked = replace(options, split="val", against="train", view="variable", metric=metric)
    distances(dataset, tmp_path / "out", asked)
    x, y = rows_of(SAMPLES["val"], "variable"), rows_of(SAMPLES["train"], "variable")
    np.testing.assert_allclose(array_of(tmp_path / "out")[:], cdist(x, y, metric), rtol=1e-6)


def test_plain_zarr_and_xarray_open_the_result(dataset, options, tmp_path):
    done = distances(dataset, tmp_path / "out", options)
    array = zarr.open_group(done.distances)["distances"]
    assert (array.dtype, array.shape, array.metadata.dimension_names) == (np.float32, (60, 60), ("row", "column"))
    assert array.chunks == (30, 30)
    with xarray.open_zarr(done.distances) as opened:
        np.testing.assert_array_equal(opened["distances"].values, array[:])
    np.testing.assert_array_equal(matrix.open_matrix(tmp_path / "out").array[:], array[:])


def test_the_manifest_names_every_file_and_what_made_them(dataset, options, tmp_path):
    done = distances(dataset, tmp_path / "out", options)
    found = matrix.open_matrix(tmp_path / "out")
    made = found.manifest
    assert set(made.files) | {"manifest.json"} == set(contents(tmp_path / "out"))
    assert made.plan.dataset_digest == open_dataset(dataset).manifest.digest
    assert (made.plan.split, made.plan.against, made.plan.view, made.plan.metric) == (
        "train",
        "",
        "flatten",
        "euclidean",
    )
    assert made.bytes_read == done.bytes_read == SAMPLES["train"].nbytes
    assert matrix.changed_files(found) == []
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_blocks_at_the_edge_are_stored_whole_and_padded_with_nan(dataset, options, tmp_path):
    distances(dataset, tmp_path / "out", replace(options, split="val", block_bytes=str(4 * 9 * 9)))
    array = array_of(tmp_path / "out")
    assert (array.shape, array.chunks) == ((23, 23), (12, 12))
    last = np.fromfile(tmp_path / "out/distances.zarr/distances/c/1/1", "<f4").reshape(12, 12)
    np.testing.assert_array_equal(last[:11, :11], array[12:, 12:])
    assert np.isnan(last[11]).all()


def test_workers_and_schedulers_give_the_same_bytes(dataset, options, tmp_path):
    distances(dataset, tmp_path / "one", replace(options, workers=1, view="variable"))
    distances(dataset, tmp_path / "four", replace(options, workers=4, view="variable"))
    local = replace(options, scheduler="local", memory="3GB", view="variable")
    done = distances(dataset, tmp_path / "local", local)
    assert done.dashboard.startswith("http")
    assert blocks_of(tmp_path / "one") == blocks_of(tmp_path / "four") == blocks_of(tmp_path / "local")


def test_rows_are_read_once_when_memory_holds_them(dataset, options, tmp_path, monkeypatch):
    reads = count_reads(monkeypatch)
    done = distances(dataset, tmp_path / "out", replace(options, view="variable", workers=1))
    assert done.n_blocks > 20
    stripes = SAMPLES["train"].shape[0] * SAMPLES["train"].shape[1] // SIDE
    assert sum(reads.values()) <= stripes + len(reads)  # a chunk that two stripes share is read for both
    assert done.bytes_read <= SAMPLES["train"].nbytes


# going on


def test_an_interrupted_command_goes_on_with_the_missing_blocks(dataset, options, tmp_path):
    asked = replace(options, view="variable", workers=1)
    whole = distances(dataset, tmp_path / "whole", asked)
    with pytest.raises(KeyboardInterrupt):
        distances(dataset, tmp_path / "out", asked, Stopping(after=whole.n_blocks // 2))
    assert not (tmp_path / "out").exists()
    done = distances(dataset, tmp_path / "out", asked)
    assert 0 < done.n_computed <= whole.n_blocks - whole.n_blocks // 2
    assert blocks_of(tmp_path / "out") == blocks_of(tmp_path / "whole")


def test_a_block_whose_file_is_gone_or_short_is_computed_again(dataset, options, tmp_path):
    whole = distances(dataset, tmp_path / "whole", options)
    with pytest.raises(KeyboardInterrupt):
        distances(dataset, tmp_path / "out", options, Stopping(after=whole.n_blocks))
    (work,) = files.work_of(tmp_path / "out")
    blocks = work / "matrix/distances.zarr/distances/c"
    (blocks / "0/0").unlink()
    os.truncate(blocks / "1/0", 100)
    assert distances(dataset, tmp_path / "out", options).n_computed == 2
    assert blocks_of(tmp_path / "out") == blocks_of(tmp_path / "whole")


def test_a_command_killed_at_any_file_event_leaves_nothing_or_all_and_ends_with_the_same_bytes(world, capsys):  # noqa: F811
    def words(place):
        options = ["--metric", "cityblock", "--block-bytes", "64", "--scratch", str(place)]
        return ["distances", str(place / "dataset"), str(place / "out"), *options]

    killed = check(sweep(world, "out", words, consolidate(world)), capsys, "distances")
    assert len(killed) > 20


def test_the_same_command_again_finds_its_result(dataset, options, tmp_path):
    first = distances(dataset, tmp_path / "out", options)
    again = distances(dataset, tmp_path / "out", replace(options, workers=1, memory="1GB"))
    assert (again.reused, again.n_computed, again.digest) == (True, 0, first.digest)


def test_overwrite_replaces_a_matrix_in_one_step(dataset, options, tmp_path):
    first = distances(dataset, tmp_path / "out", options)
    asked = replace(options, metric="cosine")
    with pytest.raises(CannotWrite, match=r"other options or of another dataset. Use --overwrite"):
        distances(dataset, tmp_path / "out", asked)
    done = distances(dataset, tmp_path / "out", replace(asked, overwrite=True))
    assert done.digest != first.digest
    assert distances(dataset, tmp_path / "out", asked).reused


def test_a_work_directory_that_goes_away_is_told_not_crashed_over(dataset, options, tmp_path):
    class Removing(Stopping):
        def advance(self, stage, done, total):
            for work in files.work_of(tmp_path / "out"):
                files.retire(work)

    with pytest.raises(TryAgain, match="another process replaced the work"):
        distances(dataset, tmp_path / "out", replace(options, view="variable"), Removing(1))


# what is refused


def test_a_result_that_does_not_fit_the_disk_is_refused_with_what_would(dataset, options, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 60_000)
    with pytest.raises(CannotWrite) as caught:
        distances(dataset, tmp_path / "out", replace(options, view="variable"))
    n = 60 * SAMPLES["train"].shape[1]
    words = str(caught.value)
    assert words.startswith(f"distances of {n} rows need ")
    assert f"{tmp_path} has 60.0 kB free. Use: --view mean (14.4 kB)" in words
    assert words.endswith("or a place with more room.")
    assert list(tmp_path.glob(".out*")) == []


def test_a_smaller_split_is_offered_where_it_fits(dataset, options, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 3_000)
    with pytest.raises(CannotWrite, match=r"Use: --split val \(2.12 kB\), --split test \(324 B\), or a place"):
        distances(dataset, tmp_path / "out", options)


def test_blocks_that_do_not_fit_the_memory_are_refused_with_what_would(dataset, options, tmp_path, monkeypatch):
    monkeypatch.setattr(distancing, "BASE_BYTES", budget.BASE_BYTES)
    limits = budget.Budget(budget.BASE_BYTES + 40_000, 2)
    monkeypatch.setattr(budget, "resolve", lambda memory, workers: limits)
    with pytest.raises(CannotWrite) as caught:
        distances(dataset, tmp_path / "out", options)
    words = str(caught.value)
    assert words.startswith("distances of 60 rows need 45")
    assert "with one worker (a block and its mirror image of 3.60 kB each, two stripes of rows of " in words
    assert "and --memory allows 450 MB. Use: --memory 47" in words


def test_memory_decides_the_workers_and_what_is_kept():
    need = distancing._Need(stripe=10, task=100, n_stripes=50)
    base = budget.BASE_BYTES

    def kept(scheduler, memory_bytes, n_workers, **jobs):
        return need.kept(ClusterSpec(scheduler, 4, memory_bytes, Path(), Jobs(**jobs)), n_workers)

    assert kept("threads", base + 1000, 4) == 50
    assert kept("threads", base + 480, 4) == 8
    assert kept("threads", base + 479, 4) == 0
    assert kept("threads", base + 200, 1) == 10
    each = distancing.LEAST_WORKER_BYTES + 120
    assert kept("local", base + 3 * each, 3) == 2
    assert kept("local", base + 3 * each - 3, 3) == 0
    assert kept("slurm", 0, 4, job_memory="4GB", job_cores=4) == 50  # the driver's memory holds none of it
    assert kept("tls://there:8786", 0, 4) == 2
    for scheduler in ("threads", "local"):
        least = need.least_memory(scheduler)
        assert kept(scheduler, least, 1)
        assert not kept(scheduler, least - 1, 1)


@pytest.mark.parametrize(("value", "metric", "words"), [(np.nan, "euclidean", "NaN"), (0, "cosine", "is all zero")])
def test_a_row_without_distances_is_named_by_its_shard(tmp_path, options, value, metric, words):
    samples = {name: x.copy() for name, x in SAMPLES.items()}
    samples["val"][17, 2] = value
    dataset = publish(tmp_path, samples)
    asked = replace(options, view="variable", metric=metric)
    with pytest.raises(BadInput, match=f"^val: row .*{words}.*It comes from shard val/17.h5, sample 0, variable 2"):
        distances(dataset, tmp_path / "out", replace(asked, split="val"))
    with pytest.raises(BadInput, match=r"^val: row .*val/17.h5"):
        distances(dataset, tmp_path / "out", replace(asked, split="test", against="val"))


def test_what_cannot_be_meant_is_refused(dataset, options, tmp_path):
    with pytest.raises(UsageError, match=r"--metric l7 is not known. Use one of: euclidean, sqeuclidean"):
        replace(options, metric="l7")
    with pytest.raises(UsageError, match="--block-bytes 3 does not hold"):
        replace(options, block_bytes="3")
    with pytest.raises(UsageError, match=r"--against nope: .* has no such rows. Use one of: train, val, test"):
        distances(dataset, tmp_path / "out", replace(options, against="nope"))
    with pytest.raises(UsageError, match="which is only read from"):
        distances(dataset, dataset / "out", options)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine").touch()
    with pytest.raises(CannotWrite, match="exists and is not a matrix of distances"):
        distances(dataset, tmp_path / "taken", replace(options, overwrite=True))


def test_a_damaged_matrix_does_not_open(dataset, options, tmp_path):
    distances(dataset, tmp_path / "out", options)
    chunk = tmp_path / "out/distances.zarr/distances/c/0/1"
    flipped = bytearray(chunk.read_bytes())
    flipped[5] ^= 1
    chunk.write_bytes(flipped)
    found = matrix.open_matrix(tmp_path / "out")
    assert matrix.changed_files(found) == ["distances.zarr/distances/c/0/1"]
    os.truncate(chunk, 8)
    with pytest.raises(BadInput, match="c/0/1 is 8 bytes, wanted 3,600"):
        matrix.open_matrix(tmp_path / "out")
    with pytest.raises(
        BadInput, match=r"is not a matrix of distances: it has no manifest.json. Make one: tsclust dist"
    ):
        matrix.open_matrix(tmp_path)


# the command


def test_the_command_prints_what_it_made(dataset, tmp_path, capsys):
    words = ["distances", str(dataset), str(tmp_path / "out"), "--split", "val", "--against", "test"]
    assert main([*words, "--scratch", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["n_rows"], told["n_columns"], told["n_blocks"], told["reused"]) == (23, 9, 1, False)
    assert main([*words, "--scratch", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "23 x 9 euclidean distances · there already, made with these options" in text
    assert f'zarr.open_group("{tmp_path / "out/distances.zarr"}")["distances"]' in text
