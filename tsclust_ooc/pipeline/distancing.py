"""distances: a dataset's rows into a published matrix of their distances."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from tsclust_ooc import files, matrix
from tsclust_ooc.budget import BASE_BYTES
from tsclust_ooc.dataset import VIEWS, Dataset, open_dataset
from tsclust_ooc.distance.dense import METRICS, UnusableRow
from tsclust_ooc.distance.pairwise import Block, Blocks, Grid, Kept, grid, stripe_bytes, task_bytes
from tsclust_ooc.errors import BadInput, CannotWrite, UsageError
from tsclust_ooc.matrix import Matrix, MatrixPlan, MatrixWork, Spent
from tsclust_ooc.passes import one_blas_thread
from tsclust_ooc.pipeline import describing
from tsclust_ooc.pipeline.options import ComputeOptions
from tsclust_ooc.pipeline.session import Session, check_apart, session
from tsclust_ooc.progress import Listener, silent
from tsclust_ooc.rows import DatasetRows
from tsclust_ooc.runtime import LEAST_WORKER_BYTES, ClusterSpec, Runtime, worker_bytes
from tsclust_ooc.units import format_bytes, format_count, parse_bytes, plural

_SPARE = 1.02  # of the disk: metadata, receipts, folders


@dataclass(frozen=True)
class DistancesOptions(ComputeOptions):
    """Options of distances.

    Attributes
    ----------
    split
        Split whose rows are compared. Default: train if there is one, else the only one.
    against
        Split they are compared with. Default: with each other, which computes half of the matrix.
    metric
        'euclidean', 'sqeuclidean', 'cosine' (1 - cosine) or 'cityblock'.
    view
        How a sample becomes rows: 'flatten' (variable x feature columns), 'variable' (one row a variable), or 'mean'.
    block_bytes
        Least size of a stored block, like 16MiB; the most is four times this.
    """

    split: str | None = None
    against: str | None = None
    metric: str = "euclidean"
    view: str = "flatten"
    block_bytes: str = "16MiB"

    def __post_init__(self) -> None:
        for name, value, known in (("view", self.view, VIEWS), ("metric", self.metric, METRICS)):
            if value not in known:
                raise UsageError(f"--{name} {value} is not known. Use one of: {', '.join(known)}.")
        if parse_bytes(self.block_bytes) < 4:
            raise UsageError(f"--block-bytes {self.block_bytes} does not hold one distance. Use 16MiB.")


DEFAULTS = DistancesOptions()


@dataclass(frozen=True)
class Distanced:
    """Result of distances. `n_computed` counts the blocks computed now, `n_blocks` all that needed computing.

    `bytes` are those of the matrix as stored; paths are absolute.
    """

    distances: str
    n_rows: int
    n_columns: int
    metric: str
    n_blocks: int
    n_computed: int
    bytes: int
    bytes_read: int
    seconds: float
    peak_bytes: int
    dashboard: str
    digest: str
    reused: bool


def distances(
    dataset: str | Path,
    out: str | Path,
    options: DistancesOptions = DEFAULTS,
    listener: Listener = silent,
) -> Distanced:
    """Distances of the rows of one split to each other or to those of another, published as one zarr array.

    Raises BadInput for rows that have no distance (the shard and row are named), CannotWrite when the disk, the
    memory or the name does not allow it, TryAgain when another process is making it.
    """
    opened = open_dataset(dataset)
    final = Path(out).expanduser().absolute()
    check_apart(final, opened.path)
    _splits(opened, options)
    with session(final, "distances", "made", options, listener) as held:
        work = _Work(held, opened, options)
        return work.reuse() or work.compute()


class _Work:
    """One distances command at work: its rows and its plan."""

    def __init__(self, held: Session, opened: Dataset, options: DistancesOptions) -> None:
        self.held, self.opened, self.options = held, opened, options
        self.final, self.limits, self.listener = held.final, held.limits, held.listener
        self.split, self.against = _splits(opened, options)
        self.x = opened[self.split].rows(options.view)
        self.y = opened[self.against].rows(options.view) if self.against else None
        self.grid = self._grid(self.x, self.y)
        plan = MatrixPlan(
            opened.manifest.digest, self.split, self.against, options.view, options.metric,
            (self.grid.n_rows, self.grid.n_columns), (self.grid.height, self.grid.width),
        )  # fmt: skip
        self.work = matrix.work_for(self.final, plan)

    def reuse(self) -> Distanced | None:
        """The published matrix, if it is just this one."""
        found = matrix.existing(self.final, self.work.plan, overwrite=self.options.overwrite)
        if found is None:
            return None
        matrix.sweep(self.final)
        return self._distanced(found, n_computed=0, dashboard="", reused=True)

    def compute(self) -> Distanced:
        """Compute the blocks that are missing, publish."""
        n_workers, n_kept = self._fit()
        blocks = self.grid.order(n_kept)
        matrix.drop_spent(self.work)
        todo = [block for block in blocks if not matrix.is_done(self.work, block)]
        self._check_disk(1 - len(todo) / len(blocks))
        matrix.init(self.work)
        if len(todo) < len(blocks):
            self.listener.say(f"going on: {format_count(len(blocks) - len(todo))} of {len(blocks):,} blocks are there")
        with self.held.runtime(n_workers) as runtime, self._naming_rows():
            bytes_read = self._run(runtime, todo, n_kept, len(blocks))
            spent = Spent(
                str(self.opened.path), self.options.scheduler, runtime.n_workers, bytes_read,
                round(self.held.meter.elapsed(), 4), self.held.meter.peak_bytes,
            )  # fmt: skip
            found = matrix.finalize(self.work, blocks, spent, replace=self.options.overwrite)
            return self._distanced(found, n_computed=len(todo), dashboard=runtime.dashboard, reused=False)

    def _run(self, runtime: Runtime, todo: list[Block], n_kept: int, n_blocks: int) -> int:
        task = BlockTask(Blocks(self.x, self.y, self.options.metric, self.grid, Kept(n_kept)), self.work)
        bytes_read = 0
        with one_blas_thread:  # here as well as in each task, so that it is not set anew for each
            for done, n_bytes in enumerate(runtime.mapper(task, todo), start=n_blocks - len(todo) + 1):
                bytes_read += n_bytes
                self.listener.advance("distances", done, n_blocks)
        return bytes_read

    def _grid(self, x: DatasetRows, y: DatasetRows | None) -> Grid:
        n_columns = None if y is None else y.n_rows
        return grid(x.n_rows, n_columns, block_bytes=parse_bytes(self.options.block_bytes))

    def _fit(self) -> tuple[int, int]:
        """Workers, and stripes each process keeps; CannotWrite when the memory does not hold one worker's blocks."""
        need, spec = _need(self.grid, self.x, self.y), self.held.spec()
        for n_workers in range(spec.n_workers, 0, -1):
            n_kept = need.kept(spec, n_workers)
            if n_kept:
                return n_workers, n_kept
        if spec.scheduler == "slurm":
            self.held.workers_that_fit(need.task + min(2, need.n_stripes) * need.stripe, self._what())
        wanted = need.least_memory(self.options.scheduler)
        raise CannotWrite(
            f"{self._what()} need {format_bytes(wanted)} of memory with one worker (a block and its mirror image of "
            f"{format_bytes(self.grid.block_bytes)} each, two stripes of rows of {format_bytes(need.stripe)}, and "
            f"{format_bytes(need.task - self.grid.block_bytes)} to work in), and --memory allows "
            f"{format_bytes(self.limits.memory_bytes)}. Use: {', '.join(self._smaller_memory(wanted))}."
        )

    def _smaller_memory(self, wanted: int) -> list[str]:
        """What would fit the memory."""
        found = [f"--memory {format_bytes(1.05 * wanted).replace(' ', '')}"]
        for view in VIEWS[::-1]:
            x = self.opened[self.split].rows(view)
            y = self.opened[self.against].rows(view) if self.against else None
            least = _need(self._grid(x, y), x, y).least_memory(self.options.scheduler)
            if least <= self.limits.memory_bytes and view != self.options.view and x.n_columns < self.x.n_columns:
                found.append(f"--view {view} ({format_bytes(least)})")
                break
        return found if len(found) > 1 else [*found, "or a smaller --block-bytes"]

    def _check_disk(self, done: float) -> None:
        """CannotWrite when what is still to be written does not fit the disk."""
        need, free = self.grid.n_bytes * (1 - done) * _SPARE, files.free_bytes(self.final)
        if free < need:
            place = files.existing_parent(self.final)
            raise CannotWrite(
                f"{self._what()} need {format_bytes(need)}; {place} has {format_bytes(free)} free. "
                f"Use: {', '.join(self._smaller_disk(free))}or a place with more room."
            )

    def _smaller_disk(self, free: float) -> list[str]:
        """What would fit the disk, each word with its size; ends with nothing or a comma."""
        options, found = self.options, []
        if options.view == "variable":
            x = self.opened[self.split].rows("mean")
            y = self.opened[self.against].rows("mean") if self.against else None
            found.append(("--view mean", self._grid(x, y).n_bytes))
        for name, split in self.opened.items():
            x = split.rows(options.view)
            if split.n_samples and x.n_rows < self.x.n_rows:
                found.append((f"--split {name}", self._grid(x, self.y).n_bytes))
        return [f"{words} ({format_bytes(size)})" for words, size in found if size * _SPARE <= free] + [""]

    def _what(self) -> str:
        rows = plural(self.x.n_rows, "row")
        return f"distances of {rows}" + (f" to {format_count(self.y.n_rows)}" if self.y is not None else "")

    @contextlib.contextmanager
    def _naming_rows(self) -> Iterator[None]:
        """Say which shard a row that cannot be used came from."""
        try:
            yield
        except UnusableRow as error:
            split = self.against if error.second else self.split
            where = describing.origin(self.opened[split], self.options.view, error.row)
            raise BadInput(f"{split}: row {error.row} {error.what} {where}") from error

    def _distanced(self, found: Matrix, *, n_computed: int, dashboard: str, reused: bool) -> Distanced:
        made, plan = found.manifest, found.manifest.plan
        return Distanced(
            distances=str(found.path / matrix.STORE), n_rows=plan.shape[0], n_columns=plan.shape[1],
            metric=plan.metric, n_blocks=len(self.grid.order(1)), n_computed=n_computed,
            bytes=sum(entry.n_bytes for entry in made.files.values()), bytes_read=made.bytes_read,
            seconds=made.seconds, peak_bytes=made.peak_bytes, dashboard=dashboard, digest=made.digest, reused=reused,
        )  # fmt: skip


@dataclass(frozen=True)
class _Need:
    """Bytes that distances take: a `stripe` of rows as kept, and a `task` besides; `n_stripes` there are in all."""

    stripe: int
    task: int
    n_stripes: int

    def kept(self, spec: ClusterSpec, n_workers: int) -> int:
        """Stripes that each process can keep with so many workers, 0 when the tasks themselves do not fit.

        Threads share what is kept; a worker process has its own, and the interpreter besides.
        """
        n_threads, room = 1, spec.memory_bytes - BASE_BYTES
        if spec.threaded:
            n_threads = n_workers
        elif spec.scheduler == "local":
            room = room // n_workers - LEAST_WORKER_BYTES
        elif spec.scheduler == "slurm":
            room = worker_bytes(spec) - LEAST_WORKER_BYTES
        else:  # what its workers may use is known when they are met; two stripes are what a block needs
            return min(2, self.n_stripes)
        n_kept = (room - n_threads * self.task) // self.stripe
        # Each task holds two; with fewer than that kept, what is in use would go beyond.
        return min(n_kept, self.n_stripes) if n_kept >= min(2 * n_threads, self.n_stripes) else 0

    def least_memory(self, scheduler: str) -> int:
        """The --memory with which one worker fits."""
        process = 0 if scheduler == "threads" else LEAST_WORKER_BYTES
        return BASE_BYTES + process + self.task + min(2, self.n_stripes) * self.stripe


def _need(cells: Grid, x: DatasetRows, y: DatasetRows | None) -> _Need:
    down, across = cells.shape
    task = task_bytes(cells, x, y) + cells.block_bytes  # the mirror image, or the block as it is written
    return _Need(stripe_bytes(cells, x, y), task, down if y is None else down + across)


@dataclass(frozen=True)
class BlockTask:
    """Computes one block and writes it; returns the bytes read for it."""

    blocks: Blocks
    work: MatrixWork
    task_name: ClassVar[str] = Blocks.task_name

    def __call__(self, block: Block) -> int:
        """Compute and write `block`."""
        rows, columns = self.blocks.grid.place(block)
        values = _buffer((self.blocks.grid.height, self.blocks.grid.width))
        filled = values[: rows.stop - rows.start, : columns.stop - columns.start]
        if filled.shape != values.shape:
            values.fill(np.nan)  # a block at the edge is stored whole
        n_bytes = self.blocks.fill(block, filled)
        matrix.write_block(self.work, block, values)
        return n_bytes


_buffers = threading.local()


def _buffer(shape: tuple[int, int]) -> np.ndarray:
    """This thread's block, used again and again: fresh pages cost as much as the copy into them."""
    have = getattr(_buffers, "array", None)
    if have is None or have.shape != shape:
        _buffers.array = have = np.empty(shape, np.float32)
    assert isinstance(have, np.ndarray)
    return have


def _splits(opened: Dataset, options: DistancesOptions) -> tuple[str, str]:
    """The split to compare and the one to compare it with, '' for itself."""
    filled = [name for name, split in opened.items() if split.n_samples]
    if not filled:
        raise BadInput(f"{opened.path} holds no samples. Consolidate shards that have some.")
    for flag, asked in (("split", options.split), ("against", options.against)):
        if asked is not None and asked not in filled:
            raise UsageError(f"--{flag} {asked}: {opened.path} has no such rows. Use one of: {', '.join(filled)}.")
    split = options.split or ("train" if "train" in filled else filled[0])
    return split, options.against if options.against not in (None, split) else ""
