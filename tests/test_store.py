"""The durable store: what zarr writes through it is whole, synced, remembered, and never makes a lost root anew."""

from __future__ import annotations

import os

import numpy as np
import pytest
import xxhash
import zarr
from sources import contents, values
from zarr.storage import LocalStore, MemoryStore

from tsclust_ooc.store import DurableStore, consolidate_metadata, copy_durably, make_dirs


def create(store, n=10):
    return zarr.create_array(store, name="train/embeddings", shape=(n, 4), chunks=(3, 4), dtype="f4", compressors=None)


def test_zarr_reads_what_was_written_and_every_key_is_remembered_with_its_digest(tmp_path):
    store = DurableStore(tmp_path)
    create(store)[:] = values(10, (4,))
    assert np.array_equal(zarr.open_array(tmp_path, path="train/embeddings", mode="r")[:], values(10, (4,)))
    on_disk = contents(tmp_path)
    assert store.written == {
        name: (len(data), xxhash.xxh3_128_hexdigest(data)) for name, data in on_disk.items() if name in store.written
    }
    assert set(on_disk) == set(store.written)


def test_the_bytes_are_those_of_zarrs_own_store(tmp_path):
    for store in (DurableStore(tmp_path / "ours"), LocalStore(tmp_path / "theirs")):
        store.root.mkdir()
        create(store)[:] = values(10, (4,))
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")


def test_every_file_is_synced_before_it_has_its_name(tmp_path, monkeypatch):
    synced, renamed = set(), []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(os.fstat(fd).st_ino), fsync(fd)))

    def watching(source, target):
        renamed.append(str(target))
        assert os.stat(source).st_ino in synced
        rename(source, target)

    monkeypatch.setattr(os, "rename", watching)
    create(DurableStore(tmp_path))[:] = 1.0
    assert sum("/c/" in name for name in renamed) == 4


def test_a_root_that_went_away_is_not_made_anew(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    array = create(DurableStore(root))
    root.rename(tmp_path / "published")
    with pytest.raises(FileNotFoundError):
        array[:] = 1.0
    assert not root.exists()
    with pytest.raises(FileNotFoundError):
        make_dirs(root, root / "a" / "b")
    assert not root.exists()


@pytest.mark.parametrize("mode", ["r", "r+", "a"])
def test_opening_never_makes_the_root(tmp_path, mode):
    with pytest.raises(FileNotFoundError):
        zarr.open_array(DurableStore(tmp_path / "gone"), path="train/embeddings", mode=mode)
    assert not (tmp_path / "gone").exists()


def test_a_key_set_without_a_loop_is_durable_and_remembered_too(tmp_path):
    store = DurableStore(tmp_path)
    store.set_sync("a/b", zarr.core.buffer.default_buffer_prototype().buffer.from_bytes(b"data"))
    assert store.written == {"a/b": (4, xxhash.xxh3_128_hexdigest(b"data"))}
    assert (tmp_path / "a/b").read_bytes() == b"data"


def test_a_memory_store_is_copied_key_for_key(tmp_path):
    store = MemoryStore()
    create(store)[:] = values(10, (4,))
    copy_durably(store, tmp_path, tmp_path / "data.zarr")
    assert np.array_equal(zarr.open_array(tmp_path / "data.zarr", path="train/embeddings")[:], values(10, (4,)))


def test_a_store_opened_to_read_refuses_to_write(tmp_path):
    create(DurableStore(tmp_path))
    array = zarr.open_array(DurableStore(tmp_path, read_only=True), path="train/embeddings", mode="r")
    with pytest.raises(ValueError, match="read-only"):
        array[:] = 1.0


def test_metadata_gathered_at_the_root_is_found_by_zarr_without_a_warning(tmp_path):
    store = MemoryStore()
    zarr.open_group(store, mode="w")
    create(store)
    consolidate_metadata(store)
    copy_durably(store, tmp_path, tmp_path / "data.zarr")
    group = zarr.open_consolidated(tmp_path / "data.zarr")
    assert group["train/embeddings"].shape == (10, 4)


def test_a_chunk_put_as_it_lies_is_what_zarr_would_have_written(tmp_path):
    samples = values(10, (4,))
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        store = DurableStore(tmp_path / name)
        array = create(store)
        if name == "theirs":
            array[:] = samples
        else:
            padded = np.zeros((12, 4), "f4")
            padded[:10] = samples
            for i in range(4):
                store.put(f"train/embeddings/c/{i}/0", padded[3 * i : 3 * i + 3].data.cast("B"))
        assert store.written == {
            key: (len(data), xxhash.xxh3_128_hexdigest(data)) for key, data in contents(tmp_path / name).items()
        }
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
