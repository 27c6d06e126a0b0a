"""verify: every single damage is found and named, and nothing else is."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from sources import (
    ITEM,
    KEY,
    OPTIONS,
    dataset_per_item,
    item_per_file,
    rows_per_file,
    shared_parsers,
    three_splits,
    values,
    write_shard,
)

from tsclust_ooc.cli import main
from tsclust_ooc.pipeline import consolidating, verifying
from tsclust_ooc.pipeline.consolidating import consolidate
from tsclust_ooc.pipeline.verifying import verify

CHUNK = "data.zarr/train/embeddings/c/1/0/0"
INDEX = "index/train-00000.parquet"
ARRAY = "data.zarr/train/embeddings/zarr.json"


@pytest.fixture(scope="module", autouse=True)
def parsers():
    with shared_parsers(consolidating, verifying):
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    three_splits(folder / "source")
    consolidate(folder / "source", folder / "ds", OPTIONS)
    return folder


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A dataset and its source, to harm."""
    shutil.copytree(original / "ds", tmp_path / "ds")
    shutil.copytree(original / "source", tmp_path / "source")
    return tmp_path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def swap(one: Path, other: Path) -> None:
    spare = one.with_name("spare")
    one.rename(spare)
    other.rename(one)
    spare.rename(other)


def edit(path: Path, change) -> None:
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body, indent=1))


def found(folder: Path, **options) -> dict[str, str]:
    return {d.file: d.what for d in verify(folder / "ds", workers=2, **options).damage}


def test_a_whole_dataset_has_no_damage_and_everything_was_looked_at(original):
    done = verify(original / "ds", workers=2)
    files = [p for p in (original / "ds").rglob("*") if p.is_file() and p.name != "manifest.json"]
    assert done.damage == ()
    assert (done.n_files, done.bytes) == (len(files), sum(p.stat().st_size for p in files))
    assert done.n_samples_compared == 0


def test_every_file_is_checked_to_its_last_bit(folder):
    manifest = folder / "ds" / "manifest.json"
    for path in sorted(p for p in (folder / "ds").rglob("*") if p.is_file() and p != manifest):
        whole = path.read_bytes()
        for at in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            name = str(path.relative_to(folder / "ds"))
            damage = found(folder)
            assert list(damage) == [name]
            assert damage[name].startswith("digest ")
        path.write_bytes(whole)
    assert found(folder) == {}


@pytest.mark.parametrize("name", [CHUNK, INDEX, ARRAY, "rejected.json"])
@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (flip, "digest "),
        (lambda p: os.truncate(p, p.stat().st_size - 1), "bytes, wanted"),
        (lambda p: os.truncate(p, 0), "0 bytes, wanted"),
        (lambda p: p.write_bytes(p.read_bytes() + b"x"), "bytes, wanted"),
        (lambda p: p.unlink(), "missing"),
        (lambda p: (p.unlink(), p.mkdir()), "bytes, wanted"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(folder, name, harm, words):
    harm(folder / "ds" / name)
    damage = found(folder)
    assert list(damage) == [name]
    assert words in damage[name]


def test_two_swapped_chunks_are_both_named(folder):
    other = CHUNK.replace("/1/", "/0/")
    swap(folder / "ds" / CHUNK, folder / "ds" / other)
    assert set(found(folder)) == {CHUNK, other}


@pytest.mark.parametrize("name", ["data.zarr/train/embeddings/c/9/0/0", "index/train-00009.parquet", "notes.txt"])
def test_a_file_that_does_not_belong_is_named(folder, name):
    (folder / "ds" / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / "ds" / name).write_bytes(b"x")
    assert found(folder) == {name: "not in the manifest"}


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["splits"]["train"]["shape"].__setitem__(0, 49),
        lambda body: body["splits"]["train"].update(n_shards=49),
        lambda body: body["schema"].update(key="other"),
        lambda body: body["options"].update(codec="zstd"),
        lambda body: body.update(digest="0" * 32),
    ],
)
def test_an_edited_manifest_is_found(folder, change):
    edit(folder / "ds" / "manifest.json", change)
    assert found(folder) == {"manifest.json": "its digest does not match its content"}


def test_an_edited_digest_of_a_file_names_manifest_and_file(folder):
    edit(folder / "ds" / "manifest.json", lambda body: body["files"][CHUNK].update(digest="0" * 32))
    assert set(found(folder)) == {"manifest.json", CHUNK}


def test_against_its_source_every_sample_is_compared(original):
    done = verify(original / "ds", original / "source", workers=2)
    assert (done.damage, done.n_samples_compared) == ((), 82)


@pytest.mark.parametrize("builder", [rows_per_file, item_per_file])
@pytest.mark.parametrize("dtype", ["<f2", ">f8"])
def test_any_kind_of_source_compares_equal(tmp_path, builder, dtype):
    n = len(builder(tmp_path / "source", dtype=dtype))
    consolidate(tmp_path / "source", tmp_path / "ds", OPTIONS)
    done = verify(tmp_path / "ds", tmp_path / "source", workers=1)
    assert (done.damage, done.n_samples_compared) == ((), n)


def test_samples_that_are_datasets_and_names_that_are_not_utf8_compare_equal(tmp_path):
    dataset_per_item(tmp_path / "source", {"0.h5": ["s|1", "s|2"], "1.h5": ["g/1", "g/2"]})
    os.rename(tmp_path / "source/1.h5", os.fsencode(tmp_path) + b"/source/1\xff.h5")
    consolidate(tmp_path / "source", tmp_path / "ds", OPTIONS)
    assert verify(tmp_path / "ds", tmp_path / "source", workers=1).damage == ()


def test_nan_equals_itself_and_minus_zero_is_not_zero(tmp_path):
    sample = values(1)[0]
    sample[0, 0], sample[1, 1] = np.nan, 0.0
    for i in range(3):
        write_shard(tmp_path / "source" / f"{i}.h5", sample)
    consolidate(tmp_path / "source", tmp_path / "ds", OPTIONS)
    assert found(tmp_path, against=tmp_path / "source") == {}
    sample[1, 1] = -0.0
    write_shard(tmp_path / "source" / "1.h5", sample)
    assert list(found(tmp_path, against=tmp_path / "source")) == ["1.h5"]


def test_one_changed_value_names_its_shard_and_row(folder):
    with h5py.File(folder / "source/train/33.h5", "a") as file:
        file[KEY][2, 5] += 1
    assert found(folder, against=folder / "source") == {"train/33.h5": "sample 0 differs from row 33 of train"}


def test_a_missing_and_a_new_shard_are_named(folder):
    (folder / "source/train/33.h5").unlink()
    write_shard(folder / "source/val/100.h5", values(1)[0])
    assert found(folder, against=folder / "source") == {
        "train/33.h5": "in the dataset, not in the source",
        "val/100.h5": "in the source, not in the dataset",
    }


def test_a_split_that_came_or_went_is_named_by_its_shards(folder):
    shutil.rmtree(folder / "source/val")
    write_shard(folder / "source/0.h5", values(1)[0])
    damage = found(folder, against=folder / "source")
    assert damage.pop("0.h5") == "in the source, not in the dataset"
    assert set(damage) == {f"val/{i}.h5" for i in range(9)}


def test_a_shard_with_more_samples_than_before_is_named(tmp_path):
    rows_per_file(tmp_path / "source", (30, 40, 50))
    consolidate(tmp_path / "source", tmp_path / "ds", OPTIONS)
    write_shard(tmp_path / "source/slide_1.h5", values(41, (16,)), "features")
    damage = found(tmp_path, against=tmp_path / "source")
    assert damage == {"slide_1.h5": "now holds 41 samples, the dataset has 40 of it"}


def test_a_source_of_another_shape_is_said_to_be_one(folder):
    item_per_file(folder / "other" / "train", 50, item=(3, 17))
    damage = found(folder, against=folder / "other")
    assert "(3, 17)" in damage["train"]
    assert str(ITEM) in damage["train"]


def test_a_damaged_dataset_is_not_compared(folder):
    flip(folder / "ds" / CHUNK)
    done = verify(folder / "ds", folder / "source", workers=2)
    assert [d.file for d in done.damage] == [CHUNK]
    assert done.n_samples_compared == 0


def test_a_dataset_of_several_sources_compares_with_them_and_with_what_holds_them(folder):
    parts = [folder / "source" / name for name in ("val", "train")]
    consolidate(parts, folder / "two", OPTIONS)
    assert verify(folder / "two", parts, workers=1).damage == ()
    assert {d.what for d in verify(folder / "two", folder / "source", workers=1).damage} == {
        "in the source, not in the dataset"
    }
    shutil.rmtree(folder / "source/test")
    done = verify(folder / "two", folder / "source", workers=1)
    assert (done.damage, done.n_samples_compared) == ((), 59)


@pytest.mark.parametrize("stride", [None, 3])
def test_splits_that_an_expression_told_are_known_without_it(tmp_path, stride):
    for i, sample in enumerate(values(20)):
        write_shard(tmp_path / "source" / f"{('train', 'dev')[i % 2]}_{i}.h5", sample)
    write_shard(tmp_path / "source" / "other.h5", values(1)[0])
    options = replace(OPTIONS, split_pattern=r"(?P<split>[a-z]+)_\d", on_bad="skip", stride=stride)
    done = consolidate(tmp_path / "source", tmp_path / "ds", options)
    assert (set(done.splits), done.n_rejected) == ({"train", "dev"}, 1)
    checked = verify(tmp_path / "ds", tmp_path / "source", workers=1)
    assert (checked.damage, checked.n_samples_compared) == ((), done.n_samples)
    with h5py.File(tmp_path / "source/dev_9.h5", "a") as file:
        file[KEY][2, 5] += 1
    assert list(found(tmp_path, against=tmp_path / "source")) == (["dev_9.h5"] if stride is None else [])
    write_shard(tmp_path / "source" / "dev_99.h5", values(1)[0])
    assert "dev_99.h5" in found(tmp_path, against=tmp_path / "source")


def test_a_list_of_shards_is_enough_to_compare_with(folder, capsys):
    lines = [f"source/{path.relative_to(folder / 'source')}" for path in (folder / "source").rglob("*.h5")]
    (folder / "list.txt").write_text("\n".join(lines))
    assert main(["verify", str(folder / "ds"), "--against", str(folder / "list.txt")]) == 0
    assert "82 samples equal to their shards" in capsys.readouterr().out
    words = ["--against", str(folder / "source/train"), "--also", str(folder / "source/val")]
    assert main(["verify", str(folder / "ds"), *words]) == 65
    assert "in the dataset, not in the source" in capsys.readouterr().err
    assert main(["verify", str(folder / "ds"), "--also", str(folder / "source")]) == 2
    assert "--against" in capsys.readouterr().err
