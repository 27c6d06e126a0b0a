"""A published dataset: its views equal numpy's, and it opens only when all of it is there."""

from __future__ import annotations

import os
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
from sources import OPTIONS, contents, item_per_file, rows_per_file, shared_parsers, three_splits

from tsclust_ooc.consolidate import init
from tsclust_ooc.dataset import Dataset, check_sizes, open_dataset
from tsclust_ooc.errors import BadInput, TryAgain, UsageError
from tsclust_ooc.pipeline import consolidating
from tsclust_ooc.pipeline.consolidating import consolidate
from tsclust_ooc.plan import Options
from tsclust_ooc.source import open_source

VARIANTS = [(dtype, compress) for dtype in ("<f4", "<f2", "<f8") for compress in (None, "zstd")]


@pytest.fixture(scope="module", autouse=True)
def parsers():
    with shared_parsers(consolidating):
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Datasets of 50 samples (3, 16), one for each dtype and codec, and one of vectors: name -> (Dataset, samples)."""
    folder, found = tmp_path_factory.mktemp("datasets"), {}
    for dtype in ("<f4", "<f2", "<f8"):
        samples = item_per_file(folder / f"source{dtype}", 50, dtype=dtype)
        for compress in (None, "zstd"):
            final = folder / f"{dtype}{compress}"
            consolidate(folder / f"source{dtype}", final, replace(OPTIONS, compress=compress))
            found[dtype, compress] = open_dataset(final), samples
    vectors = rows_per_file(folder / "rows", dtype="<f2")
    consolidate(folder / "rows", folder / "vectors", OPTIONS)
    found["vectors"] = open_dataset(folder / "vectors"), vectors
    return found


@pytest.fixture
def dataset(tmp_path, made) -> Dataset:
    """A dataset of one's own, to harm."""
    shutil.copytree(made["<f4", None][0].path, tmp_path / "ds")
    return open_dataset(tmp_path / "ds")


def viewed(samples: np.ndarray, view: str) -> np.ndarray:
    """A view, by numpy."""
    wide = np.float64 if samples.dtype.itemsize == 8 else np.float32
    if view == "mean" and samples.ndim == 3:
        return samples.astype(np.float64).mean(axis=1).astype(wide)
    last = samples.shape[-1] if view == "variable" else -1
    return samples.astype(wide).reshape((-1, last) if view == "variable" else (len(samples), -1))


@pytest.mark.parametrize("view", ["flatten", "variable", "mean"])
@pytest.mark.parametrize("variant", [*VARIANTS, "vectors"])
def test_a_view_is_a_reshape_or_a_mean_of_the_samples(made, variant, view):
    dataset, samples = made[variant]
    rows, wanted = dataset["all"].rows(view), viewed(samples, view)
    assert (rows.n_rows, rows.n_columns) == wanted.shape
    blocks = [rows.read(i) for i in range(len(rows.bounds) - 1)]
    assert [len(b) for b in blocks] == list(np.diff(rows.bounds))
    assert all(b.flags.c_contiguous and b.dtype == rows.view_dtype == wanted.dtype for b in blocks)
    assert np.array_equal(np.concatenate(blocks), wanted)
    assert rows.n_bytes == samples.nbytes


@pytest.mark.parametrize("view", ["flatten", "variable", "mean"])
@pytest.mark.parametrize("variant", [*VARIANTS, "vectors"])
def test_the_lazy_view_equals_the_rows(made, variant, view):
    dataset, samples = made[variant]
    lazy, wanted = dataset["all"].view(view), viewed(samples, view)
    assert (lazy.shape, lazy.dtype) == (wanted.shape, wanted.dtype)
    assert tuple(np.cumsum((0, *lazy.chunks[0]))) == dataset["all"].rows(view).bounds
    assert np.array_equal(lazy.compute(scheduler="synchronous"), wanted)


def test_rows_travel_pickled_and_small(made):
    for variant in VARIANTS:
        rows = made[variant][0]["all"].rows("variable")
        first = rows.read(0)
        copied = pickle.loads(pickle.dumps(rows))
        assert np.array_equal(copied.read(0), first)
        assert len(pickle.dumps(rows)) < 1000


def test_an_unknown_view_or_split_names_the_known(made):
    dataset, _ = made["<f4", None]
    with pytest.raises(UsageError, match="flatten, variable, mean"):
        dataset["all"].rows("columns")
    with pytest.raises(KeyError, match="it has all"):
        dataset["train"]


def test_a_dataset_is_a_mapping_that_shows_what_is_in_it(tmp_path):
    wrote = three_splits(tmp_path / "source")
    consolidate(tmp_path / "source", tmp_path / "ds", OPTIONS)
    dataset = open_dataset(str(tmp_path / "ds"))
    assert list(dataset) == ["train", "val", "test"]
    assert {name: split.n_samples for name, split in dataset.items()} == {k: len(v) for k, v in wrote.items()}
    assert "train 50, val 9, test 23 samples (3, 16) <f4" in repr(dataset)
    assert "<td>train</td>" in dataset._repr_html_()
    assert np.array_equal(dataset["val"].array[:], wrote["val"])
    index = dataset["train"].index().to_pydict()
    assert index["row"] == list(range(50))
    assert index["shard"] == [f"train/{i}.h5" for i in range(50)]
    assert set(index["split"]) == {"train"}


def test_an_empty_split_has_no_rows_and_no_blocks(tmp_path):
    rows_per_file(tmp_path / "source" / "train", (3, 4))
    rows_per_file(tmp_path / "source" / "val", (0,))
    consolidate(tmp_path / "source", tmp_path / "ds", OPTIONS)
    split = open_dataset(tmp_path / "ds")["val"]
    assert (split.rows().n_rows, split.rows().bounds) == (0, (0,))
    assert split.view().compute(scheduler="synchronous").shape == (0, 16)
    assert split.index().num_rows == 0


CHUNK = "data.zarr/all/embeddings/c/1/0/0"


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: os.truncate(path, 100), "100 bytes, wanted 4,032"),
        (lambda path: os.truncate(path, 0), "0 bytes, wanted 4,032"),
        (lambda path: os.truncate(path, 5000), "5,000 bytes, wanted 4,032"),
    ],
)
def test_a_dataset_with_a_missing_or_short_chunk_does_not_open(dataset, harm, words):
    harm(dataset.path / CHUNK)
    with pytest.raises(BadInput, match=f"{CHUNK}: {words}.*--overwrite"):
        open_dataset(dataset.path)
    assert [d.file for d in check_sizes(open_dataset(dataset.path, check=False))] == [CHUNK]


@pytest.mark.parametrize("size", [None, 100])
def test_a_chunk_that_is_lost_after_opening_is_an_error_never_fill_values(dataset, size):
    rows = dataset["all"].rows()
    if size is None:
        (dataset.path / CHUNK).unlink()
    else:
        os.truncate(dataset.path / CHUNK, size)
    rows.read(0)
    with pytest.raises(BadInput, match=f"{CHUNK} .*tsclust verify"):
        rows.read(1)


def test_what_is_no_dataset_is_told_apart(tmp_path):
    with pytest.raises(BadInput, match=r"nothing there.*tsclust consolidate"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"a directory without manifest\.json"):
        open_dataset(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="is a file, not a dataset"):
        open_dataset(tmp_path / "file")


def test_unfinished_work_says_how_far_it_is_and_what_to_do(tmp_path):
    folder = tmp_path / "c" / "x"  # a folder that is named as zarr names its chunks
    item_per_file(folder / "source", 50)
    work = init(folder / "ds", open_source(folder / "source", chunk_bytes=4096).plan, ())
    (work.dataset / "data.zarr/all/embeddings/c/0/0").mkdir(parents=True)
    (work.dataset / "data.zarr/all/embeddings/c/0/0/0").write_bytes(b"x")
    before = contents(work.root)
    with pytest.raises(TryAgain, match=r"Found: 1 chunk files .*Run the same consolidate command again"):
        open_dataset(folder / "ds")
    assert contents(work.root) == before


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"format_version": 3', '"format_version": 7', "format_version 7.*reads 3"),
        ('"reason"', '"cause"', "unknown keys .'cause'., missing keys .'reason'."),
        ('{\n "format_version"', "{[", "not readable JSON"),
    ],
)
def test_a_manifest_that_is_not_understood_is_refused(dataset, old, new, words):
    manifest = dataset.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace(old, new, 1))
    with pytest.raises(BadInput, match=words):
        open_dataset(dataset.path)


def test_home_and_relative_paths_are_understood(dataset, monkeypatch):
    monkeypatch.setenv("HOME", str(dataset.path.parent))
    assert open_dataset("~/ds").path == dataset.path
    monkeypatch.chdir(dataset.path.parent)
    assert open_dataset("ds").path == dataset.path


def test_options_are_in_the_manifest(made):
    assert made["<f4", "zstd"][0].manifest.options == Options(4096, "zstd")
    assert made["<f4", None][0].manifest.n_rejected == 0
