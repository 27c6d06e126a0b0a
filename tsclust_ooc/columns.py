"""Arrow columns out of plain values, without pandas.

Invariant: nothing here imports pandas. `pyarrow.array` does, for lists and for numpy arrays alike, wherever pandas is
installed: 0.5 s of every command that writes a table. So columns are made from their buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa


def text(values: Sequence[str]) -> pa.Array:
    """`values` as an Arrow string column (they must be encodable as UTF-8; at most 2 GiB of them)."""
    raw = [value.encode() for value in values]
    offsets = np.zeros(len(raw) + 1, np.int32)
    np.cumsum(np.fromiter(map(len, raw), np.int32, len(raw)), out=offsets[1:])
    return pa.StringArray.from_buffers(len(raw), pa.py_buffer(offsets), pa.py_buffer(b"".join(raw)))


def same_text(value: str, n: int) -> pa.Array:
    """An Arrow string column of `n` times the same value."""
    raw = value.encode()
    offsets = np.arange(n + 1, dtype=np.int32) * np.int32(len(raw))
    return pa.StringArray.from_buffers(n, pa.py_buffer(offsets), pa.py_buffer(raw * n))


def numbers(values: Sequence[int] | range | np.ndarray[Any, Any]) -> pa.Array:
    """`values` as an Arrow column of the type of the numpy array; other sequences are int64."""
    array = np.ascontiguousarray(values if isinstance(values, np.ndarray) else np.asarray(values, np.int64))
    return pa.Array.from_buffers(pa.from_numpy_dtype(array.dtype), len(array), [None, pa.py_buffer(array)])


def table(named: dict[str, pa.Array | pa.ChunkedArray]) -> pa.Table:
    """A table of named columns."""
    return pa.Table.from_arrays(list(named.values()), names=list(named))
