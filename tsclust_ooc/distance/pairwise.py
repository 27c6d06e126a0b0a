"""Distances of all rows to all rows, block by block: what the blocks are, in which order, and one of them.

    group of stripes ──┐   Each block needs a stripe of rows on its left and one above. Stripes are kept: a group of
    x  1 4 7 ...       │   them on the left while those above go by, so that all rows are read once for each group,
    x  2 5 8 ...       │   and once in all when memory holds them.
    x  3 6 9 ...     ──┘

Invariant: a block depends on its rows and the metric, never on who computed it, when, or what was kept.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from tsclust_ooc.distance.dense import METRICS, Slab, UnusableRow, fill, slab, working_bytes
from tsclust_ooc.errors import UsageError
from tsclust_ooc.passes import Mapper, Rows, as_rows, one_blas_thread, working_dtype

BLOCK_BYTES = 16 * 2**20
"""Least bytes of a block; the most is four times this. Only a matrix that is smaller has a smaller block."""

Block = tuple[int, int]
"""A block by its place in the grid: (row of blocks, column of blocks)."""


@dataclass(frozen=True)
class Grid:
    """How an n_rows x n_columns matrix of distances is cut into blocks of at most `height` x `width`.

    `symmetric`: rows and columns are the same, so only blocks on the diagonal and right of it are computed.
    """

    n_rows: int
    n_columns: int
    height: int
    width: int
    symmetric: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        return math.ceil(self.n_rows / self.height), math.ceil(self.n_columns / self.width)

    @property
    def block_bytes(self) -> int:
        """Bytes of a whole block, float32."""
        return 4 * self.height * self.width

    @property
    def n_bytes(self) -> int:
        """Bytes of all blocks as stored: the last ones are stored whole."""
        down, across = self.shape
        return down * across * self.block_bytes

    def place(self, block: Block) -> tuple[slice, slice]:
        """Rows and columns of a block."""
        top, left = block[0] * self.height, block[1] * self.width
        return slice(top, min(top + self.height, self.n_rows)), slice(left, min(left + self.width, self.n_columns))

    def order(self, n_kept: int) -> list[Block]:
        """The blocks to compute, in the order that reads fewest rows when `n_kept` stripes are kept."""
        down, across = self.shape
        # Two places beside the group: for the stripe that goes by, and so that the next does not push out a kept one.
        size = down if n_kept >= (down if self.symmetric else down + across) else max(1, n_kept - 2)
        return [
            (row, column)
            for first in range(0, down, size)
            for column in range(first if self.symmetric else 0, across)
            for row in range(first, min(first + size, down))
            if not self.symmetric or row <= column
        ]


def grid(n_rows: int, n_columns: int | None = None, *, block_bytes: int = BLOCK_BYTES) -> Grid:
    """The blocks of an n x n matrix, or of an n x m one: square, of `block_bytes` to four times that."""
    height = _side(n_rows, block_bytes)
    if n_columns is None:
        return Grid(n_rows, n_rows, height, height, True)
    return Grid(n_rows, n_columns, height, _side(n_columns, block_bytes), False)


class Kept:
    """The stripes last used, at most `capacity` of them, shared by the threads of a process.

    A stripe in use is never dropped, so there may be more while more are in use. Pickled, it travels empty.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._lock = threading.Lock()
        self._entries: OrderedDict[Any, _Entry] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, (self.capacity,)

    @contextmanager
    def hold(self, key: Any, load: Callable[[], Slab]) -> Iterator[tuple[Slab, bool]]:
        """The stripe `key`, and whether it was loaded for this call; the first to ask loads, the others wait."""
        with self._lock:
            mine = key not in self._entries
            if mine:
                self._make_room()
            entry = self._entries.setdefault(key, _Entry())
            self._entries.move_to_end(key)
            entry.n_users += 1
        try:
            if mine:
                self._load(key, entry, load)
            yield entry.stripe.result(), mine
        finally:
            with self._lock:
                entry.n_users -= 1

    def _load(self, key: Any, entry: _Entry, load: Callable[[], Slab]) -> None:
        try:
            entry.stripe.set_result(load())
        except BaseException as error:
            with self._lock:
                del self._entries[key]
            entry.stripe.set_exception(error)

    def _make_room(self) -> None:
        for key in [key for key, entry in self._entries.items() if entry.n_users == 0]:
            if len(self._entries) < self.capacity:
                break
            del self._entries[key]


@dataclass
class _Entry:
    stripe: Future[Slab] = field(default_factory=Future)
    n_users: int = 0


@dataclass(frozen=True)
class Blocks:
    """Computes blocks of distances of the rows `x` to the rows `y`, or to each other when that is None.

    What is mapped over the blocks of `grid`; picklable when its rows are.
    """

    x: Rows
    y: Rows | None
    metric: str
    grid: Grid
    kept: Kept
    task_name: ClassVar[str] = "pairwise-block"

    def __call__(self, block: Block) -> np.ndarray:
        """One block, float32."""
        rows, columns = self.grid.place(block)
        out = np.empty((rows.stop - rows.start, columns.stop - columns.start), np.float32)
        self.fill(block, out)
        return out

    def fill(self, block: Block, out: np.ndarray) -> int:
        """Write one block into `out`; returns the bytes (as stored) that were read for it.

        Raises UnusableRow for rows with NaN or infinity, and for zero rows with the cosine metric.
        """
        rows, columns = self.grid.place(block)
        with self._stripe(rows, second=False) as (left, n_left), one_blas_thread:
            if self.y is None and rows == columns:
                fill(left, left, self.metric, out)
                return n_left
            with self._stripe(columns, second=self.y is not None) as (above, n_above):
                fill(left, above, self.metric, out)
        return n_left + n_above

    @contextmanager
    def _stripe(self, there: slice, *, second: bool) -> Iterator[tuple[Slab, int]]:
        rows = self.y if second and self.y is not None else self.x

        def load() -> Slab:
            try:
                return slab(read_rows(rows, there.start, there.stop), self.metric, there.start)
            except UnusableRow as error:
                raise UnusableRow(error.row, error.what, second) from None

        with self.kept.hold((second, there.start), load) as (found, fresh):
            yield found, rows.n_bytes * (there.stop - there.start) // rows.n_rows if fresh else 0


def pairwise(
    x: Any,
    y: Any = None,
    *,
    metric: str = "euclidean",
    out: Any = None,
    mapper: Mapper = map,
    memory_bytes: int = 2**28,
) -> Any:
    """Distances of every row of `x` to every row of `y`, or of `x`, as float32.

    Parameters
    ----------
    x, y
        Rows (n, columns) and (m, columns): numpy, dask or zarr arrays, or anything `passes.as_rows` takes.
    metric
        'euclidean', 'sqeuclidean', 'cosine' (1 - cosine) or 'cityblock'.
    out
        Where to write, shape (n, m): a numpy or zarr array, or anything that takes 2-D slices. Default: a new numpy
        array. Blocks are written by this thread alone, so any chunks will do.
    mapper
        Like builtin `map`, and runs blocks side by side: `passes.thread_mapper(n)`, or a runtime's.
    memory_bytes
        Stripes of rows are kept up to this size, so that they are not read again.

    Returns
    -------
    `out`. Relative errors are at most 1e-6 of the distances in float64; without `y` it is exactly symmetric and its
    diagonal is exactly zero.

    Raises
    ------
    UsageError
        An unknown metric, numbers of columns that differ, an `out` of another shape.
    BadInput
        Rows that are not finite or, for cosine, are zero (UnusableRow names the first); distances beyond float32.
    """
    rows, others = as_rows(x), None if y is None or y is x else as_rows(y)
    check_metric(metric)
    check_columns(rows, others)
    cells = grid(rows.n_rows, None if others is None else others.n_rows)
    if out is None:
        out = np.empty((cells.n_rows, cells.n_columns), np.float32)
    elif tuple(out.shape) != (cells.n_rows, cells.n_columns):
        raise UsageError(f"out has shape {tuple(out.shape)}, wanted {(cells.n_rows, cells.n_columns)}. Give such one.")
    n_kept = max(2, memory_bytes // stripe_bytes(cells, rows, others))
    todo = cells.order(n_kept)
    blocks = Blocks(rows, others, metric, cells, Kept(n_kept))
    with one_blas_thread:  # here as well as in each task, so that it is not set anew for each
        for block, values in zip(todo, mapper(blocks, todo), strict=True):
            there, columns = cells.place(block)
            out[there, columns] = values
            if cells.symmetric and there != columns:
                out[columns, there] = values.T
    return out


def check_metric(metric: str) -> None:
    """UsageError unless `metric` is known."""
    if metric not in METRICS:
        raise UsageError(f"metric {metric!r} is not known. Use one of: {', '.join(METRICS)}.")


def check_columns(x: Rows, y: Rows | None) -> None:
    """UsageError unless both have the same number of columns."""
    if y is not None and x.n_columns != y.n_columns:
        raise UsageError(
            f"x has {x.n_columns} columns and y has {y.n_columns}. Wanted: as many. Give rows of one kind."
        )


def read_rows(rows: Rows, start: int, stop: int) -> np.ndarray:
    """Rows start to stop, shape (stop - start, columns), float32 or float64; a view only of a whole block."""
    first, last = bisect_right(rows.bounds, start) - 1, bisect_right(rows.bounds, stop - 1) - 1
    if (start, stop) == (rows.bounds[first], rows.bounds[first + 1]):
        return rows.read(first)
    # Copied even from inside one block: a kept view would keep the whole block.
    out = np.empty((stop - start, rows.n_columns), working_dtype(rows.dtype))
    for block in range(first, last + 1):
        begin, end = max(start, rows.bounds[block]), min(stop, rows.bounds[block + 1])
        x = rows.read(block)[begin - rows.bounds[block] : end - rows.bounds[block]]
        out[begin - start : end - start] = x
    return out


def stripe_bytes(cells: Grid, x: Rows, y: Rows | None) -> int:
    """Bytes of the larger of a stripe of `x` and one of `y`, as kept."""
    left = cells.height * x.n_columns * working_dtype(x.dtype).itemsize
    above = 0 if y is None else cells.width * y.n_columns * working_dtype(y.dtype).itemsize
    return max(left, above)


def task_bytes(cells: Grid, x: Rows, y: Rows | None) -> int:
    """Most bytes a task holds besides stripes: a block, what computing it takes, and a block of rows as it is read."""
    read = max(
        (r.bounds[1] - r.bounds[0]) * (r.n_bytes // r.n_rows + r.n_columns * working_dtype(r.dtype).itemsize)
        for r in (x, x if y is None else y)
    )
    return cells.block_bytes + read + working_bytes(max(cells.height, cells.width), x.n_columns)


def _side(n: int, block_bytes: int) -> int:
    least = max(1, math.isqrt(block_bytes // 4))
    return math.ceil(n / max(1, n // least))
