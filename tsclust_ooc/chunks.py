"""The zarr arrays of a dataset as they are made: empty ones, and whole chunks of rows.

Invariant: a chunk is written whole, by one writer; it is durable and the digest of its file noted when the block of its
partition's writer ends; the same rows give the same bytes. Whatever a file holds, memory holds one chunk of it.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zarr
from zarr.codecs import BloscCodec, ZstdCodec
from zarr.storage import MemoryStore

from tsclust_ooc import files
from tsclust_ooc.dataset import ARRAY, DATA
from tsclust_ooc.plan import Partition, Plan
from tsclust_ooc.sharding import index_bytes, index_size
from tsclust_ooc.store import DurableStore, consolidate_metadata, copy_durably, make_dirs

Chunk = np.ndarray[Any, np.dtype[Any]]
Write = Callable[[int, int, Chunk], None]


def make_arrays(dataset: Path, plan: Plan) -> None:
    """The empty zarr arrays below `dataset`: metadata only, each key atomic, the same bytes whoever writes them."""
    schema = plan.schema
    store = MemoryStore()  # on disk zarr would empty the folder of an array that another process has begun to fill
    zarr.open_group(store, mode="w")
    for split in plan.splits:
        # NaN, so that a chunk lost to a tool that does not read our manifest is seen, not taken for zeros.
        rows, many = plan.chunk_rows[split.name], plan.chunks_a_shard[split.name]
        zarr.create_array(
            store, name=f"{split.name}/{ARRAY}", shape=(split.n_rows, *schema.item_shape),
            chunks=(rows, *schema.item_shape), shards=(rows * many, *schema.item_shape) if many else None,
            dtype=schema.dtype, fill_value=float("nan"), dimension_names=schema.dimension_names,
            compressors=_codec(plan.options.codec),
        )  # fmt: skip
    consolidate_metadata(store)
    copy_durably(store, dataset, dataset / DATA)


def _codec(name: str) -> Any:
    if name == "zstd":
        return ZstdCodec(level=3)
    return BloscCodec(cname="lz4", clevel=5, shuffle="shuffle") if name == "blosc-lz4" else None


_buffers = threading.local()


def buffer(shape: tuple[int, ...], dtype: str) -> Chunk:
    """This thread's chunk buffer, used again and again: fresh pages cost as much as the copy into them."""
    have = getattr(_buffers, "array", None)
    if have is None or have.shape != shape or have.dtype != np.dtype(dtype):
        pages = mmap.mmap(-1, math.prod(shape) * np.dtype(dtype).itemsize)  # from the start of a page: see files.pour
        _buffers.array = have = np.frombuffer(pages, dtype).reshape(shape)
    assert isinstance(have, np.ndarray)
    return have


@contextlib.contextmanager
def chunk_writer(plan: Plan, partition: Partition, store: DurableStore) -> Iterator[Write]:
    """What writes the chunks of a partition, in their order: rows `start` to `stop` from the beginning of a buffer.

    Where they lie together in a zarr shard, its file gets its name when the block ends, and only if all were written.
    """
    if plan.chunks_a_shard[partition.split]:
        with _shard_writer(plan, partition, store) as write:
            yield write
    elif plan.options.codec:
        yield _zarr_writer(partition.split, store)
    else:
        yield partial(_write_plain, plan, partition.split, store)


def _zarr_writer(split: str, store: DurableStore) -> Write:
    opened: Any = zarr.open_array(store, path=f"{split}/{ARRAY}", mode="r+")
    # A chunk of nothing but NaN is a file too; open_array takes this option and forgets it.
    array = zarr.Array(zarr.AsyncArray(opened.metadata, opened.store_path, {"write_empty_chunks": True}))

    def write(start: int, stop: int, chunk: Chunk) -> None:
        array[start:stop] = chunk[: stop - start]

    return write


def _write_plain(plan: Plan, split: str, store: DurableStore, start: int, stop: int, chunk: Chunk) -> None:
    """An uncompressed chunk is the buffer as it lies; zarr would copy it twice."""
    store.put(_key(plan, split, start // plan.chunk_rows[split]), _padded(chunk, stop - start).data.cast("B"))


def _key(plan: Plan, split: str, number: int) -> str:
    return f"{split}/{ARRAY}/c/{number}{'/0' * len(plan.schema.item_shape)}"


def _padded(chunk: Chunk, n_rows: int) -> Chunk:
    """`chunk` with NaN after its rows: the last one of a split is as large as the others."""
    chunk[n_rows:] = np.nan
    return chunk


class _Unfinished(Exception):
    """Chunks of a zarr shard were not written."""


@contextlib.contextmanager
def _shard_writer(plan: Plan, partition: Partition, store: DurableStore) -> Iterator[Write]:
    """Writes a zarr shard a chunk at a time. zarr itself would hold all of its chunks, more than once."""
    n_chunks = plan.chunks_a_shard[partition.split]
    key = _key(plan, partition.split, partition.start // (plan.chunk_rows[partition.split] * n_chunks))
    path = store.root / key
    make_dirs(store.root, path.parent)
    sizes: list[int] = []
    digest = xxhash.xxh3_128()
    with contextlib.suppress(_Unfinished):
        with files.atomic_file(path) as file:

            def append(data: memoryview) -> None:
                files.pour(file, data)
                digest.update(data)

            encode = _encoder(plan, partition.split)

            def write(start: int, stop: int, chunk: Chunk) -> None:
                encoded = encode(_padded(chunk, stop - start))
                append(encoded)
                sizes.append(len(encoded))

            yield write
            if len(sizes) < len(list(plan.chunks_of(partition))):
                raise _Unfinished
            append(memoryview(index_bytes(sizes, n_chunks)))
        store.written[key] = (sum(sizes) + index_size(n_chunks), digest.hexdigest())


def _encoder(plan: Plan, split: str) -> Callable[[Chunk], memoryview]:
    """What makes the bytes of one chunk: they lie as they are, or go through zarr's codec in an array of one chunk."""
    if not plan.options.codec:
        return lambda chunk: chunk.data.cast("B")
    shape = (plan.chunk_rows[split], *plan.schema.item_shape)
    store = MemoryStore()
    array = zarr.create_array(
        store, shape=shape, chunks=shape, dtype=plan.schema.dtype, compressors=_codec(plan.options.codec),
        fill_value=float("nan"), config={"write_empty_chunks": True},
    )  # fmt: skip

    def encode(chunk: Chunk) -> memoryview:
        array[...] = chunk
        (data,) = (value for key, value in store._store_dict.items() if key.startswith("c/"))
        return memoryview(data.as_buffer_like()).cast("B")

    return encode
