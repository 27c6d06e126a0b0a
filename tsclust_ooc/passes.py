"""One read of all rows: a kernel mapped over row blocks, its partial results combined by a fixed tree.

    rows ── block 0 ── chunk ─┐
         ── block 1 ── chunk ─┴ combine ─┐
         ── block 2 ── chunk ─┐          ├ combine ── result
         ── block 3 ── chunk ─┴ combine ─┘

Invariant: a result depends on the rows, their bounds and the kernel, never on who ran the blocks or which ended first.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from tsclust_ooc.errors import BadInput, TsclustError

NUMPY_BLOCK_BYTES = 8 * 2**20
"""Bytes of a block of an in-memory array: large against the cost of a task, small against memory."""

ZARR_BLOCK_BYTES = 16 * 2**20
"""Whole chunks smaller than this are read together."""

P = TypeVar("P")
Mapper = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""Like builtin `map`: results in order of the items. A thread pool, a dask client, a job array."""
Sink = Callable[[int, Any], None]
"""Takes `(start, per_row)` of each block, in order of the rows."""


@runtime_checkable
class Rows(Protocol):
    """A matrix that is read by blocks of whole rows. Picklable: it travels to the workers."""

    @property
    def n_rows(self) -> int:
        """Rows in all."""

    @property
    def n_columns(self) -> int:
        """Columns of every row."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type as stored; `working_dtype` tells the type as read."""

    @property
    def n_bytes(self) -> int:
        """Bytes as stored that one read of all rows takes."""

    @property
    def bounds(self) -> tuple[int, ...]:
        """Canonical block bounds, ascending from 0 to n_rows; block i holds rows bounds[i] to bounds[i + 1]."""

    def read(self, block: int) -> np.ndarray:
        """Rows of one block, shape (rows, columns), native float32 or float64, C-contiguous."""


class Kernel(Protocol[P]):
    """A reduction as data: what one block gives, and how two neighbouring results become one."""

    def chunk(self, x: np.ndarray, start: int) -> tuple[P, Any]:
        """The partial result of rows `start, start + 1, ...`, and what it says of each row (arrays, or None)."""

    def combine(self, a: P, b: P) -> P:
        """One partial result of two; `a` is of earlier rows."""


@dataclass
class Tally:
    """Counts reads of the data: full passes, and bytes as stored."""

    n_passes: int = 0
    bytes_read: int = 0


def working_dtype(dtype: Any) -> np.dtype[Any]:
    """The float type that rows of `dtype` are read as: float32 when it holds every value, else float64.

    Raises BadInput for types that are no real numbers.
    """
    stored = np.dtype(dtype)
    if stored.kind not in "fiub":
        raise BadInput(f"Rows of dtype {stored} are not real numbers. Wanted: a float or integer dtype. Convert them.")
    return np.result_type(stored.newbyteorder("="), np.float32) if stored.itemsize <= 4 else np.dtype(np.float64)


@dataclass(frozen=True)
class ArrayRows:
    """Rows of anything that slices to numpy along axis 0: a numpy array, a memory map, a zarr array."""

    array: Any
    bounds: tuple[int, ...]

    @property
    def n_rows(self) -> int:
        """Rows in all."""
        return self.bounds[-1]

    @property
    def n_columns(self) -> int:
        """Columns of every row."""
        return int(self.array.shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type as stored."""
        stored: np.dtype[Any] = np.dtype(self.array.dtype)
        return stored

    @property
    def n_bytes(self) -> int:
        """Bytes of all rows as stored."""
        return self.n_rows * self.n_columns * self.dtype.itemsize

    def read(self, block: int) -> np.ndarray:
        """Rows of one block; a view where the array already is as wanted."""
        return _ready(self.array[self.bounds[block] : self.bounds[block + 1]], self.dtype)


@dataclass(frozen=True)
class DaskRows(ArrayRows):
    """Rows of a dask array, one block a chunk; a block is computed in the thread that reads it."""

    def read(self, block: int) -> np.ndarray:
        """Compute one chunk here: parallelism belongs to the mapper, not to a scheduler inside a scheduler."""
        return _ready(self.array.blocks[block].compute(scheduler="synchronous"), self.dtype)


def as_rows(x: Any) -> Rows:
    """`x` as Rows: Rows themselves, or a 2-D numpy, zarr or dask array, a data frame, nested lists of numbers.

    Bounds are fixed by `x` alone: dask chunks; zarr chunks, small ones grouped; 8 MiB of a numpy array.
    Unknown chunk sizes of a dask array are computed. Raises BadInput for anything that is not a matrix of real numbers.
    """
    if isinstance(x, Rows):
        return x
    family = type(x).__module__.partition(".")[0]
    if hasattr(x, "to_dask_array"):
        x, family = x.to_dask_array(lengths=True), "dask"
    elif family not in ("dask", "zarr"):
        x = _as_numpy(x)
    _check_matrix(x)
    if family == "dask":
        return _dask_rows(x)
    if family == "zarr":
        return ArrayRows(x, _grouped(x.shape, x.dtype.itemsize, int(x.chunks[0]), ZARR_BLOCK_BYTES))
    return ArrayRows(x, _grouped(x.shape, x.dtype.itemsize, 1, NUMPY_BLOCK_BYTES))


def one_pass(
    kernel: Kernel[P],
    rows: Rows,
    *,
    mapper: Mapper = map,
    tally: Tally | None = None,
    sink: Sink | None = None,
) -> P:
    """Read every block once and return the kernel's combined result, the same bit for bit for any mapper.

    `sink` receives what the kernel says of each row, block by block in order; without one it does not travel back.
    At most log2(blocks) + 1 partial results are alive here. Numerical libraries run one thread a task meanwhile.
    """
    tree = _Tree(kernel.combine)
    done = 0
    with one_blas_thread:
        for part, per_row in mapper(_Work(kernel, rows, sink is not None), range(len(rows.bounds) - 1)):
            tree.push(part)
            if sink is not None:
                sink(rows.bounds[done], per_row)
            done += 1
    if done != len(rows.bounds) - 1:
        raise TsclustError(
            f"The mapper gave {done} results for {len(rows.bounds) - 1} blocks. Wanted: one each, in order."
        )
    if tally is not None:
        tally.n_passes += 1
        tally.bytes_read += rows.n_bytes
    return tree.result()


def gather(rows: Rows, indices: np.ndarray, *, mapper: Mapper = map, tally: Tally | None = None) -> np.ndarray:
    """Rows at ascending global `indices`, shape (n, columns); reads only the blocks that hold them.

    Counts as a pass when that is every block.
    """
    indices = np.asarray(indices, dtype=np.int64)
    found = np.empty((len(indices), rows.n_columns), working_dtype(rows.dtype))
    wanted = _by_block(rows.bounds, indices)
    at = 0
    for picked in mapper(_Pick(rows), wanted):
        found[at : at + len(picked)] = picked
        at += len(picked)
    if tally is not None:
        touched = sum(rows.bounds[block + 1] - rows.bounds[block] for block, _ in wanted)
        tally.bytes_read += rows.n_bytes * touched // rows.n_rows
        tally.n_passes += int(touched == rows.n_rows)
    return found


@contextmanager
def thread_mapper(n_threads: int) -> Iterator[Mapper]:
    """A mapper on `n_threads` threads that runs at most two items a thread ahead, so that results do not pile up."""
    with ThreadPoolExecutor(n_threads, thread_name_prefix="pass") as pool:
        yield partial(_map_ahead, pool, 2 * n_threads)


class _OneBlasThread:
    """While anybody is inside, BLAS runs on one thread in this process; the last to leave restores what was.

    Counted, because passes and tasks nest and overlap: restoring in order of leaving would let one undo another's.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._controller: ThreadpoolController | None = None
        self._limit: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                # Finding the libraries takes milliseconds, setting them microseconds.
                self._controller = self._controller or ThreadpoolController()
                self._limit = self._controller.limit(limits=1, user_api="blas")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._limit.restore_original_limits()


one_blas_thread = _OneBlasThread()
"""Context manager: the mapper owns parallelism, so each task's matrix products stay on its own thread."""


@dataclass(frozen=True)
class _Work:
    """What is mapped over block numbers; a dataclass and not a closure, so that it pickles."""

    kernel: Kernel[Any]
    rows: Rows
    per_row_wanted: bool

    def __call__(self, block: int) -> tuple[Any, Any]:
        x = _ready(self.rows.read(block), self.rows.dtype)
        with one_blas_thread:  # again: this may be a worker process that the pass's own limit does not reach
            part, per_row = self.kernel.chunk(x, self.rows.bounds[block])
        return part, per_row if self.per_row_wanted else None


@dataclass(frozen=True)
class _Pick:
    rows: Rows

    def __call__(self, wanted: tuple[int, np.ndarray]) -> np.ndarray:
        block, offsets = wanted
        return _ready(self.rows.read(block)[offsets], self.rows.dtype)


class _Tree(Generic[P]):
    """A binary counter of partial results: neighbours of equal height combine, as 1 + 1 carries."""

    def __init__(self, combine: Callable[[P, P], P]) -> None:
        self._combine = combine
        self._open: list[tuple[int, P]] = []

    def push(self, part: P) -> None:
        height = 0
        while self._open and self._open[-1][0] == height:
            part = self._combine(self._open.pop()[1], part)
            height += 1
        self._open.append((height, part))

    def result(self) -> P:
        _, part = self._open.pop()
        while self._open:
            part = self._combine(self._open.pop()[1], part)
        return part


def _map_ahead(pool: ThreadPoolExecutor, ahead: int, fn: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    waiting: deque[Future[Any]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(fn, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _by_block(bounds: tuple[int, ...], indices: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """`(block, offsets inside it)` for each block that holds some of the ascending `indices`."""
    cuts = np.searchsorted(indices, bounds)
    return [
        (block, indices[start:stop] - bounds[block])
        for block, (start, stop) in enumerate(pairwise(cuts.tolist()))
        if stop > start
    ]


def _ready(block: Any, stored: np.dtype[Any]) -> np.ndarray:
    return np.ascontiguousarray(block, dtype=working_dtype(stored))


def _as_numpy(x: Any) -> np.ndarray:
    if isinstance(x, np.ma.MaskedArray):
        raise BadInput("A masked array was given. Wanted: rows without gaps. Fill them or leave such rows out.")
    if hasattr(x, "to_numpy"):
        return np.asarray(x.to_numpy())
    try:
        return np.asarray(x)
    except ValueError as error:
        raise BadInput(f"{type(x).__name__} cannot be read as a matrix ({error}). Give a 2-D array.") from error


def _check_matrix(x: Any) -> None:
    if len(x.shape) != 2:
        raise BadInput(
            f"An array of {len(x.shape)} dimensions {x.shape} was given. Wanted: rows x columns. Reshape it."
        )
    working_dtype(x.dtype)
    if x.shape[0] == 0 or x.shape[1] == 0:
        raise BadInput(f"An array of shape {x.shape} holds nothing. Wanted: at least one row and one column.")


def _dask_rows(x: Any) -> DaskRows:
    if any(math.isnan(length) for length in x.shape):
        x = x.compute_chunk_sizes()
        _check_matrix(x)
    if len(x.chunks[1]) > 1:
        x = x.rechunk({1: -1})
    return DaskRows(x, tuple(np.cumsum([0, *x.chunks[0]]).tolist()))


def _grouped(shape: tuple[int, ...], itemsize: int, unit_rows: int, block_bytes: int) -> tuple[int, ...]:
    """Bounds of blocks of whole units of `unit_rows`, as many as fit `block_bytes`, at least one."""
    units = max(1, block_bytes // max(1, unit_rows * shape[1] * itemsize))
    return (*range(0, shape[0], units * unit_rows), shape[0])
