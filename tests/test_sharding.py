"""Zarr shards: many chunks in a file with one writer, that plain tools read, and whose damage is always found."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import dask.array
import h5py
import numpy as np
import pytest
import xarray
import zarr
from google_crc32c import value as crc32c
from sources import KEY, OPTIONS, contents, data_of, shared_parsers, three_splits, write_shard

from tsclust_ooc import files
from tsclust_ooc.dataset import open_dataset
from tsclust_ooc.errors import BadInput, UsageError
from tsclust_ooc.pipeline import arrays, consolidating, verifying
from tsclust_ooc.pipeline.consolidating import BadShards, ConsolidateOptions, consolidate
from tsclust_ooc.pipeline.verifying import verify
from tsclust_ooc.plan import Options
from tsclust_ooc.sharding import index_bytes, index_size, read_index

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")

SHARDED = replace(OPTIONS, sharding="12KiB")
"""Three chunks of 21 samples in a file."""
SIZES = (170, 9, 45)
N_CHUNKS, N_FILES = 9 + 1 + 3, 3 + 1 + 1
SHARD = "data.zarr/train/embeddings/c/1/0/0"
CODECS = (None, "zstd", "blosc-lz4")


@pytest.fixture(scope="module", autouse=True)
def parsers():
    with shared_parsers(consolidating, arrays, verifying):
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A source, and datasets of it with every codec."""
    folder = tmp_path_factory.mktemp("sharding")
    three_splits(folder / "source", SIZES)
    for codec in CODECS:
        consolidate(folder / "source", folder / str(codec), replace(SHARDED, compress=codec))
    return folder


@pytest.fixture(params=CODECS, ids=str)
def dataset(made, tmp_path, request) -> Path:
    """A dataset that a test may damage."""
    for name, data in contents(made / str(request.param)).items():
        (tmp_path / "ds" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "ds" / name).write_bytes(data)
    return tmp_path / "ds"


def by_h5py(source: Path, split: str) -> np.ndarray:
    """The samples of a split in natural order."""
    paths = sorted((source / split).iterdir(), key=lambda path: int(path.stem))
    samples = []
    for path in paths:
        with h5py.File(path, "r") as file:
            samples.append(file[KEY][()])
    return np.stack(samples)


def read_all(dataset: Path, split: str = "train") -> np.ndarray:
    """All rows of a split as passes read them, from a copy that travelled."""
    rows = pickle.loads(pickle.dumps(open_dataset(dataset, check=False)[split].rows()))
    return np.concatenate([rows.read(block) for block in range(len(rows.bounds) - 1)])


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_plain_tools_and_passes_read_what_h5py_reads(made, split, codec):
    store, samples = made / str(codec) / "data.zarr", by_h5py(made / "source", split)
    array = zarr.open_group(store, mode="r")[f"{split}/embeddings"]
    assert array.shards[0] == array.chunks[0] * {"train": 3, "val": 1, "test": 3}[split]
    assert np.array_equal(array[:], samples)
    lazy = dask.array.from_zarr(str(store), component=f"{split}/embeddings")
    assert np.array_equal(lazy.compute(scheduler="synchronous"), samples)
    assert np.array_equal(xarray.open_zarr(store, group=split)["embeddings"].values, samples)
    assert np.array_equal(read_all(made / str(codec), split), samples.reshape(len(samples), -1))
    view = open_dataset(made / str(codec))[split].view("flatten")
    assert np.array_equal(view.compute(scheduler="synchronous"), samples.reshape(len(samples), -1))


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_files_are_fewer_than_chunks_and_every_one_is_in_the_manifest(made, codec):
    done = consolidate(made / "source", made / str(codec), replace(SHARDED, compress=codec))
    assert (done.reused, done.n_chunks, done.n_files) == (True, N_CHUNKS, N_FILES)
    assert sum("/c/" in name for name in contents(made / str(codec))) == N_FILES
    verified = verify(made / str(codec), made / "source")
    assert (verified.damage, verified.n_samples_compared) == ((), sum(SIZES))


def test_the_chunks_are_those_of_a_dataset_without_shards_but_its_digest_is_another(made, tmp_path):
    plain = consolidate(made / "source", tmp_path / "ds", OPTIONS)
    sharded = open_dataset(made / "None")
    assert (plain.n_chunks, plain.n_files) == (N_CHUNKS, N_CHUNKS)
    assert plain.digest != sharded.manifest.digest
    for split, opened in open_dataset(tmp_path / "ds").items():
        assert opened.rows().bounds == sharded[split].rows().bounds
        assert opened.entry == sharded[split].entry


def test_a_job_array_in_any_order_and_worker_processes_write_the_same_bytes(made, tmp_path):
    wanted = data_of(made / "None")
    planned = arrays.init(made / "source", tmp_path / "steps", SHARDED)
    assert planned.n_partitions == N_FILES  # one writer a file
    for number in (4, 0, 2, 3, 1, 0):
        arrays.write_partition(made / "source", tmp_path / "steps", number, SHARDED)
    assert arrays.finalize(made / "source", tmp_path / "steps", SHARDED).n_files == N_FILES
    assert data_of(tmp_path / "steps") == wanted
    consolidate(made / "source", tmp_path / "local", replace(SHARDED, scheduler="local", memory="2GB"))
    assert data_of(tmp_path / "local") == wanted


def test_a_later_step_with_another_sharding_is_refused_and_without_one_goes_on(made, tmp_path):
    arrays.init(made / "source", tmp_path / "ds", SHARDED)
    with pytest.raises(UsageError, match=r"--sharding 16384: .* was initialized with 12288"):
        arrays.write_partition(made / "source", tmp_path / "ds", 0, replace(SHARDED, sharding="16KiB"))
    assert not arrays.write_partition(made / "source", tmp_path / "ds", 0, replace(SHARDED, sharding=None)).reused


def test_a_bad_shard_keeps_its_file_from_being_made_and_the_others_are_kept(tmp_path):
    three_splits(tmp_path / "source", (130, 5, 5), compression="gzip")
    whole = (tmp_path / "source" / "train" / "70.h5").read_bytes()
    with h5py.File(tmp_path / "source" / "train" / "70.h5") as file:
        at = file[KEY].id.get_chunk_info(0).byte_offset
    (tmp_path / "source" / "train" / "70.h5").write_bytes(whole[:at] + b"\xff" * 40 + whole[at + 40 :])
    with pytest.raises(BadShards, match=r"train/70\.h5"):
        consolidate(tmp_path / "source", tmp_path / "ds", SHARDED)
    (work,) = tmp_path.glob(".ds.*.wip")
    assert sorted(path.parent.parent.name for path in (work / "dataset/data.zarr/train").rglob("c/*/0/0")) == ["0", "2"]
    write_shard(tmp_path / "source" / "train" / "70.h5", np.zeros((3, 16), "<f4"), compression="gzip")
    consolidate(tmp_path / "source", tmp_path / "ds", SHARDED)
    assert np.array_equal(read_all(tmp_path / "ds"), by_h5py(tmp_path / "source", "train").reshape(130, -1))


class Killed(BaseException):
    """Stands for SIGKILL: no handler in the package may catch it."""


def test_a_writer_killed_in_the_middle_of_a_file_is_followed_by_one_that_ends_with_the_same_bytes(
    made, tmp_path, monkeypatch
):
    pour, n = files.pour, [0]

    def dying(file, data):
        n[0] += 1
        if n[0] > 5:
            os.write(file.fileno(), data[:1000])
            raise Killed
        pour(file, data)

    arrays.init(made / "source", tmp_path / "ds", SHARDED)
    with monkeypatch.context() as patch:
        patch.setattr(files, "pour", dying)
        patch.setattr(Path, "unlink", lambda *_args, **_options: None)  # nothing is tidied by the dead
        for number in (0, 1):
            try:
                arrays.write_partition(made / "source", tmp_path / "ds", number, SHARDED)
            except Killed:
                assert number == 1
    assert [path.name for path in tmp_path.rglob("*.partial")] != []
    for number in range(N_FILES):
        arrays.write_partition(made / "source", tmp_path / "ds", number, SHARDED)
    arrays.finalize(made / "source", tmp_path / "ds", SHARDED)
    assert data_of(tmp_path / "ds") == data_of(made / "None")


def test_a_changed_bit_anywhere_in_an_index_is_found_by_reads_and_by_verify(dataset):
    path = dataset / SHARD
    whole = path.read_bytes()
    for at in range(len(whole) - index_size(3), len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(BadInput, match=r"the index of zarr shard .*c/1/0/0 does not match its checksum"):
            read_all(dataset)
    assert [one.file for one in verify(dataset).damage] == [SHARD]


@pytest.mark.parametrize("n_bytes", [0, 10, 52, 5000])
def test_a_file_that_was_cut_is_found_by_reads_and_on_opening(dataset, n_bytes):
    path = dataset / SHARD
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(BadInput, match="tsclust verify"):
        read_all(dataset)
    with pytest.raises(BadInput, match=SHARD):
        open_dataset(dataset)


def test_a_missing_file_is_an_error_not_fill_values(dataset):
    (dataset / SHARD).unlink()
    with pytest.raises(BadInput, match=r"zarr shard .*c/1/0/0 is missing"):
        read_all(dataset)


def test_a_chunk_that_the_index_calls_absent_is_an_error_not_fill_values(dataset):
    path = dataset / SHARD
    whole = path.read_bytes()
    index = bytearray(whole[-index_size(3) : -4])
    index[16:32] = b"\xff" * 16
    path.write_bytes(whole[: -index_size(3)] + index + crc32c(bytes(index)).to_bytes(4, "little"))
    with pytest.raises(BadInput, match=r"chunk 4 is not in zarr shard .*c/1/0/0"):
        read_all(dataset)


def test_a_chunk_that_cannot_be_decoded_or_lies_beyond_the_file_is_an_error(dataset):
    path = dataset / SHARD
    whole = path.read_bytes()
    index = np.frombuffer(whole[-index_size(3) : -4], "<u8").reshape(3, 2).copy()
    index[2] = len(whole) - 100, 10**6
    told = index.tobytes()
    path.write_bytes(whole[: -index_size(3)] + told + crc32c(told).to_bytes(4, "little"))
    with pytest.raises(BadInput, match="tsclust verify"):
        read_all(dataset)


def test_a_missing_file_of_one_compressed_chunk_is_an_error_too(made, tmp_path):
    consolidate(made / "source", tmp_path / "ds", replace(OPTIONS, compress="zstd"))
    (tmp_path / "ds" / SHARD).unlink()
    with pytest.raises(BadInput, match=r"chunk .*c/1/0/0 is missing"):
        read_all(tmp_path / "ds")


def test_the_index_is_the_one_that_zarr_writes(tmp_path):
    array = zarr.create_array(
        tmp_path / "a", shape=(10, 4), chunks=(3, 4), shards=(15, 4), dtype="f4", compressors=None, fill_value=0
    )
    array[:] = 1.0
    path = tmp_path / "a/c/0/0"
    data = path.read_bytes()
    assert data[-index_size(5) :] == index_bytes([48] * 4, 5)
    assert read_index(path, 5).tolist() == [[48 * i, 48] for i in range(4)] + [[2**64 - 1, 2**64 - 1]]


@pytest.mark.parametrize(
    ("options", "n_bytes", "n_chunks", "wanted"),
    [
        (Options(), 2**24, 1000, 0),
        (Options(shard_bytes=2**30), 2**24, 1000, 64),
        (Options(shard_bytes=2**30), 2**24 - 100, 1000, 64),
        (Options(shard_bytes=2**30), 2**24 + 100, 1000, 63),  # rounded down to whole chunks
        (Options(shard_bytes=2**30), 2**24, 5, 5),  # a small split has a small shard
        (Options(shard_bytes=2**30), 2**24, 0, 1),  # an empty one, too
        (Options(shard_bytes=2**25), 2**26, 10, 2),  # samples larger than a chunk: two chunks at least
    ],
)
def test_a_shard_is_whole_chunks_two_at_least_and_no_more_than_there_are(options, n_bytes, n_chunks, wanted):
    assert options.chunks_a_shard(n_bytes, n_chunks) == wanted


def test_a_shard_that_does_not_hold_two_chunks_is_refused():
    with pytest.raises(UsageError, match=r"--sharding 20,000,000 is less than two chunks of 16,777,216 bytes"):
        ConsolidateOptions(sharding="20MB").plan_options()
