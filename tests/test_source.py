"""A source as lazy arrays: blocks are partitions, values are h5py's, and consolidation stores just those."""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path

import dask
import dask.array
import numpy as np
import pytest
import zarr
from sources import (
    ITEM,
    KEY,
    OPTIONS,
    dataset_per_item,
    item_per_file,
    read_shard,
    rows_per_file,
    shared_parsers,
    three_splits,
    values,
    write_shard,
)

from tsclust_ooc import source as source_module
from tsclust_ooc.errors import BadInput
from tsclust_ooc.pipeline.consolidating import consolidate
from tsclust_ooc.plan import make_plan
from tsclust_ooc.shards.parsers import Parsers
from tsclust_ooc.source import RowReader, open_source, read_block
from tsclust_ooc.staging import Stage


@pytest.fixture(scope="module", autouse=True)
def parsers():
    with shared_parsers(source_module):
        yield


def computed(lazy):
    return lazy.compute(scheduler="synchronous")


def test_a_split_is_a_dask_array_whose_blocks_are_the_partitions(tmp_path):
    wrote = three_splits(tmp_path)
    source = open_source(tmp_path, chunk_bytes=4096)
    assert list(source) == ["train", "val", "test"]
    lazy = source["train"]
    assert isinstance(lazy, dask.array.Array)
    assert (lazy.shape, lazy.dtype) == ((50, *ITEM), np.dtype("<f4"))
    assert lazy.chunks[0] == tuple(p.stop - p.start for p in source.plan.partitions if p.split == "train")
    assert lazy.chunks[1:] == ((3,), (16,))
    stacked = np.stack([read_shard(tmp_path / "train" / f"{i}.h5") for i in range(50)])
    assert np.array_equal(computed(lazy), stacked)
    assert np.array_equal(computed(source["test"]), wrote["test"])


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    wrote = item_per_file(tmp_path, 100)
    lazy = open_source(tmp_path, chunk_bytes=4096)["all"]
    for i in range(42, 100):
        (tmp_path / f"{i}.h5").unlink()
    assert np.array_equal(computed(lazy[:30]), wrote[:30])


def test_consolidation_stores_exactly_these_blocks(tmp_path):
    three_splits(tmp_path / "source")
    consolidate(tmp_path / "source", tmp_path / "dataset", OPTIONS)
    source = open_source(tmp_path / "source", chunk_bytes=4096)
    group = zarr.open_group(tmp_path / "dataset" / "data.zarr", mode="r")
    for split in source:
        assert np.array_equal(group[f"{split}/embeddings"][:], computed(source[split]))


def test_the_graph_does_not_grow_with_the_number_of_shards(tmp_path):
    item_per_file(tmp_path, 300)
    lazy = open_source(tmp_path)["all"]
    assert len(dict(lazy.__dask_graph__())) <= 4 * lazy.npartitions + 4
    assert lazy.npartitions == 1
    (optimized,) = dask.optimize(lazy)
    assert len(dict(optimized.__dask_graph__())) <= 4


def test_the_same_source_has_the_same_keys_and_travels_pickled(tmp_path):
    item_per_file(tmp_path, 30)
    one, other = (open_source(tmp_path, chunk_bytes=4096)["all"] for _ in range(2))
    assert one.name == other.name
    os.utime(tmp_path / "3.h5", ns=(5, 5))
    assert open_source(tmp_path, chunk_bytes=4096)["all"].name != one.name
    plan = open_source(tmp_path, chunk_bytes=4096).plan
    copied = pickle.loads(pickle.dumps(plan))
    assert np.array_equal(read_block(copied, copied.partitions[0]), read_block(plan, plan.partitions[0]))


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", ">f8"])
@pytest.mark.parametrize("options", [{}, {"chunks": (2, 16), "compression": "gzip"}])
def test_every_way_of_storing_gives_the_same_values(tmp_path, dtype, options):
    wrote = item_per_file(tmp_path, 5, dtype=dtype, **options)
    lazy = open_source(tmp_path)["all"]
    assert lazy.dtype == np.dtype(dtype).newbyteorder("<")
    assert np.array_equal(computed(lazy), wrote)


@pytest.mark.parametrize("shape", [(1, 3, 16), (48,), (1, 48)])
def test_leading_axes_of_one_are_dropped(tmp_path, shape):
    wrote = item_per_file(tmp_path, 5, stored=lambda x: x.reshape(shape))
    item = tuple(n for n in shape if n > 1)
    assert np.array_equal(computed(open_source(tmp_path)["all"]), wrote.reshape(5, *item))


@pytest.mark.parametrize("options", [{}, {"chunks": (1, 16), "compression": "gzip"}])
def test_rows_of_shards_are_laid_end_to_end(tmp_path, options):
    wrote = rows_per_file(tmp_path, (5, 0, 70, 1, 300), **options)
    lazy = open_source(tmp_path, chunk_bytes=4096)["all"]
    assert lazy.npartitions == 3  # the large shard lies in all of them
    assert np.array_equal(computed(lazy), wrote)


def test_datasets_of_shards_are_laid_end_to_end(tmp_path):
    wrote = dataset_per_item(tmp_path, {"1.h5": ["s|1", "s|2", "s|10"], "2.h5": ["g/b", "g/c"], "10.h5": ["x"]})
    assert np.array_equal(computed(open_source(tmp_path)["all"]), wrote)


def test_an_overridden_layout_changes_what_a_sample_is(tmp_path):
    wrote = item_per_file(tmp_path, 5)
    lazy = open_source(tmp_path, layout="rows-per-file")["all"]
    assert np.array_equal(computed(lazy), wrote.reshape(15, 16))


def test_a_key_can_be_named(tmp_path):
    for i, sample in enumerate(values(4)):
        write_shard(tmp_path / f"{i}.h5", sample, key="mine")
    assert np.array_equal(computed(open_source(tmp_path, key="mine")["all"]), values(4))


def test_an_empty_split_is_an_empty_array(tmp_path):
    rows_per_file(tmp_path / "train", (3, 4))
    write_shard(tmp_path / "val" / "0.h5", np.zeros((0, 16), "f4"), "features")
    lazy = open_source(tmp_path)["val"]
    assert computed(lazy).shape == (0, 16)


def test_an_unknown_split_is_a_key_error_that_names_the_known(tmp_path):
    three_splits(tmp_path, (3, 2, 2))
    source = open_source(tmp_path)
    assert len(source) == 3
    with pytest.raises(KeyError, match="train, val, test"):
        source["dev"]


def test_bad_shards_are_left_out_and_listed(tmp_path):
    wrote = item_per_file(tmp_path, 10)
    (tmp_path / "4.h5").write_bytes(b"")
    source = open_source(tmp_path)
    assert [(p.path, p.code) for p in source.problems] == [("4.h5", "empty-file")]
    assert np.array_equal(computed(source["all"]), np.delete(wrote, 4, axis=0))


def test_a_shard_that_turns_out_bad_is_named_when_it_is_read(tmp_path):
    item_per_file(tmp_path, 10)
    lazy = open_source(tmp_path)["all"]
    os.utime(tmp_path / "3.h5", ns=(5, 5))
    (tmp_path / "5.h5").unlink()
    with pytest.raises(BadInput, match=r"3\.h5: unstable.*5\.h5: unreadable"):
        computed(lazy)


def test_every_row_knows_its_shard_its_place_in_it_and_its_name(tmp_path):
    rows_per_file(tmp_path / "rows", (2, 0, 3))
    item_per_file(tmp_path / "items", 2)
    dataset_per_item(tmp_path / "names", {"0.h5": ["s|1", "s|2"], "1.h5": ["g/1", "g/2"]})
    wanted = {
        "rows": [(f"slide_{s}.h5", row, f"slide_{s}:{row}") for s, n in ((0, 2), (2, 3)) for row in range(n)],
        "items": [("0.h5", 0, "0"), ("1.h5", 0, "1")],
        "names": [("0.h5", 0, "s|1"), ("0.h5", 1, "s|2"), ("1.h5", 0, "g/1"), ("1.h5", 1, "g/2")],
    }
    for folder, rows in wanted.items():
        source = open_source(tmp_path / folder)
        plan = make_plan(source.survey, source.plan.options)
        out = np.empty((plan.n_rows, *plan.schema.item_shape), "f4")
        with Parsers(1) as parsers, Stage(tmp_path, "never", on_network=False) as stage:
            ids, problems = RowReader(plan, parsers, stage).read("all", 0, plan.n_rows, out)
        assert problems == []
        assert list(zip(ids.shards, ids.shard_rows, ids.sample_ids, strict=True)) == rows


def test_any_range_of_rows_equals_the_rows_of_h5py(tmp_path):
    wrote = rows_per_file(tmp_path, (5, 17, 1, 40), key=KEY)
    plan = open_source(tmp_path).plan
    rng = np.random.default_rng(0)
    with Parsers(1) as parsers, Stage(tmp_path, "never", on_network=False) as stage:
        reader = RowReader(plan, parsers, stage)
        for _ in range(40):
            start, stop = sorted(rng.integers(0, 64, 2))
            out = np.full((stop - start, 16), np.nan, "f4")
            reader.read("all", int(start), int(stop), out)
            assert np.array_equal(out, wrote[start:stop])


def test_several_sources_are_one_lazy_source(tmp_path):
    wrote = three_splits(tmp_path, (9, 4, 3))
    source = open_source([tmp_path / "val", str(tmp_path / "train")], chunk_bytes=4096)
    assert list(source) == ["train", "val"]
    for split in source:
        assert np.array_equal(computed(source[split]), wrote[split])


def test_a_source_may_lie_on_several_filesystems(tmp_path):
    wrote = item_per_file(tmp_path / "train", 5)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as far:
        write_shard(Path(far) / "val" / "0.h5", wrote[0])
        source = open_source([far, tmp_path / "train"])
        assert source.plan.source == "/"
        assert np.array_equal(computed(source["train"]), wrote)
        assert np.array_equal(computed(source["val"]), wrote[:1])


def test_a_list_and_an_expression_tell_what_is_read_and_where_it_goes(tmp_path):
    for name, sample in zip(("train_10", "train_9", "valid_1", "left_out"), values(4), strict=True):
        write_shard(tmp_path / "flat" / f"{name}.h5", sample)
    (tmp_path / "list.txt").write_text("flat/valid_1.h5\nflat/train_10.h5\nflat/train_9.h5\n")
    source = open_source(tmp_path / "list.txt", split_pattern=r"(?P<split>[a-z]+)_\d+")
    stored = {name: [read_shard(tmp_path / "flat" / f"{one}.h5") for one in ones]
              for name, ones in {"train": ("train_9", "train_10"), "val": ("valid_1",)}.items()}  # fmt: skip
    assert list(source) == list(stored)
    for split in source:
        assert np.array_equal(computed(source[split]), stored[split])
