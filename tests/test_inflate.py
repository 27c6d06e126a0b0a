"""Unpacking gzip chunks by libdeflate gives h5py's values, or leaves the verdict to HDF5."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
from sources import KEY, values, write_shard

from tsclust_ooc.shards import inflate


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f8"])
@pytest.mark.parametrize("item", [(16,), (3, 5)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_rows_are_those_of_h5py(tmp_path, dtype, item, shuffle):
    rows = values(205, item, dtype)
    write_shard(tmp_path / "0.h5", rows, chunks=(10, *item), compression="gzip", shuffle=shuffle)
    with h5py.File(tmp_path / "0.h5") as file:
        for start, stop in ((0, 205), (7, 93), (110, 205), (0, 80)):
            got = np.empty((stop - start, *item), dtype)
            assert inflate.read_rows(file[KEY].id, start, stop, got)
            assert got.tobytes() == file[KEY][start:stop].tobytes()


@pytest.mark.parametrize(
    "options",
    [{}, {"chunks": (10, 8)}, {"chunks": (10, 4), "compression": "gzip"}, {"chunks": (10, 8), "compression": "lzf"},
     {"chunks": (10, 8), "compression": "gzip", "fletcher32": True}, {"chunks": (90, 8), "compression": "gzip"}],
)  # fmt: skip
def test_what_is_not_plainly_packed_is_left_to_hdf5(tmp_path, options):
    write_shard(tmp_path / "0.h5", values(200, (8,)), **options)
    with h5py.File(tmp_path / "0.h5") as file:
        assert not inflate.read_rows(file[KEY].id, 0, 200, np.empty((200, 8), "f4"))


def test_a_chunk_that_does_not_unpack_to_a_chunk_is_left_to_hdf5(tmp_path):
    write_shard(tmp_path / "0.h5", values(200, (8,)), chunks=(10, 8), compression="gzip")
    with h5py.File(tmp_path / "0.h5", "r+") as file:
        packed = file[KEY].id.read_direct_chunk((20, 0))[1]
        for mask, chunk in ((0, packed[:-1]), (0, packed[:-1] + bytes([packed[-1] ^ 1])), (1, bytes(320))):
            file[KEY].id.write_direct_chunk((20, 0), chunk, mask)
            assert not inflate.read_rows(file[KEY].id, 0, 200, np.empty((200, 8), "f4"))
