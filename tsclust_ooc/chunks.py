"""The zarr arrays of a dataset as they are made: empty ones, and whole chunks of rows.

Invariant: a chunk is written whole, by one writer, and is durable with its digest noted when its write returns; the
same rows give the same bytes.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, ZstdCodec
from zarr.storage import MemoryStore

from tsclust_ooc.dataset import ARRAY, DATA
from tsclust_ooc.plan import Plan
from tsclust_ooc.store import DurableStore, consolidate_metadata, copy_durably


def make_arrays(dataset: Path, plan: Plan) -> None:
    """The empty zarr arrays below `dataset`: metadata only, each key atomic, the same bytes whoever writes them."""
    schema = plan.schema
    store = MemoryStore()  # on disk zarr would empty the folder of an array that another process has begun to fill
    zarr.open_group(store, mode="w")
    for split in plan.splits:
        # NaN, so that a chunk lost to a tool that does not read our manifest is seen, not taken for zeros.
        zarr.create_array(
            store, name=f"{split.name}/{ARRAY}", shape=(split.n_rows, *schema.item_shape),
            chunks=(plan.chunk_rows[split.name], *schema.item_shape), dtype=schema.dtype, fill_value=float("nan"),
            dimension_names=schema.dimension_names, compressors=_codec(plan.options.codec),
        )  # fmt: skip
    consolidate_metadata(store)
    copy_durably(store, dataset, dataset / DATA)


def _codec(name: str) -> Any:
    if name == "zstd":
        return ZstdCodec(level=3)
    return BloscCodec(cname="lz4", clevel=5, shuffle="shuffle") if name == "blosc-lz4" else None


_buffers = threading.local()


def buffer(shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, np.dtype[Any]]:
    """This thread's chunk buffer, used again and again: fresh pages cost as much as the copy into them."""
    have = getattr(_buffers, "array", None)
    if have is None or have.shape != shape or have.dtype != np.dtype(dtype):
        pages = mmap.mmap(-1, math.prod(shape) * np.dtype(dtype).itemsize)  # from the start of a page: see files.pour
        _buffers.array = have = np.frombuffer(pages, dtype).reshape(shape)
    assert isinstance(have, np.ndarray)
    return have


def chunk_writer(plan: Plan, split: str, store: DurableStore) -> Callable[[int, int, np.ndarray[Any, Any]], None]:
    """What writes rows `start` to `stop` of a split from the beginning of a chunk's buffer: one whole chunk."""
    if not plan.options.codec:
        return partial(_write_plain, plan, split, store)
    opened: Any = zarr.open_array(store, path=f"{split}/{ARRAY}", mode="r+")
    # A chunk of nothing but NaN is a file too; open_array takes this option and forgets it.
    array = zarr.Array(zarr.AsyncArray(opened.metadata, opened.store_path, {"write_empty_chunks": True}))

    def write(start: int, stop: int, chunk: np.ndarray[Any, Any]) -> None:
        array[start:stop] = chunk[: stop - start]

    return write


def _write_plain(
    plan: Plan, split: str, store: DurableStore, start: int, stop: int, chunk: np.ndarray[Any, Any]
) -> None:
    """An uncompressed chunk is the buffer as it lies; zarr would copy it twice."""
    chunk[stop - start :] = np.nan  # the last chunk of a split is as large as the others
    number = start // plan.chunk_rows[split]
    store.put(f"{split}/{ARRAY}/c/{number}{'/0' * (chunk.ndim - 1)}", chunk.data.cast("B"))
