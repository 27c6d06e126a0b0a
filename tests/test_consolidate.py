"""init, write_partition, finalize: in any order, any number of times, by anybody, the same bytes or nothing."""

from __future__ import annotations

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import dask.array
import h5py
import numpy as np
import pandas as pd
import pytest
import xarray
import zarr
from sources import (
    ITEM,
    contents,
    data_of,
    dataset_per_item,
    item_per_file,
    rows_per_file,
    three_splits,
    values,
    write_shard,
)

from tsclust_ooc import consolidate as steps
from tsclust_ooc import files
from tsclust_ooc import work as work_dir
from tsclust_ooc.dataset import open_dataset, verify
from tsclust_ooc.errors import BadInput, CannotWrite, TryAgain
from tsclust_ooc.plan import Options, make_plan
from tsclust_ooc.shards.parsers import Parsers
from tsclust_ooc.shards.survey import survey
from tsclust_ooc.source import RowReader
from tsclust_ooc.staging import Stage


class Killed(BaseException):
    """Stands for SIGKILL at one instruction: no handler in the package may catch it."""


@pytest.fixture(scope="module")
def parsers():
    with Parsers(2) as both:
        yield both


@pytest.fixture
def plan_of(parsers):
    def make(source: Path, codec: str = "", chunk_bytes: int = 4096):
        found = survey(source, parsers)
        return make_plan(found, Options(chunk_bytes, codec)), found.problems

    return make


@pytest.fixture
def write(parsers, tmp_path):
    def one(work, partition):
        with Stage(tmp_path, "never", on_network=False) as stage:
            return steps.write_partition(work, RowReader(work.plan, parsers, stage), partition)

    return one


@pytest.fixture
def publish(plan_of, write):
    """A dataset by init, every pending partition, finalize."""

    def make(source: Path, final: Path, *, replace: bool = False, order=list, **options):
        work = steps.init(final, *plan_of(source, **options))
        for partition in order(work_dir.pending(work)):
            assert write(work, partition).bad == ()
        steps.finalize(work, replace_existing=replace)
        return final

    return make


def work_folders(final: Path) -> list[Path]:
    return sorted(final.parent.glob(f".{final.name}.*"))


def test_plain_tools_open_a_dataset(tmp_path, publish):
    wrote = three_splits(tmp_path / "source")
    final = publish(tmp_path / "source", tmp_path / "ds")
    store = final / "data.zarr"
    for split, samples in wrote.items():
        assert np.array_equal(zarr.open_group(store, mode="r")[f"{split}/embeddings"][:], samples)
        lazy = dask.array.from_zarr(str(store), component=f"{split}/embeddings")
        assert np.array_equal(lazy.compute(scheduler="synchronous"), samples)
        opened = xarray.open_zarr(store, group=split)
        assert opened["embeddings"].dims == ("sample", "variable", "feature")
        assert np.array_equal(opened["embeddings"].values, samples)
    index = pd.read_parquet(final / "index")
    assert list(index.columns) == ["split", "row", "shard", "shard_row", "sample_id"]
    train = index[index.split == "train"].sort_values("row")
    assert list(train.shard) == [f"train/{i}.h5" for i in range(50)]
    assert list(train.sample_id) == [str(i) for i in range(50)]
    assert json.loads((final / "rejected.json").read_text())["rejected"] == []


def test_the_arrays_have_the_chunks_names_and_fill_value_that_were_promised(tmp_path, publish):
    three_splits(tmp_path / "source")
    final = publish(tmp_path / "source", tmp_path / "ds")
    array = zarr.open_array(final / "data.zarr" / "train" / "embeddings", mode="r")
    assert (array.chunks, array.dtype) == ((21, *ITEM), np.dtype("<f4"))
    assert array.metadata.dimension_names == ("sample", "variable", "feature")
    assert np.isnan(array.fill_value)
    chunk = final / "data.zarr/train/embeddings/c/0/0/0"
    stacked = np.stack([h5py.File(tmp_path / f"source/train/{i}.h5")["embeddings"][()] for i in range(21)])
    assert chunk.read_bytes() == stacked.tobytes()


@pytest.mark.parametrize("codec", ["zstd", "blosc-lz4"])
def test_a_codec_changes_the_files_and_not_the_values(tmp_path, publish, codec):
    wrote = three_splits(tmp_path / "source")
    final = publish(tmp_path / "source", tmp_path / "ds", codec=codec)
    assert np.array_equal(zarr.open_group(final / "data.zarr", mode="r")["train/embeddings"][:], wrote["train"])
    assert (final / "data.zarr/train/embeddings/c/0/0/0").stat().st_size != 21 * 192
    assert verify(open_dataset(final)) == []


@pytest.mark.parametrize("builder", [rows_per_file, item_per_file])
@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8"])
def test_any_source_becomes_the_array_that_was_written(tmp_path, publish, builder, dtype):
    wrote = builder(tmp_path / "source", dtype=dtype)
    final = publish(tmp_path / "source", tmp_path / "ds")
    array = zarr.open_array(final / "data.zarr/all/embeddings", mode="r")
    assert array.dtype == np.dtype(dtype).newbyteorder("<")
    assert np.array_equal(array[:], wrote)


def test_datasets_as_samples_keep_their_names_in_the_index(tmp_path, publish):
    wrote = dataset_per_item(tmp_path / "source", {"1.h5": ["s|1", "s|10"], "2.h5": ["g/b", "g/c"]})
    final = publish(tmp_path / "source", tmp_path / "ds")
    assert np.array_equal(zarr.open_array(final / "data.zarr/all/embeddings", mode="r")[:], wrote)
    assert list(pd.read_parquet(final / "index").sample_id) == ["s|1", "s|10", "g/b", "g/c"]


def test_an_empty_split_is_an_empty_array(tmp_path, publish):
    wrote = rows_per_file(tmp_path / "source" / "train")
    write_shard(tmp_path / "source" / "test" / "0.h5", np.zeros((0, 16), "f4"), "features")
    group = zarr.open_group(publish(tmp_path / "source", tmp_path / "ds") / "data.zarr", mode="r")
    assert group["test/embeddings"].shape == (0, 16)
    assert np.array_equal(group["train/embeddings"][:], wrote)


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_chunks_of_zeros_and_of_nan_are_files_like_all_others(tmp_path, publish, value):
    for i in range(50):
        write_shard(tmp_path / "source" / f"{i}.h5", np.full(ITEM, value, "f4"))
    final = publish(tmp_path / "source", tmp_path / "ds")
    chunks = sorted((final / "data.zarr/all/embeddings/c").glob("*/0/0"))
    assert len(chunks) == 3
    for chunk, n in zip(chunks, (21, 21, 8), strict=True):
        assert chunk.read_bytes()[: n * 192] == np.full((n, *ITEM), value, "<f4").tobytes()


def test_the_bytes_do_not_depend_on_order_workers_or_who_wrote_which(tmp_path, publish):
    source = tmp_path / "source"
    three_splits(source, (150, 30, 60))
    first = data_of(publish(source, tmp_path / "a"))
    assert sum("/c/" in name for name in first) == 8 + 2 + 3
    for seed in range(3):
        shuffled = publish(source, tmp_path / f"b{seed}", order=lambda p, s=seed: random.Random(s).sample(p, len(p)))
        assert data_of(shuffled) == first


def test_threads_write_the_same_bytes(tmp_path, plan_of, parsers, publish):
    source = tmp_path / "source"
    three_splits(source, (150, 30, 60))
    wanted = data_of(publish(source, tmp_path / "a"))
    for n in (2, 4):
        work = steps.init(tmp_path / f"t{n}", *plan_of(source))
        with Stage(tmp_path, "never", on_network=False) as stage, ThreadPoolExecutor(n) as pool:
            write = partial(steps.write_partition, work, RowReader(work.plan, parsers, stage))
            assert steps.run(work, write, pool.map) == []
        steps.finalize(work, replace_existing=False)
        assert data_of(tmp_path / f"t{n}") == wanted


def test_each_step_may_run_in_a_process_of_its_own(tmp_path, plan_of, write, publish):
    three_splits(tmp_path / "source")
    wanted = data_of(publish(tmp_path / "source", tmp_path / "a"))
    final = tmp_path / "ds"
    n = len(steps.init(final, *plan_of(tmp_path / "source")).plan.partitions)
    for i in random.Random(1).sample(range(n), n):
        work = work_dir.open_work(final)
        write(work, work.plan.partitions[i])
    steps.finalize(work_dir.open_work(final), replace_existing=False)
    assert data_of(final) == wanted
    assert work_folders(final) == []


def test_without_init_there_is_no_work_to_open(tmp_path):
    with pytest.raises(BadInput, match="--init"):
        work_dir.open_work(tmp_path / "ds")


def test_every_step_may_run_twice(tmp_path, plan_of, write, publish):
    three_splits(tmp_path / "source")
    wanted = data_of(publish(tmp_path / "source", tmp_path / "a"))
    final = tmp_path / "ds"
    work = steps.init(final, *plan_of(tmp_path / "source"))
    before = contents(work.root)
    again = steps.init(final, *plan_of(tmp_path / "source"))
    assert again.plan.shards == work.plan.shards
    assert contents(work.root) == before
    for partition in work.plan.partitions:
        write(work, partition)
        done = contents(work.root)
        write(again, partition)
        assert contents(work.root) == done
    steps.init(final, *plan_of(tmp_path / "source"))
    manifest = steps.finalize(work, replace_existing=False)
    assert steps.finalize(work, replace_existing=False) == manifest
    assert data_of(final) == wanted
    with pytest.raises(work_dir.Superseded):
        write(work, work.plan.partitions[0])


def test_an_init_that_comes_late_takes_nothing_away(tmp_path, plan_of, write):
    """Two processes init at once; the slower one goes on where the faster has begun to write."""
    three_splits(tmp_path / "source")
    work = steps.init(tmp_path / "ds", *plan_of(tmp_path / "source"))
    write(work, work.plan.partitions[0])
    written = contents(work.dataset)
    (work.root / "plan.json").unlink()  # as the slower one saw it
    steps.init(tmp_path / "ds", *plan_of(tmp_path / "source"))
    assert contents(work.dataset) == written
    assert work.plan.partitions[0] not in work_dir.pending(work)


def test_finalize_names_the_partitions_that_are_missing_and_publishes_nothing(tmp_path, plan_of, write):
    three_splits(tmp_path / "source", (150, 30, 60))
    work = steps.init(tmp_path / "ds", *plan_of(tmp_path / "source"))
    for partition in work.plan.partitions:
        if partition.index not in (1, 4):
            write(work, partition)
    with pytest.raises(TryAgain, match=r"2 partitions of 7 not written yet: 1, 4\. Run those"):
        steps.finalize(work, replace_existing=False)
    assert not (tmp_path / "ds").exists()
    for index in (1, 4):
        write(work, work.plan.partitions[index])
    steps.finalize(work, replace_existing=False)
    assert verify(open_dataset(tmp_path / "ds")) == []


def test_resuming_does_only_what_is_missing(tmp_path, plan_of, write):
    three_splits(tmp_path / "source", (150, 30, 60))
    work = steps.init(tmp_path / "ds", *plan_of(tmp_path / "source"))
    for partition in work.plan.partitions[:3]:
        write(work, partition)
    stamps = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in work.dataset.rglob("*") if p.is_file()}
    resumed = steps.init(tmp_path / "ds", *plan_of(tmp_path / "source"))
    assert [p.index for p in work_dir.pending(resumed)] == [3, 4, 5, 6]
    for partition in work_dir.pending(resumed):
        write(resumed, partition)
    assert {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in stamps} == stamps


@pytest.mark.parametrize("harm", ["missing", "short", "no-receipt", "garbled-receipt"])
def test_a_partition_counts_only_with_its_receipt_and_all_its_files(tmp_path, plan_of, write, harm):
    item_per_file(tmp_path / "source", 100)
    work = steps.init(tmp_path / "ds", *plan_of(tmp_path / "source"))
    for partition in work.plan.partitions:
        write(work, partition)
    chunk = work.dataset / "data.zarr/all/embeddings/c/2/0/0"
    if harm == "missing":
        chunk.unlink()
    elif harm == "short":
        os.truncate(chunk, 100)
    elif harm == "no-receipt":
        work.receipt(1).unlink()
    else:
        work.receipt(1).write_text("{")
    assert [p.index for p in work_dir.pending(work)] == [1]


def test_what_killed_writers_left_is_not_published(tmp_path, plan_of, write):
    item_per_file(tmp_path / "source", 30)
    work = steps.init(tmp_path / "ds", *plan_of(tmp_path / "source"))
    for partition in work.plan.partitions:
        write(work, partition)
    for name in ("data.zarr/all/embeddings/c/0/0/.0.abc.partial", "data.zarr/all/embeddings/c/77", "index/old.parquet"):
        (work.dataset / name).write_bytes(b"left")
    steps.finalize(work, replace_existing=False)
    assert verify(open_dataset(tmp_path / "ds")) == []


def test_two_plans_never_share_a_directory(tmp_path, plan_of):
    item_per_file(tmp_path / "source", 30)
    plans = [plan_of(tmp_path / "source"), plan_of(tmp_path / "source", codec="zstd")]
    os.utime(tmp_path / "source" / "3.h5", ns=(1, 1))
    plans.append(plan_of(tmp_path / "source"))
    roots = {steps.init(tmp_path / "ds", *plan).root for plan in plans}
    assert len(roots) == 3
    with pytest.raises(BadInput, match="3 initialized consolidations found"):
        work_dir.open_work(tmp_path / "ds")


def test_the_work_of_a_dataset_with_a_longer_name_is_left_alone(tmp_path, plan_of, publish):
    item_per_file(tmp_path / "source", 30)
    other = steps.init(tmp_path / "ett.v2", *plan_of(tmp_path / "source", codec="zstd"))
    publish(tmp_path / "source", tmp_path / "ett")
    assert (other.root / "plan.json").exists()


def inodes(dataset: Path) -> dict[str, int]:
    return {str(p.relative_to(dataset)): p.stat().st_ino for p in dataset.rglob("*") if "/c/" in str(p) and p.is_file()}


def test_good_partitions_are_adopted_by_links_when_a_shard_was_mended(tmp_path, plan_of, write):
    source = tmp_path / "source"
    samples = item_per_file(source, 200)
    work = steps.init(tmp_path / "ds", *plan_of(source))
    for partition in work.plan.partitions:
        write(work, partition)
    before = inodes(work.dataset)
    write_shard(source / "100.h5", samples[0])
    os.utime(source / "100.h5", ns=(5, 5))
    mended = steps.init(tmp_path / "ds", *plan_of(source))
    assert mended.root != work.root
    assert [(p.start, p.stop) for p in work_dir.pending(mended)] == [(84, 126)]
    after = inodes(mended.dataset)
    assert after == {name: inode for name, inode in before.items() if name.split("/")[-3] not in "45"}
    for partition in work_dir.pending(mended):
        write(mended, partition)
    steps.finalize(mended, replace_existing=False)
    stored = zarr.open_array(tmp_path / "ds/data.zarr/all/embeddings", mode="r")[:]
    samples[100] = samples[0]
    assert np.array_equal(stored, samples)
    assert verify(open_dataset(tmp_path / "ds")) == []
    assert work_folders(tmp_path / "ds") == []


def test_where_links_are_not_possible_partitions_are_written_again(tmp_path, plan_of, write, monkeypatch):
    source = tmp_path / "source"
    item_per_file(source, 100)
    work = steps.init(tmp_path / "ds", *plan_of(source))
    write(work, work.plan.partitions[0])
    os.utime(source / "99.h5", ns=(5, 5))

    def refuse(*args, **kwargs):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    other = steps.init(tmp_path / "ds", *plan_of(source))
    assert len(work_dir.pending(other)) == len(other.plan.partitions)


def test_the_work_knows_the_bad_shards_of_the_latest_survey(tmp_path, plan_of, write):
    """The plan is that of the good shards: a shard that is bad in addition does not change it."""
    source = tmp_path / "source"
    item_per_file(source, 30)
    (source / "90.h5").write_bytes(b"")
    steps.init(tmp_path / "ds", *plan_of(source))
    (source / "90.h5").unlink()
    (source / "91.h5").write_bytes(b"text, not HDF5")
    work = steps.init(tmp_path / "ds", *plan_of(source))
    for partition in work_dir.pending(work):
        write(work, partition)
    manifest = steps.finalize(work, replace_existing=False)
    rejected = json.loads((tmp_path / "ds/rejected.json").read_text())["rejected"]
    assert [(r["path"], r["code"]) for r in rejected] == [("91.h5", "not-hdf5")]
    assert manifest.n_rejected == 1


def test_bad_data_give_no_receipt_and_are_remembered_until_the_file_changes(tmp_path, plan_of, write):
    source = tmp_path / "source"
    item_per_file(source, 60, chunks=ITEM, fletcher32=True)
    spoil(source / "50.h5")
    work = steps.init(tmp_path / "ds", *plan_of(source))
    bad = [b for p in work.plan.partitions for b in write(work, p).bad]
    assert [(b.problem.path, b.problem.code) for b in bad] == [("50.h5", "checksum")]
    assert [p.index for p in work_dir.pending(work)] == [1]
    known = work_dir.known_bad(tmp_path / "ds")
    stamp = (source / "50.h5").stat()
    assert known("50.h5", stamp.st_size, stamp.st_mtime_ns).code == "checksum"
    assert known("50.h5", stamp.st_size, stamp.st_mtime_ns + 1) is None
    assert known("49.h5", stamp.st_size, stamp.st_mtime_ns) is None


def spoil(path: Path) -> None:
    """Flip a bit of the data of a shard with checksums."""
    with h5py.File(path) as file:
        at = file["embeddings"].id.get_chunk_info(0).byte_offset
    data = bytearray(path.read_bytes())
    data[at + 5] ^= 1
    path.write_bytes(data)


def test_what_the_next_run_may_not_meet_is_not_remembered(tmp_path, plan_of, write):
    source = tmp_path / "source"
    item_per_file(source, 30)
    work = steps.init(tmp_path / "ds", *plan_of(source))
    os.utime(source / "3.h5", ns=(1, 1))
    (bad,) = write(work, work.plan.partitions[0]).bad
    assert bad.problem.code == "unstable"
    assert not list((work.root / "problems").iterdir())


def test_a_directory_that_is_there_is_replaced_only_when_asked(tmp_path, publish):
    item_per_file(tmp_path / "one", 30)
    item_per_file(tmp_path / "two", 30, seed=9)
    publish(tmp_path / "one", tmp_path / "ds")
    before = contents(tmp_path / "ds")
    with pytest.raises(CannotWrite, match="--overwrite"):
        publish(tmp_path / "two", tmp_path / "ds")
    assert contents(tmp_path / "ds") == before
    publish(tmp_path / "two", tmp_path / "ds", replace=True)
    stored = zarr.open_array(tmp_path / "ds/data.zarr/all/embeddings", mode="r")[:]
    assert np.array_equal(stored, values(30, seed=9))
    assert work_folders(tmp_path / "ds") == []


@contextmanager
def killed(monkeypatch, owner, name, *, after: bool):
    """The process dies before or after its first call of `owner.name`."""
    real = getattr(owner, name)

    def dying(*args, **kwargs):
        if after:
            real(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(Killed):
            yield


@pytest.mark.parametrize("same_inputs", [True, False])
@pytest.mark.parametrize("after", [True, False])
def test_a_crash_at_the_exchange_never_mixes_the_old_dataset_with_the_new(
    tmp_path, publish, plan_of, monkeypatch, same_inputs, after
):
    source, final = tmp_path / "source", tmp_path / "ds"
    wrote = item_per_file(source, 50)
    publish(source, final)
    damaged = final / "data.zarr/all/embeddings/c/0/0/0"
    damaged.write_bytes(bytes(damaged.stat().st_size))  # the reason to make it anew: same names, same sizes
    if not same_inputs:
        wrote = item_per_file(source, 50, seed=5)
    with killed(monkeypatch, files, "exchange", after=after):
        publish(source, final, replace=True)
    publish(source, final, replace=True)
    assert np.array_equal(zarr.open_array(final / "data.zarr/all/embeddings", mode="r")[:], wrote)
    assert verify(open_dataset(final)) == []
    assert work_folders(final) == []


def test_a_crash_after_the_rename_is_finished_by_the_same_steps(tmp_path, publish, monkeypatch):
    source, final = tmp_path / "source", tmp_path / "ds"
    item_per_file(source, 50)
    with killed(monkeypatch, steps, "sweep", after=False):
        publish(source, final)
    assert work_folders(final) != []
    work = work_dir.open_work(final)
    steps.finalize(work, replace_existing=False)
    assert work_folders(final) == []
    assert verify(open_dataset(final)) == []


def test_work_that_was_taken_away_is_superseded(tmp_path, plan_of, write):
    item_per_file(tmp_path / "source", 50)
    work = steps.init(tmp_path / "ds", *plan_of(tmp_path / "source"))
    steps.sweep(tmp_path / "ds")
    with pytest.raises(work_dir.Superseded):
        write(work, work.plan.partitions[0])
    assert not work.root.exists()
    with pytest.raises(TryAgain, match="Run the same command again"):
        steps.finalize(work, replace_existing=False)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path, plan_of, monkeypatch):
    item_per_file(tmp_path / "source", 50)
    monkeypatch.setattr(files, "free_bytes", lambda path: 9000)
    with pytest.raises(CannotWrite, match=r"needs 12\.3 kB; .* has 9\.00 kB free"):
        steps.init(tmp_path / "ds", *plan_of(tmp_path / "source"))
    assert not work_folders(tmp_path / "ds")


def test_names_that_are_not_utf8_are_in_the_index_as_base64(tmp_path, publish):
    item_per_file(tmp_path / "source", 2)
    os.rename(tmp_path / "source/1.h5", os.fsencode(tmp_path) + b"/source/1\xff.h5")
    final = publish(tmp_path / "source", tmp_path / "ds")
    assert list(pd.read_parquet(final / "index").shard) == ["0.h5", "base64:Mf8uaDU="]
