"""The making of arrays and chunks: zarr reads back what was written, whatever the sizes, types, codec and files."""

from __future__ import annotations

import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import xxhash
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import contents

from tsclust_ooc.chunks import buffer, chunk_writer, make_arrays
from tsclust_ooc.dataset import DATA
from tsclust_ooc.plan import Options, make_plan
from tsclust_ooc.rows import DatasetRows
from tsclust_ooc.shards.schema import Schema, Shard
from tsclust_ooc.shards.survey import Survey
from tsclust_ooc.store import DurableStore

CODECS = ("", "zstd", "blosc-lz4")


def planned(n_rows, item=(64,), dtype="<f4", chunk_rows=16, a_shard=0, codec=""):
    """The plan for one split of `n_rows`, with so many samples a chunk and chunks a zarr shard."""
    chunk_bytes = chunk_rows * int(np.prod(item)) * np.dtype(dtype).itemsize
    shards = (Shard("0.h5", "all", 1000, 10**18, n_rows),)
    found = Survey("/data", Schema("rows-per-file", "x", item, dtype), "told", shards, (), (), (), 0)
    return make_plan(found, Options(chunk_bytes, codec, shard_bytes=a_shard * chunk_bytes))


def samples_of(plan):
    n, schema = plan.n_rows, plan.schema
    return np.random.default_rng(n).standard_normal((n, *schema.item_shape)).astype(schema.dtype)


def write(dataset: Path, plan, samples) -> dict[str, tuple[int, str]]:
    """Every partition of `plan`, the last one first; what the store says it wrote."""
    (dataset / DATA).mkdir(parents=True)
    make_arrays(dataset, plan)
    store = DurableStore(dataset / DATA)
    for partition in reversed(plan.partitions):
        with chunk_writer(plan, partition, store) as put:
            for start, stop in plan.chunks_of(partition):
                chunk = buffer((plan.chunk_rows["all"], *plan.schema.item_shape), plan.schema.dtype)
                chunk[: stop - start] = samples[start:stop]
                put(start, stop, chunk)
    return store.written


def chunk_files(dataset: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(dataset / DATA).items() if "/c/" in name}


def rows_of(dataset: Path, plan) -> np.ndarray:
    """All rows, block by block, as passes read them."""
    rows = DatasetRows(
        str(dataset / DATA / "all" / "embeddings"), (plan.n_rows, *plan.schema.item_shape), plan.chunk_rows["all"],
        plan.schema.dtype, "flatten", not plan.options.codec, plan.chunks_a_shard["all"],
    )  # fmt: skip
    return np.concatenate([rows.read(block) for block in range(len(rows.bounds) - 1)])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 150), st.sampled_from([(64,), (3, 40)]), st.sampled_from(["<f2", "<f4", "<f8"]),
    st.integers(35, 60), st.sampled_from([0, 2, 3, 5]), st.sampled_from(CODECS),
)  # fmt: skip
def test_zarr_reads_what_was_written_and_so_do_passes(n_rows, item, dtype, chunk_rows, a_shard, codec):
    plan = planned(n_rows, item, dtype, chunk_rows, a_shard, codec)
    samples = samples_of(plan)
    with tempfile.TemporaryDirectory() as folder:
        written = write(Path(folder), plan, samples)
        array = zarr.open_group(Path(folder) / DATA, mode="r")["all/embeddings"]
        assert array.dtype == samples.dtype
        assert np.array_equal(array[:], samples)
        assert np.array_equal(rows_of(Path(folder), plan), samples.reshape(n_rows, -1).astype(array.dtype))
        on_disk = chunk_files(Path(folder))
        assert written == {name: (len(data), xxhash.xxh3_128_hexdigest(data)) for name, data in on_disk.items()}
        assert len(on_disk) == (len(plan.partitions) if a_shard else plan.n_chunks)


@pytest.mark.parametrize("codec", CODECS)
def test_a_zarr_shard_has_the_bytes_that_zarr_gives_it(tmp_path, codec):
    plan = planned(7 * 16, a_shard=4, codec=codec)  # the second shard has three of its four chunks
    samples = samples_of(plan)
    write(tmp_path / "ours", plan, samples)
    (tmp_path / "theirs" / DATA).mkdir(parents=True)
    make_arrays(tmp_path / "theirs", plan)
    zarr.open_array(tmp_path / "theirs" / DATA / "all/embeddings", mode="r+")[:] = samples
    assert chunk_files(tmp_path / "ours") == chunk_files(tmp_path / "theirs")


@pytest.mark.parametrize("codec", CODECS)
def test_chunks_of_nan_and_of_zeros_are_in_the_shard_like_any_other(tmp_path, codec):
    plan = planned(4 * 16, a_shard=2, codec=codec)
    samples = np.full((64, 64), np.nan, "<f4")
    samples[16:32] = 0
    write(tmp_path, plan, samples)
    assert np.array_equal(rows_of(tmp_path, plan), samples, equal_nan=True)


def test_a_shard_without_all_its_chunks_never_gets_its_name(tmp_path):
    plan = planned(4 * 16, a_shard=4)
    (tmp_path / DATA).mkdir()
    make_arrays(tmp_path, plan)
    store = DurableStore(tmp_path / DATA)
    with chunk_writer(plan, plan.partitions[0], store) as put:
        put(0, 16, samples_of(plan)[:16])
    assert chunk_files(tmp_path) == {}
    assert store.written == {}


def test_an_error_while_a_shard_is_written_leaves_nothing_of_it(tmp_path):
    plan = planned(4 * 16, a_shard=4)
    (tmp_path / DATA).mkdir()
    make_arrays(tmp_path, plan)

    def fail():
        with chunk_writer(plan, plan.partitions[0], DurableStore(tmp_path / DATA)) as put:
            put(0, 16, samples_of(plan)[:16])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert chunk_files(tmp_path) == {}


@pytest.mark.parametrize("codec", CODECS)
def test_the_writer_of_a_shard_holds_a_few_chunks_at_most(tmp_path, codec):
    chunk = np.random.default_rng(0).standard_normal((64, 2048)).astype("<f4")
    plan = planned(40 * 64, (2048,), chunk_rows=64, a_shard=40, codec=codec)
    (tmp_path / DATA).mkdir()
    make_arrays(tmp_path, plan)
    store = DurableStore(tmp_path / DATA)
    tracemalloc.start()
    try:
        with chunk_writer(plan, plan.partitions[0], store) as put:
            for start, stop in plan.chunks_of(plan.partitions[0]):
                put(start, stop, chunk)
        assert tracemalloc.get_traced_memory()[1] < 6 * chunk.nbytes
    finally:
        tracemalloc.stop()
    assert sum(size for size, _ in store.written.values()) > 20 * chunk.nbytes
