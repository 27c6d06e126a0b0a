"""A `.npy` file as a shard that holds one dataset, `array`.

Runs in a child process (`child`). Invariant: nothing is unpickled, and nothing is read or allocated that the file does
not hold. Source: NumPy Enhancement Proposal 1, format versions 1.0 and 2.0.
"""

from __future__ import annotations

import io
import math
import os
import tokenize

import numpy as np

from tsclust_ooc.shards import layouts
from tsclust_ooc.shards.regular import head_of, open_regular
from tsclust_ooc.shards.schema import ROWS_PER_FILE, Member, Schema, ShardError, Structure

SUFFIX = ".npy"
MAGIC = b"\x93NUMPY"
NAME = "array"

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def is_npy(path: str) -> bool:
    """Whether the regular file at `path` begins as a `.npy` file does, whatever its name."""
    return head_of(path)[0].startswith(MAGIC)


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


def read_into(path: str, schema: Schema, start: int, out: np.ndarray) -> None:
    """Fill `out` ((n, *item_shape) in the schema's dtype) with the samples of a file from `start` on."""
    (member,) = layouts.samples_in(schema, structure_of(*head_of(path)))
    offset = member.offset + (start * schema.item_bytes if schema.layout == ROWS_PER_FILE else 0)
    raw = out.data.cast("B")
    with open_regular(path) as (file, _):
        done = 0
        while done < len(raw):
            n = os.preadv(file.fileno(), [raw[done:]], offset + done)
            if n == 0:
                raise ShardError("truncated", f"{done:,} of {len(raw):,} bytes")
            done += n
    if np.dtype(member.dtype) != out.dtype:
        out.byteswap(inplace=True)
    layouts.turn(schema, raw)


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
    layouts.check_axes(shape)
    if fortran and len(shape) > 1:
        raise ShardError("fortran-order", "its first axis varies fastest; save np.ascontiguousarray(array) instead")
    return math.prod(shape) * dtype.itemsize
