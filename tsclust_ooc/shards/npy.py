"""A `.npy` file as a shard that holds one dataset, `array`.

Runs in a child process (`child`). Invariant: nothing is unpickled, and nothing is read or allocated that the file does
not hold. Source: NumPy Enhancement Proposal 1, format versions 1.0 and 2.0.
"""

from __future__ import annotations

import io
import math
import os
import stat
import tokenize

import numpy as np

from tsclust_ooc.shards import layouts
from tsclust_ooc.shards.schema import ROWS_PER_FILE, Member, Schema, ShardError, Structure

SUFFIX = ".npy"
MAGIC = b"\x93NUMPY"
NAME = "array"

_HEAD_BYTES = 16 * 2**10  # numpy refuses longer headers too
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def is_npy(path: str) -> bool:
    """Whether the regular file at `path` begins as a `.npy` file does, whatever its name."""
    return head_of(path)[0].startswith(MAGIC)


def head_of(path: str) -> tuple[bytes, int]:
    """The first bytes of a regular file, and its size. Never blocks on a FIFO."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ShardError("unreadable", error.strerror or str(error)) from error
    with os.fdopen(fd, "rb", buffering=0) as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ShardError("not-regular", "not a regular file")
        return file.read(_HEAD_BYTES), found.st_size


def structure_of(head: bytes, size: int) -> Structure:
    """What is in a file of `size` bytes that begins with `head`; ShardError unless it is a whole `.npy` file."""
    shape, fortran, dtype, offset = _header(head, size)
    try:
        n_bytes = _check(shape, dtype, fortran=fortran)
    except ShardError as error:
        return Structure((Member(NAME, shape, "", -1, error.problem.code, error.problem.detail),), ())
    end = offset + n_bytes
    if end > size:
        raise ShardError("truncated", f"{size:,} of {end:,} bytes")
    warnings = (f"{size - end:,} bytes after the end of the array",) if end < size else ()
    return Structure((Member(NAME, shape, dtype.str, offset, "", ""),), warnings)


def read(path: str, schema: Schema, start: int, stop: int) -> np.ndarray:
    """Samples `start` to `stop` of a file as (n, *item_shape) in the schema's dtype."""
    (member,) = layouts.samples_in(schema, structure_of(*head_of(path)))
    if schema.layout != ROWS_PER_FILE:
        start, stop = 0, 1
    count = (stop - start) * math.prod(schema.item_shape)
    dtype = np.dtype(member.dtype)
    offset = member.offset + start * math.prod(schema.item_shape) * dtype.itemsize
    flat = np.fromfile(path, dtype, count, offset=offset)
    if flat.size != count:
        raise ShardError("truncated", f"{flat.size:,} of {count:,} values")
    samples = flat.astype(schema.dtype, copy=False).reshape(stop - start, *schema.stored_shape)
    return np.ascontiguousarray(samples.swapaxes(1, 2)) if schema.stored_shape != schema.item_shape else samples


def _header(head: bytes, size: int) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """(shape, whether in Fortran order, dtype, offset of the data)."""
    if size == 0:
        raise ShardError("empty-file", "0 bytes")
    if not head.startswith(MAGIC):
        lfs = head.startswith(b"version https://git-lfs")
        detail = "a git-lfs pointer, the data were never fetched: run git lfs pull" if lfs else (
            f"begins with {head[:12].decode('latin-1')!a}, not as a .npy file does"
        )  # fmt: skip
        raise ShardError("not-npy", detail)
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        if version not in _HEADERS:
            raise ShardError("dtype", f".npy format version {version}; embeddings are float16, float32 or float64")
        shape, fortran, dtype = _HEADERS[version](stream)
    except (ValueError, TypeError, SyntaxError, LookupError, RecursionError, MemoryError, tokenize.TokenError) as error:
        code = "truncated" if size < _header_end(head) else "corrupt"
        raise ShardError(code, f"{size:,} bytes, header unreadable: {ascii(str(error))[1:-1][:120]}") from error
    if any(isinstance(n, bool) or n < 0 for n in shape):
        raise ShardError("corrupt", f"declares shape {shape}")
    return shape, bool(fortran), dtype, stream.tell()


def _header_end(head: bytes) -> int:
    """Where the header of a file that begins with `head` says it ends, or where it would say it."""
    n = 4 if head[6:7] == b"\x02" else 2
    return 8 + n + (int.from_bytes(head[8 : 8 + n], "little") if len(head) >= 8 + n else 0)


def _check(shape: tuple[int, ...], dtype: np.dtype, *, fortran: bool) -> int:
    """Bytes of the array; ShardError unless it may hold samples."""
    if dtype.hasobject:
        raise ShardError("dtype", "an array of objects; it would have to be unpickled, which runs code")
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise ShardError("dtype", f"{str(dtype)[:60]}; embeddings are float16, float32 or float64")
    if not 1 <= len(shape) <= 3:
        raise ShardError("shape", f"{len(shape)} axes {shape}; samples have one or two")
    if fortran and len(shape) > 1:
        raise ShardError("fortran-order", "its first axis varies fastest; save np.ascontiguousarray(array) instead")
    return math.prod(shape) * dtype.itemsize
