"""Rows of a dataset's array, a block at a time.

Invariant: a block is one chunk, and what `read` gives are its rows whole: a chunk that is missing or short is an error
here, never fill values.
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


@dataclass(frozen=True)
class DatasetRows:
    """Rows of one view of one split, read a block (one chunk) at a time. Small and picklable: it holds a path.

    `folder` is the zarr array's directory, `shape` the array's, `chunk_rows` samples a chunk, `plain` whether chunk
    files are the raw little-endian samples (then they are read straight into memory, without zarr).
    """

    folder: str
    shape: tuple[int, ...]
    chunk_rows: int
    dtype_name: str
    view: str
    plain: bool

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
        samples = self._read_plain(block)[: stop - start] if self.plain else self._array[start:stop]
        if self.view == "mean" and samples.ndim == 3:
            return np.asarray(samples.mean(axis=1, dtype="f8"), dtype=self.view_dtype)
        rows = np.asarray(samples).reshape((stop - start) * self.rows_per_sample, self.n_columns)
        return np.ascontiguousarray(rows, dtype=self.view_dtype)

    def _read_plain(self, block: int) -> np.ndarray[Any, np.dtype[Any]]:
        """A chunk file as it lies. A missing or short one is an error here, where zarr would read fill values."""
        path = os.path.join(self.folder, "c", str(block), *["0"] * (len(self.shape) - 1))
        out = np.empty((self.chunk_rows, *self.shape[1:]), self.dtype)
        try:
            with open(path, "rb", buffering=0) as file:
                n = _read_fully(file.readinto, out.data.cast("B"))
        except FileNotFoundError as error:
            raise BadInput(f"chunk {path} is missing. Run tsclust verify on the dataset.") from error
        if n != out.nbytes:
            raise BadInput(f"chunk {path} has {n:,} of {out.nbytes:,} bytes. Run tsclust verify on the dataset.")
        return out

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
