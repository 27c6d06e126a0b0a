"""Rows of a dataset's array, a block at a time.

Invariant: a block is one chunk, and what `read` gives are its rows whole: a chunk that is missing or short, or cannot
be found or decoded, is an error here, never fill values.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import zarr

from tsclust_ooc.errors import BadInput
from tsclust_ooc.sharding import ABSENT, read_index

_NEXT = "Run tsclust verify on the dataset."


@dataclass(frozen=True)
class DatasetRows:
    """Rows of one view of one split, read a block (one chunk) at a time. Small and picklable: it holds a path.

    `folder` is the zarr array's directory, `shape` the array's, `chunk_rows` samples a chunk, `plain` whether chunks
    are the raw little-endian samples (then they are read straight into memory, without zarr), `shard_chunks` how many
    chunks lie together in a zarr shard (0: each is a file).
    """

    folder: str
    shape: tuple[int, ...]
    chunk_rows: int
    dtype_name: str
    view: str
    plain: bool
    shard_chunks: int = 0

    @property
    def rows_per_sample(self) -> int:
        """Rows that one sample becomes."""
        return self.shape[1] if self.view == "variable" and len(self.shape) == 3 else 1

    @property
    def n_rows(self) -> int:
        """Rows of the view."""
        return self.shape[0] * self.rows_per_sample

    @property
    def n_columns(self) -> int:
        """Columns of the view."""
        features = self.shape[1:]
        return int(np.prod(features)) if self.view == "flatten" else features[-1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """dtype as stored."""
        return np.dtype(self.dtype_name)

    @property
    def view_dtype(self) -> np.dtype[Any]:
        """dtype of the rows that `read` gives: float64 stays, all else is float32."""
        return np.dtype("f8" if self.dtype.itemsize == 8 else "f4")

    @property
    def n_bytes(self) -> int:
        """Bytes that one pass reads."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """Row where each block begins, and the end."""
        samples = [*range(0, self.shape[0], self.chunk_rows), self.shape[0]]
        return tuple(n * self.rows_per_sample for n in samples)

    def read(self, block: int) -> np.ndarray[Any, np.dtype[Any]]:
        """Rows of one block as (rows, columns), float32 or float64, C-contiguous."""
        start = block * self.chunk_rows
        stop = min(start + self.chunk_rows, self.shape[0])
        samples = self._read_plain(block)[: stop - start] if self.plain else self._decoded(block, start, stop)
        if self.view == "mean" and samples.ndim == 3:
            return np.asarray(samples.mean(axis=1, dtype="f8"), dtype=self.view_dtype)
        rows = np.asarray(samples).reshape((stop - start) * self.rows_per_sample, self.n_columns)
        return np.ascontiguousarray(rows, dtype=self.view_dtype)

    def _read_plain(self, block: int) -> np.ndarray[Any, np.dtype[Any]]:
        """A chunk as it lies in its file. A missing or short one is an error, where zarr would read fill values."""
        out = np.empty((self.chunk_rows, *self.shape[1:]), self.dtype)
        path, offset, n_bytes = self._place(block, out.nbytes)
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(offset)
                n = _read_fully(file.readinto, out.data.cast("B"))
        except FileNotFoundError as error:
            raise BadInput(f"chunk {path} is missing. {_NEXT}") from error
        if n != n_bytes or n_bytes != out.nbytes:
            raise BadInput(f"chunk {path} has {min(n, n_bytes):,} of {out.nbytes:,} bytes. {_NEXT}")
        return out

    def _decoded(self, block: int, start: int, stop: int) -> np.ndarray[Any, np.dtype[Any]]:
        """A compressed chunk through zarr, which would give fill values for one that is not there."""
        path, _, _ = self._place(block, 0)
        if not os.path.exists(path):
            raise BadInput(f"chunk {path} is missing. {_NEXT}")
        try:
            return np.asarray(self._array[start:stop])
        except (RuntimeError, ValueError) as error:
            raise BadInput(f"chunk {block} of {path} cannot be decoded: {error}. {_NEXT}") from error

    def _place(self, block: int, n_bytes: int) -> tuple[str, int, int]:
        """File, offset and size of a chunk; the size is `n_bytes` where it is a file of its own."""
        number = block // self.shard_chunks if self.shard_chunks else block
        path = os.path.join(self.folder, "c", str(number), *["0"] * (len(self.shape) - 1))
        if not self.shard_chunks:
            return path, 0, n_bytes
        if path not in self._indexes:
            self._indexes[path] = read_index(path, self.shard_chunks)
        offset, size = map(int, self._indexes[path][block % self.shard_chunks])
        if offset == ABSENT:
            raise BadInput(f"chunk {block} is not in zarr shard {path}, where it should be. {_NEXT}")
        return path, offset, size

    @cached_property
    def _indexes(self) -> dict[str, np.ndarray[Any, np.dtype[np.uint64]]]:
        """Indexes of the zarr shards that were read from: 16 bytes a chunk."""
        return {}

    @cached_property
    def _array(self) -> Any:
        return zarr.open_array(self.folder, mode="r")

    def __getstate__(self) -> dict[str, Any]:
        # An open array does not travel; it is opened where it is read.
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def _read_fully(readinto: Callable[[memoryview], int | None], out: memoryview) -> int:
    done = 0
    while done < len(out):
        n = readinto(out[done:])
        if not n:
            break
        done += n
    return done
