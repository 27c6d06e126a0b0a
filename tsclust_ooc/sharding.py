"""zarr v3 shard files: encoded chunks one after the other, then the index that says where each lies.

Invariant: an index that does not match its checksum is never believed. A shard file is written from its beginning to
its end, chunk by chunk, so that its writer holds one chunk, not all of them.

    chunk 0 | chunk 1 | ... | offset, size of each as little-endian uint64, both 2^64 - 1 where it is absent | crc32c

Source: the codec "sharding_indexed" of the zarr v3 specification, `index_location` "end", index codecs bytes + crc32c.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from tsclust_ooc.errors import BadInput

ABSENT = 2**64 - 1
_CHECKSUM_BYTES = 4
_NEXT = "Run tsclust verify on the dataset."


def index_size(n_chunks: int) -> int:
    """Bytes of the index of a shard that has room for `n_chunks`."""
    return 16 * n_chunks + _CHECKSUM_BYTES


def index_bytes(sizes: Sequence[int], n_chunks: int) -> bytes:
    """The index of a shard with room for `n_chunks` whose first ones lie one after the other, with these `sizes`."""
    index = np.full((n_chunks, 2), ABSENT, "<u8")
    ends = np.cumsum(sizes, dtype=np.uint64)
    index[: len(sizes), 1] = sizes
    index[: len(sizes), 0] = ends - index[: len(sizes), 1]
    data = index.tobytes()
    return data + _checksum(data)


def read_index(path: str | Path, n_chunks: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Offset and size of each chunk of the shard file at `path`: uint64 of shape (n_chunks, 2).

    Raises BadInput when the file is missing or too short, or its index is damaged.
    """
    wanted = index_size(n_chunks)
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            data = os.pread(file.fileno(), wanted, max(size - wanted, 0))
    except FileNotFoundError as error:
        raise BadInput(f"zarr shard {path} is missing. {_NEXT}") from error
    if len(data) != wanted:
        raise BadInput(f"zarr shard {path} has {size:,} bytes, its index alone has {wanted:,}. {_NEXT}")
    if _checksum(data[:-_CHECKSUM_BYTES]) != data[-_CHECKSUM_BYTES:]:
        raise BadInput(f"the index of zarr shard {path} does not match its checksum. {_NEXT}")
    return np.frombuffer(data, "<u8", 2 * n_chunks).reshape(n_chunks, 2)


def _checksum(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(_CHECKSUM_BYTES, "little")
