"""--append: new shards after committed rows, which keep their numbers and their bytes and are never read again."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr
from listeners import Heard
from sources import OPTIONS, contents, data_of, shared_parsers, values, write_shard
from test_concurrency import places, races

from tsclust_ooc import appending, files, records, tasks
from tsclust_ooc import consolidate as steps
from tsclust_ooc import dataset as dataset_module
from tsclust_ooc import work as work_dir
from tsclust_ooc.cli import main
from tsclust_ooc.dataset import MANIFEST_VERSION, Manifest, open_dataset, read_manifest, read_rejected, verify
from tsclust_ooc.errors import BadInput, TryAgain, UsageError
from tsclust_ooc.pipeline import arrays, consolidating
from tsclust_ooc.pipeline.consolidating import BadShards, consolidate
from tsclust_ooc.pipeline.progressing import status
from tsclust_ooc.shards.listing import Listing
from tsclust_ooc.shards.schema import Problem
from tsclust_ooc.staging import Staging

APPEND = replace(OPTIONS, append=True)
SKIP = replace(APPEND, on_bad="skip")


class Killed(BaseException):
    """Stands for SIGKILL at one instruction: no handler in the package may catch it."""


@pytest.fixture(scope="module", autouse=True)
def parsers():
    with shared_parsers(consolidating, arrays):
        yield


@pytest.fixture(autouse=True)
def own_scratch(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path_factory.mktemp("scratch")))
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)


SAMPLES = {"train": values(120, seed=1), "val": values(30, seed=2), "test": values(40, seed=3)}


def put(source: Path, split: str, numbers) -> None:
    """The shards of a split with these numbers, one sample each."""
    for i in numbers:
        write_shard(source / split / f"{i}.h5", SAMPLES[split][i])


@pytest.fixture
def source(tmp_path) -> Path:
    """Shards 0 to 49 of train and 0 to 4 of val: 50 rows are three chunks of 21, val is smaller than one."""
    put(tmp_path / "source", "train", range(50))
    put(tmp_path / "source", "val", range(5))
    return tmp_path / "source"


@pytest.fixture
def dataset(tmp_path, source) -> Path:
    consolidate(source, tmp_path / "ds", OPTIONS)
    return tmp_path / "ds"


def stored(dataset: Path, split: str) -> np.ndarray:
    return zarr.open_array(dataset / f"data.zarr/{split}/embeddings", mode="r")[:]


def check_against_shards(dataset: Path, source: Path) -> None:
    """Every row is what h5py reads in the shard that the index names, and nothing is damaged."""
    opened = open_dataset(dataset)
    assert verify(opened) == []
    for split in opened:
        index = opened[split].index().to_pydict()
        assert index["row"] == list(range(opened[split].n_samples))
        for row, shard in enumerate(index["shard"]):
            with h5py.File(source / shard) as file:
                np.testing.assert_array_equal(stored(dataset, split)[row], file["embeddings"][()])


def beside(final: Path) -> set[str]:
    return {p.name for p in final.parent.iterdir() if p.name.startswith(f".{final.name}.")}


STEPS = (
    {"train": range(50), "val": range(5)},
    {"train": range(50, 51), "val": range(5, 30)},
    {"train": range(51, 90)},
    {"train": range(90, 120), "test": range(40)},
)


@pytest.mark.parametrize(
    "options",
    [{}, {"compress": "zstd", "stride": 3}, {"sharding": "16384"}, {"compress": "blosc-lz4", "sharding": "8192"}],
    ids=str,
)
def test_appends_in_steps_give_the_dataset_of_one_consolidation(tmp_path, options):
    """In the second step val outgrows the size of its only chunk; in the last one a split is new."""
    source, final = tmp_path / "source", tmp_path / "ds"
    for new in STEPS:
        for split, numbers in new.items():
            put(source, split, numbers)
        done = consolidate(source, final, replace(APPEND, **options))
        assert not done.reused
    whole = consolidate(source, tmp_path / "whole", replace(OPTIONS, **options))
    assert done.digest == whole.digest
    assert (done.n_samples, done.n_shards) == (whole.n_samples, whole.n_shards)
    assert data_of(final) == data_of(tmp_path / "whole")
    check_against_shards(final, source)
    assert beside(final) == set()
    assert consolidate(source, final, replace(OPTIONS, **options)).reused


def test_new_shards_come_after_the_committed_ones_wherever_they_sort(tmp_path, source):
    put(tmp_path / "late", "train", range(10, 50))
    final = tmp_path / "ds"
    shutil.move(source / "train", tmp_path / "aside")
    shutil.move(tmp_path / "late/train", source / "train")
    consolidate(source, final, OPTIONS)
    put(source, "train", range(10))
    done = consolidate(source, final, APPEND)
    assert (done.n_appended, done.n_appended_shards) == (10, 10)
    assert np.array_equal(stored(final, "train"), SAMPLES["train"][[*range(10, 50), *range(10)]])
    check_against_shards(final, source)


def test_only_what_is_new_is_written(dataset, source):
    def inodes():
        return {name: (dataset / name).stat().st_ino for name in contents(dataset) if "/c/" in name}

    before = inodes()
    put(source, "train", range(50, 70))
    consolidate(source, dataset, APPEND)
    after = inodes()
    chunk = "data.zarr/train/embeddings/c/{}/0/0".format
    # Rows 0 to 41 are a whole partition; the partition of row 49 is written anew.
    assert {name for name in after if after[name] == before.get(name)} == {
        chunk(0), chunk(1), "data.zarr/val/embeddings/c/0/0/0",
    }  # fmt: skip


def test_committed_rows_come_from_the_dataset_though_their_shards_are_gone(dataset, source):
    shutil.rmtree(source / "train")
    put(source, "train", range(50, 60))
    heard = Heard()
    done = consolidate(source, dataset, APPEND, heard)
    assert np.array_equal(stored(dataset, "train"), SAMPLES["train"][:60])
    assert (done.n_appended, done.n_vanished, done.n_changed) == (10, 50, 0)
    told = "50 committed shards not there any more: train/0.h5, train/1.h5, train/2.h5, train/3.h5, train/4.h5, ..."
    assert any(message.startswith(told) for message in heard.messages)
    assert verify(open_dataset(dataset)) == []


def test_nothing_new_is_said_and_nothing_is_written(dataset, source, capsys):
    before = {name: (dataset / name).stat() for name in contents(dataset)}
    done = consolidate(source, dataset, APPEND)
    assert (done.reused, done.n_appended, done.n_samples) == (True, 0, 55)
    assert main(["consolidate", str(source), str(dataset), "--append"]) == 0
    assert "Nothing to append." in capsys.readouterr().out
    after = {name: (dataset / name).stat() for name in contents(dataset)}
    assert {n: (s.st_ino, s.st_mtime_ns) for n, s in after.items()} == {
        n: (s.st_ino, s.st_mtime_ns) for n, s in before.items()
    }


def test_without_a_dataset_it_is_an_ordinary_consolidation(tmp_path, source):
    heard = Heard()
    done = consolidate(source, tmp_path / "ds", APPEND, heard)
    assert done.digest == consolidate(source, tmp_path / "whole", OPTIONS).digest
    assert heard.messages[0] == f"there is no {tmp_path / 'ds'} yet to append to: consolidating all of {source}"


def test_the_command_says_what_it_appended(dataset, source, capsys):
    put(source, "train", range(50, 60))
    words = ["consolidate", str(source), str(dataset), "--append", "--workers", "2"]
    assert main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith(f"would append 10 samples of 10 shards to {dataset}\n")
    assert main(words) == 0
    told = f"appended 10 samples of 10 shards to {dataset}   (now 65 samples (3, 16) float32 · 4 chunks"
    assert capsys.readouterr().out.startswith(told)
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {name: told[name] for name in ("n_appended", "n_changed", "n_vanished", "n_retries", "reused")} == {
        "n_appended": 0, "n_changed": 0, "n_vanished": 0, "n_retries": 0, "reused": True,
    }  # fmt: skip
    assert main([*words, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_partitions"] == 0


# ---- shards that are not as they were


def spoil_committed(source: Path) -> None:
    """Committed shards with another stamp, of which one is not even HDF5 any more."""
    (source / "train/3.h5").write_bytes(b"no HDF5")
    os.utime(source / "val/2.h5", ns=(10**18, 10**18))


def test_changed_committed_shards_fail_by_default_and_nothing_is_published(dataset, source):
    before = contents(dataset)
    spoil_committed(source)
    put(source, "train", range(50, 60))
    with pytest.raises(BadShards, match=r"2 committed shards of .* changed") as caught:
        consolidate(source, dataset, APPEND)
    assert [(p.path, p.code) for p in caught.value.problems] == [("train/3.h5", "changed"), ("val/2.h5", "changed")]
    assert "now 7 bytes of" in caught.value.problems[0].detail
    assert contents(dataset) == before


def test_changed_committed_shards_are_skipped_with_their_rows_kept(dataset, source):
    spoil_committed(source)
    put(source, "train", range(50, 60))
    heard = Heard()
    done = consolidate(source, dataset, SKIP, heard)
    assert (done.n_appended, done.n_changed, done.n_rejected) == (10, 2, 0)
    assert np.array_equal(stored(dataset, "train"), SAMPLES["train"][:60])
    assert any("train/3.h5   changed   committed with" in message for message in heard.messages)
    assert read_rejected(dataset) == ()
    again = consolidate(source, dataset, SKIP)
    assert (again.reused, again.n_changed) == (True, 2)


def test_shards_in_a_folder_that_cannot_be_read_have_not_vanished(dataset):
    known = appending.standing(dataset)
    refused = Problem("train", "unreadable", "Input/output error")
    found = appending.compare(known.shards, Listing("/s", [], [refused], folders=("/s",)))
    assert {path.split("/")[0] for path in found.vanished} == {"val"}
    assert found.new.problems == [refused]


def test_a_new_bad_shard_fails_or_is_left_out_and_one_left_out_before_is_no_news(dataset, source):
    put(source, "train", range(50, 55))
    (source / "train/1000.h5").write_bytes(b"no HDF5")
    with pytest.raises(BadShards, match=r"1 bad shard in"):
        consolidate(source, dataset, APPEND)
    assert consolidate(source, dataset, SKIP).n_appended == 5
    assert [p.path for p in read_rejected(dataset)] == ["train/1000.h5"]
    put(source, "train", range(55, 60))
    assert consolidate(source, dataset, APPEND).n_appended == 5
    assert [p.path for p in read_rejected(dataset)] == ["train/1000.h5"]
    (source / "train/1000.h5").unlink()
    put(source, "train", range(60, 61))
    consolidate(source, dataset, APPEND)
    assert [p.path for p in read_rejected(dataset)] == ["train/1000.h5"]
    write_shard(source / "train/1000.h5", SAMPLES["train"][99])
    assert consolidate(source, dataset, APPEND).n_appended == 1
    assert read_rejected(dataset) == ()
    assert np.array_equal(stored(dataset, "train"), SAMPLES["train"][[*range(61), 99]])


def test_nothing_but_a_new_bad_shard_is_told_and_changes_nothing(dataset, source):
    before = contents(dataset)
    (source / "train/1000.h5").write_bytes(b"no HDF5")
    with pytest.raises(BadShards, match=r"1000\.h5"):
        consolidate(source, dataset, APPEND)
    heard = Heard()
    assert consolidate(source, dataset, SKIP, heard).reused
    assert any("train/1000.h5   not-hdf5" in message for message in heard.messages)
    assert contents(dataset) == before


def test_shards_that_only_a_read_finds_bad_are_left_out(dataset, source):
    put(source, "train", range(50, 53))
    write_shard(source / "train/51.h5", SAMPLES["train"][51], chunks=(3, 16), fletcher32=True)
    with h5py.File(source / "train/51.h5") as file:
        at = file["embeddings"].id.get_chunk_info(0).byte_offset
    data = bytearray((source / "train/51.h5").read_bytes())
    data[at] ^= 1
    (source / "train/51.h5").write_bytes(data)
    with pytest.raises(BadShards, match="checksum"):
        consolidate(source, dataset, APPEND)
    done = consolidate(source, dataset, SKIP)
    assert (done.n_appended, done.n_rejected) == (2, 1)
    assert np.array_equal(stored(dataset, "train"), SAMPLES["train"][[*range(51), 52]])


def test_shards_of_another_shape_are_bad_however_many(dataset, source):
    for i in range(200, 240):
        write_shard(source / "train" / f"{i}.h5", np.zeros((5, 16), "f4"))
    put(source, "train", range(50, 52))
    with pytest.raises(BadShards, match="40 bad shards") as caught:
        consolidate(source, dataset, APPEND)
    assert {p.code for p in caught.value.problems} == {"dim"}
    assert consolidate(source, dataset, SKIP).n_appended == 2


# ---- where from, and with what


def test_a_folder_below_the_source_adds_its_shards_and_says_nothing_of_others(dataset, source):
    put(source, "train", range(50, 60))
    put(source, "val", range(5, 8))
    (source / "val/0.h5").unlink()
    (source / "train/7.h5").unlink()
    done = consolidate(source / "train", dataset, APPEND)
    assert (done.n_appended, done.n_vanished, done.splits) == (10, 1, {"train": 60, "val": 5})
    assert open_dataset(dataset).manifest.source == str(source)


def test_the_source_under_another_name_is_the_source(tmp_path, dataset, source):
    (tmp_path / "link").symlink_to(source)
    put(source, "train", range(50, 52))
    assert consolidate(tmp_path / "link", dataset, APPEND).n_appended == 2
    assert consolidate(tmp_path / "link/train", dataset, APPEND).reused
    check_against_shards(dataset, source)


def test_another_source_is_refused_with_both_named(tmp_path, dataset, source):
    put(tmp_path / "other", "train", range(3))
    with pytest.raises(UsageError, match=rf"made from {source}, and {tmp_path / 'other'} is not"):
        consolidate(tmp_path / "other", dataset, APPEND)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_bytes": "8192"}, r"--chunk-bytes 8192: .* was made with 4096"),
        ({"compress": "zstd"}, r"--compress zstd: .* was made with no codec"),
        ({"stride": 2}, r"--stride 2: .* was made with 1"),
        ({"sharding": "16384"}, r"--sharding 16384: .* was made with none"),
        ({"key": "other"}, r"--key other: .* was made with embeddings"),
        ({"layout": "rows-per-file"}, r"--layout rows-per-file: .* was made with item-per-file"),
        ({"split_pattern": "(?P<split>[a-z])"}, r"committed to split train; with --split-pattern"),
    ],
)
def test_options_that_contradict_the_dataset_are_refused(dataset, source, options, message):
    with pytest.raises(UsageError, match=message):
        consolidate(source, dataset, replace(APPEND, **options))


def test_options_that_are_not_given_are_those_of_the_dataset(tmp_path, source):
    final = tmp_path / "ds"
    consolidate(source, final, replace(OPTIONS, compress="zstd", stride=2))
    put(source, "train", range(50, 60))
    consolidate(source, final, replace(APPEND, chunk_bytes=None))
    options = open_dataset(final).manifest.options
    assert (options.codec, options.stride, options.chunk_bytes) == ("zstd", 2, 4096)
    assert np.array_equal(stored(final, "train"), SAMPLES["train"][:60:2])


def test_append_and_overwrite_are_not_given_together():
    with pytest.raises(UsageError, match="--append keeps"):
        replace(APPEND, overwrite=True)


def test_a_dataset_that_does_not_know_its_shards_is_refused(dataset, source):
    (dataset / "shards.parquet").unlink()
    body = json.loads((dataset / "manifest.json").read_text())
    del body["files"]["shards.parquet"]
    (dataset / "manifest.json").write_text(json.dumps(body))
    with pytest.raises(BadInput, match=r"has no shards\.parquet: it was made by an earlier version.*--overwrite"):
        consolidate(source, dataset, APPEND)


def test_the_stamps_of_shards_are_no_content(dataset, source, tmp_path):
    for path in source.rglob("*.h5"):
        os.utime(path, ns=(10**18, 10**18))
    consolidate(source, tmp_path / "later", OPTIONS)
    mine, other = (open_dataset(path).manifest for path in (dataset, tmp_path / "later"))
    assert mine.digest == other.digest
    assert mine.plan != other.plan
    assert mine.files["shards.parquet"] != other.files["shards.parquet"]


@pytest.mark.parametrize("name", ["data.zarr/train/embeddings/c/2/0/0", "index/train-00001.parquet", "shards.parquet"])
def test_damage_of_committed_rows_is_found_and_not_written_again_as_sound(dataset, source, name):
    data = bytearray((dataset / name).read_bytes())
    data[len(data) // 2] ^= 1
    (dataset / name).write_bytes(data)
    put(source, "train", range(50, 60))
    with pytest.raises(BadInput, match=rf"{Path(name).name} is damaged: .* wanted .*tsclust verify"):
        consolidate(source, dataset, APPEND)


# ---- steps, processes, filesystems


def test_an_append_in_steps_is_that_of_the_whole_command(tmp_path, dataset, source):
    shutil.copytree(dataset, tmp_path / "whole")
    put(source, "train", range(50, 120))
    whole = consolidate(source, tmp_path / "whole", APPEND)
    told = arrays.init(source, dataset, APPEND)
    assert (told.n_partitions, told.n_pending, told.array) == (4, 2, "1-2")
    found = status(dataset)
    assert (found.state, found.work[0].n_done) == ("in work", 2)
    assert found.work[0].note == "appends 70 samples to the 55 of the dataset that is there"
    shutil.rmtree(source / "val")
    assert arrays.write_partition(source, dataset, 0, APPEND).reused
    for number in (2, 1, 2):
        arrays.write_partition(source, dataset, number, APPEND)
    with pytest.raises(UsageError, match="initialized with"):
        arrays.write_partition(source, dataset, 1, replace(APPEND, stride=2))
    done = arrays.finalize(source, dataset, APPEND)
    assert (done.digest, done.n_appended) == (whole.digest, 70)
    assert arrays.write_partition(source, dataset, 1, APPEND).published
    assert arrays.finalize(source, dataset, APPEND).reused
    assert beside(dataset) == set()


def test_nothing_new_leaves_an_array_of_jobs_nothing_to_do(dataset, source):
    told = arrays.init(source, dataset, APPEND)
    assert (told.reused, told.n_partitions) == (True, 0)


def test_a_step_names_partitions_that_are_missing(dataset, source):
    put(source, "train", range(50, 120))
    arrays.init(source, dataset, APPEND)
    with pytest.raises(TryAgain, match=r"2 partitions of 4 not written yet: 1, 2\."):
        arrays.finalize(source, dataset, APPEND)
    assert open_dataset(dataset)["train"].n_samples == 50


def test_a_worker_process_appends_too(dataset, source, monkeypatch):
    """Its task holds no plan: the committed rows come from the work directory."""
    put(source, "train", range(50, 70))
    with consolidating.session(dataset, "consolidate", "consolidated", APPEND, Heard()) as held:
        job = consolidating.Consolidation(held, source, consolidating.Parsers(2))
        plan, problems, _ = job.look()
        work = steps.init(dataset, plan, problems)
        write = tasks.write_task(work, Staging("never", held.scratch))
        done = [write(partition) for partition in work_dir.pending(work)]
        assert [(one.partition.start, one.bad, one.n_retries) for one in done] == [(42, (), 0)]
        job.publish(work)
    tasks._close()
    check_against_shards(dataset, source)


def of_another(dataset: Path, source: Path) -> Path:
    """What another node, which is faster, will put at the name: with other new shards."""
    copy = dataset.parent / "copy"
    shutil.copytree(dataset, copy)
    put(source, "val", range(5, 8))
    consolidate(source / "val", copy, APPEND)
    return copy


def put_there(copy: Path, dataset: Path) -> Manifest:
    files.retire(dataset)
    files.publish_dir(copy, dataset)
    return read_manifest(dataset)


def test_a_dataset_that_was_replaced_meanwhile_is_not_touched_and_the_next_run_extends_it(dataset, source):
    put(source, "train", range(50, 120))
    arrays.init(source, dataset, APPEND)
    theirs = put_there(of_another(dataset, source), dataset)
    for number in (1, 2):
        arrays.write_partition(source, dataset, number, APPEND)
    with pytest.raises(TryAgain, match="was replaced while shards were being appended"):
        arrays.finalize(source, dataset, APPEND)
    assert read_manifest(dataset) == theirs
    done = consolidate(source, dataset, APPEND)
    assert (done.n_samples, done.splits) == (128, {"train": 120, "val": 8})
    check_against_shards(dataset, source)
    assert beside(dataset) == set()


def prepared(dataset: Path, source: Path) -> work_dir.Work:
    """An append whose partitions are all written."""
    put(source, "train", range(50, 70))
    told = arrays.init(source, dataset, APPEND)
    assert told.array == "1"
    arrays.write_partition(source, dataset, 1, APPEND)
    return work_dir.open_work(dataset)


def test_what_comes_out_of_the_exchange_and_is_not_the_base_goes_back(dataset, source, monkeypatch):
    work = prepared(dataset, source)
    copy = of_another(dataset, source)
    real, theirs = files.exchange, []

    def late(a, b):
        if not theirs:  # between the look and the exchange
            theirs.append(put_there(copy, dataset))
        return real(a, b)

    monkeypatch.setattr(files, "exchange", late)
    with pytest.raises(TryAgain, match="was replaced while"):
        steps.finalize(work, replace_existing=False)
    assert read_manifest(dataset) == theirs[0]
    assert verify(open_dataset(dataset)) == []


def test_a_kill_between_the_exchange_and_the_look_at_what_came_out_loses_nothing(dataset, source, monkeypatch):
    work = prepared(dataset, source)
    copy = of_another(dataset, source)
    real, theirs = files.exchange, []

    def late_and_last(a, b):
        theirs.append(put_there(copy, dataset))
        real(a, b)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(files, "exchange", late_and_last)
        with pytest.raises(Killed):
            steps.finalize(work, replace_existing=False)
    done = consolidate(source, dataset, APPEND)
    assert done.splits == {"train": 70, "val": 8}
    check_against_shards(dataset, source)
    assert theirs[0].digest != done.digest
    assert beside(dataset) == set()


def test_where_names_cannot_be_exchanged_two_renames_do_it_and_a_kill_between_them_loses_nothing(
    dataset, source, monkeypatch
):
    monkeypatch.setattr(files, "exchange", lambda a, b: False)
    shutil.rmtree(source / "train")  # what is committed must not be needed again
    work = prepared(dataset, source)
    real = files.publish_dir

    def killed_before_the_second(old, new, **options):
        if new == dataset:
            raise Killed
        real(old, new, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files, "publish_dir", killed_before_the_second)
        patch.setattr(appending, "_is_ours", lambda path, plan: False)  # the dead put nothing back
        with pytest.raises(Killed):
            steps.finalize(work, replace_existing=False)
    assert not dataset.exists()
    done = consolidate(source, dataset, APPEND)
    assert (done.n_samples, done.n_appended) == (75, 20)
    assert np.array_equal(stored(dataset, "train"), SAMPLES["train"][:70])
    assert beside(dataset) == set()


def test_where_links_are_refused_files_are_copied(tmp_path, dataset, source, monkeypatch):
    put(source, "train", range(50, 70))
    whole = consolidate(source, tmp_path / "whole", OPTIONS)

    def refuse(*args, **kwargs):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert consolidate(source, dataset, APPEND).digest == whole.digest
    assert verify(open_dataset(dataset)) == []


def test_a_reader_that_opens_a_dataset_while_it_is_replaced_gets_the_new_one(dataset, source, monkeypatch):
    """The manifest of the old one, then the files of the new one: val has a chunk of another size there."""
    put(source, "val", range(5, 8))
    shutil.copytree(dataset, dataset.parent / "longer")
    consolidate(source, dataset.parent / "longer", APPEND)
    real = dataset_module.check_sizes

    def late(opened):
        if (dataset.parent / "longer").exists():
            put_there(dataset.parent / "longer", dataset)
        return real(opened)

    monkeypatch.setattr(dataset_module, "check_sizes", late)
    assert open_dataset(dataset)["val"].n_samples == 8


def test_work_on_an_older_base_serves_the_next_append(dataset, source):
    """A kill, then more shards: what is written already of the same rows is kept."""
    put(source, "train", range(50, 110))
    arrays.init(source, dataset, APPEND)
    for number in (1, 2):
        arrays.write_partition(source, dataset, number, APPEND)
    put(source, "train", range(110, 120))
    told = arrays.init(source, dataset, APPEND)
    assert (told.n_partitions, told.n_pending, told.array) == (4, 1, "2")


def test_two_appends_at_once_make_one_dataset_and_never_a_mixture(tmp_path, dataset, source):
    made = places(tmp_path, 2)
    for place in made:
        shutil.copytree(dataset, place / "dataset")
    put(source, "train", range(50, 90))
    put(source, "val", range(5, 30))

    def append(place, node, part=""):
        options = ["--chunk-bytes", "4096", "--append", "--workers", "2", "--scratch", str(place / f"node{node}")]
        return ["consolidate", str(source / part), str(place / "dataset"), *options]

    found = races([
        ([append(place, node, part) for node, part in enumerate(both)], 0.05)
        for place, both in zip(made, [("", ""), ("train", "val")], strict=True)
    ])  # fmt: skip
    for place, codes in zip(made, found, strict=True):
        assert 0 in codes, codes
        assert set(codes) <= {0, 75}, codes
        check_against_shards(place / "dataset", source)
    assert races([([append(place, 0)], 0) for place in made]) == [[0]] * len(made)
    for place in made:
        assert open_dataset(place / "dataset").manifest.splits["train"].shape[0] == 90
        assert open_dataset(place / "dataset").manifest.splits["val"].shape[0] == 30
        check_against_shards(place / "dataset", source)
        assert beside(place / "dataset") == set()


def test_a_split_whose_name_begins_like_another_has_its_own_index(tmp_path):
    """Index files are found by the whole name of a split."""
    for split in ("a", "a-b"):
        for i in range(3):
            write_shard(tmp_path / "source" / f"{split}_{i}.h5", SAMPLES["train"][i])
    options = replace(OPTIONS, split_pattern=r"(?P<split>[a-z-]+)_\d+")
    consolidate(tmp_path / "source", tmp_path / "ds", options)
    opened = open_dataset(tmp_path / "ds")
    assert [opened[split].index().num_rows for split in ("a", "a-b")] == [3, 3]
    write_shard(tmp_path / "source/a_3.h5", SAMPLES["train"][3])
    assert consolidate(tmp_path / "source", tmp_path / "ds", replace(options, append=True)).splits == {"a": 4, "a-b": 3}


def test_a_manifest_names_the_list_of_shards(dataset):
    manifest = records.load(dataset / "manifest.json", Manifest, MANIFEST_VERSION)
    assert manifest.files["shards.parquet"] == files.entry_of(dataset / "shards.parquet")
    assert [s.path for s in appending.standing(dataset).shards[:2]] == ["train/0.h5", "train/1.h5"]
