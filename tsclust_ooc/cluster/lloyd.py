"""Lloyd's algorithm over passes: one read of all rows an iteration, and results that belong together.

Invariant: labels, distances and inertia of a `Fit` are those of its centers, exactly; centers are kept in the type the
rows are read as, so saving and loading them changes no label. A fit that goes on from a `State` of another one ends as
that would have ended, bit for bit.

Stopping follows scikit-learn: `tol` is relative to the mean variance of the columns, and labels that did not change
end the loop at once. Cosine is spherical k-means (Dhillon & Modha 2001, Machine Learning 42): rows and centers have
unit length, a center is the direction of its rows' sum, and the squared distance is 2 * (1 - cosine).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tsclust_ooc.cluster.fused import Assigned, Metric, check_rows, fused, unit
from tsclust_ooc.errors import BadInput, UsageError
from tsclust_ooc.passes import Mapper, Rows, Sink, Tally, gather, one_pass, working_dtype
from tsclust_ooc.units import format_count, plural


@dataclass(frozen=True)
class PassInfo:
    """One pass: its number from 1, inertia to the centers it read with, fraction of rows whose label changed."""

    number: int
    inertia: float
    moved: float
    seconds: float
    bytes_read: int


@dataclass(frozen=True)
class State:
    """All that the rest of a fit depends on, besides rows and options: what is known between two passes.

    centers (k, columns), in the type the rows are read as, to read with next; labels (rows,) int32 of the latest pass,
    -1 before the first; n_iter, updates so far; settled, whether the centers stand still within `tol`, so that one
    last pass is left; total_ss and threshold, 0 before the first update; n_passes and bytes_read of this fit so far.

    The latest labels are kept because the next pass counts those that change, which decides when to stop. Reading them
    again from the centers before would cost a pass of all columns; kept, they take at most 4 bytes a row.
    """

    centers: np.ndarray
    labels: np.ndarray
    n_iter: int = 0
    settled: bool = False
    total_ss: float = 0.0
    threshold: float = 0.0
    n_passes: int = 0
    bytes_read: int = 0
    history: tuple[PassInfo, ...] = ()


@dataclass(frozen=True)
class Fit:
    """Centers and what they give.

    centers (k, columns) float32 or float64; labels (rows,) int32; distances (rows,), squared, to the row's own center
    (for cosine 2 * (1 - cosine)); sizes (k,) rows of each center; inertia, the sum of squared distances; total_ss, the
    sum of squared distances to the mean; n_iter, updates of the centers; n_passes, reads of all rows.
    """

    centers: np.ndarray
    labels: np.ndarray
    distances: np.ndarray
    sizes: np.ndarray
    inertia: float
    total_ss: float
    n_iter: int
    n_passes: int
    converged: bool
    history: tuple[PassInfo, ...]


def lloyd(
    rows: Rows,
    centers: np.ndarray,
    *,
    metric: Metric = "euclidean",
    max_iter: int = 300,
    tol: float = 1e-4,
    mapper: Mapper = map,
    tally: Tally | None = None,
    on_pass: Callable[[PassInfo], None] | None = None,
    resume: State | None = None,
    on_state: Callable[[State], None] | None = None,
) -> Fit:
    """Move `centers`, shape (k, columns), until no label changes, they stand still within `tol`, or `max_iter` updates.

    Reads all rows once an update, and once more when it ends before labels stop changing. A center without rows moves
    to the farthest row (as scikit-learn does); reading that row may count as a pass where rows are few.

    `on_state` receives the state before the first pass and after each one that is not the last. Its labels are
    overwritten by the pass after the next: save or copy them, or keep the newest state alone. With `resume`, a state
    of a fit of the same rows with the same options, the fit goes on from there: `centers` are not looked at, and the
    passes that led to the state are added to `tally`.

    Raises NonFiniteRows, ZeroRows (cosine), BadInput (fewer distinct rows than centers, or a state that does not fit
    the rows), UsageError (options).
    """
    _check_options(max_iter, tol)
    run = _Run(rows, metric, mapper, tally or Tally(), on_pass, on_state)
    start = starting_centers(rows, centers if resume is None else resume.centers, metric)
    state = run.begin(start) if resume is None else run.go_on(resume)
    while not state.settled and state.n_iter < max_iter:
        found, n_moved = run.assign(state.centers)
        updated = _updated(run, found, state.centers)
        if n_moved == 0 and np.array_equal(updated, state.centers):
            return run.fit(replace(state, n_iter=state.n_iter + 1), found, converged=True)
        state = run.told(_next(run, state, found, updated, tol))
    found, _ = run.assign(state.centers)
    return run.fit(state, found, converged=state.settled)


def assign(
    rows: Rows,
    centers: np.ndarray,
    *,
    metric: Metric = "euclidean",
    mapper: Mapper = map,
    tally: Tally | None = None,
    sink: Sink | None = None,
) -> tuple[float, np.ndarray]:
    """Inertia and rows of each center, shape (k,), for fixed `centers`; one pass.

    `sink(start, (labels, squared distances))` receives each block. Raises NonFiniteRows and, for cosine, ZeroRows.
    """
    centers = starting_centers(rows, centers, metric)
    kernel = fused(centers, metric, working_dtype(rows.dtype))
    found = one_pass(kernel, rows, mapper=mapper, tally=tally, sink=sink)
    check_rows(found, rows.n_rows)
    return found.inertia, found.counts


def starting_centers(rows: Rows, centers: np.ndarray, metric: Metric) -> np.ndarray:
    """`centers` checked against `rows`, in the type rows are read as, of unit length for cosine."""
    if metric not in ("euclidean", "cosine"):
        raise UsageError(f"metric {metric!r} is not known. Use 'euclidean' or 'cosine'.")
    centers = np.asarray(centers)
    if centers.ndim != 2 or centers.shape[1] != rows.n_columns or len(centers) == 0:
        raise BadInput(
            f"Centers of shape {centers.shape} do not fit rows of {plural(rows.n_columns, 'column')}. "
            f"Wanted: (n_clusters, {rows.n_columns})."
        )
    working_dtype(centers.dtype)
    if not np.isfinite(centers).all():
        raise BadInput("The centers hold NaN or infinite values. Wanted: finite numbers.")
    if metric == "cosine":
        if not centers.any(axis=1).all():
            raise BadInput("A center is all zero and has no direction for the cosine metric. Give another one.")
        centers = unit(centers.astype(np.float64))
    return centers.astype(working_dtype(rows.dtype))


def total_sum_of_squares(found: Assigned, centers: np.ndarray) -> float:
    """Sum of squared distances of the rows to their mean, from one pass with any `centers`.

    Within plus between clusters, each measured around means: no difference of large numbers where data are offset.
    """
    filled = found.counts > 0
    counts = found.counts[filled, None]
    means = found.sums[filled] / counts
    mean = found.sums.sum(axis=0) / counts.sum()
    within = found.inertia - float((counts * (centers[filled] - means) ** 2).sum())
    return max(within, 0.0) + float((counts * (means - mean) ** 2).sum())


@dataclass
class _Run:
    """The passes of one fit: where the labels of the latest one and of the one before live, and what each cost."""

    rows: Rows
    metric: Metric
    mapper: Mapper
    tally: Tally
    on_pass: Callable[[PassInfo], None] | None
    on_state: Callable[[State], None] | None
    labels: np.ndarray = field(init=False)
    distances: np.ndarray = field(init=False)
    history: list[PassInfo] = field(init=False, default_factory=list)
    n_moved: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        # Two arrays in turn: while a pass is under way the labels of the one before are whole, and can be saved.
        self.labels, self._before = (np.full(self.rows.n_rows, -1, np.int32) for _ in range(2))
        self.distances = np.empty(self.rows.n_rows, working_dtype(self.rows.dtype))
        self._passes_before, self._bytes_before = self.tally.n_passes, self.tally.bytes_read

    def begin(self, centers: np.ndarray) -> State:
        """The state before the first pass."""
        return self.told(State(centers, self.labels))

    def go_on(self, state: State) -> State:
        """Take over what led to `state`; BadInput when it is of other rows."""
        dtype = working_dtype(self.rows.dtype)
        if state.centers.dtype != dtype or state.labels.shape != self.labels.shape:
            raise BadInput(
                f"A state with {state.centers.dtype} centers and {plural(len(state.labels), 'label')} was given. "
                f"Wanted: {dtype} and {plural(self.rows.n_rows, 'label')}. Give one of a fit of these rows."
            )
        self.labels[:] = state.labels
        self.history = list(state.history)
        self.tally.n_passes += state.n_passes
        self.tally.bytes_read += state.bytes_read
        return state

    def told(self, state: State) -> State:
        """`state`, which the listener has heard of."""
        if self.on_state is not None:
            self.on_state(state)
        return state

    def spent(self) -> tuple[int, int]:
        """Passes and bytes of this fit so far."""
        return self.tally.n_passes - self._passes_before, self.tally.bytes_read - self._bytes_before

    def fit(self, state: State, found: Assigned, *, converged: bool) -> Fit:
        """The result, when the latest pass read with the centers of `state` and gave `found`."""
        return Fit(
            state.centers, self.labels, self.distances, found.counts, found.inertia, state.total_ss, state.n_iter,
            self.spent()[0], converged, tuple(self.history),
        )  # fmt: skip

    def assign(self, centers: np.ndarray) -> tuple[Assigned, int]:
        """One pass: labels and distances are overwritten; returns the sums and how many labels changed."""
        began, read_before = time.perf_counter(), self.tally.bytes_read
        self.n_moved = 0
        self.labels, self._before = self._before, self.labels
        kernel = fused(centers, self.metric, working_dtype(self.rows.dtype))
        found = one_pass(kernel, self.rows, mapper=self.mapper, tally=self.tally, sink=self._take)
        check_rows(found, self.rows.n_rows)
        info = PassInfo(
            number=len(self.history) + 1,
            inertia=found.inertia,
            moved=self.n_moved / self.rows.n_rows,
            seconds=time.perf_counter() - began,
            bytes_read=self.tally.bytes_read - read_before,
        )
        self.history.append(info)
        if self.on_pass is not None:
            self.on_pass(info)
        return found, self.n_moved

    def _take(self, start: int, per_row: tuple[np.ndarray, np.ndarray]) -> None:
        labels, distances = per_row
        there = slice(start, start + len(labels))
        self.n_moved += int(np.count_nonzero(self._before[there] != labels))
        self.labels[there] = labels
        self.distances[there] = distances


def _next(run: _Run, state: State, found: Assigned, updated: np.ndarray, tol: float) -> State:
    """The state after a pass with the centers of `state` gave `found`, from which came the centers `updated`."""
    total_ss, threshold = state.total_ss, state.threshold
    if state.n_iter == 0:
        total_ss = total_sum_of_squares(found, state.centers)
        threshold = tol * total_ss / (run.rows.n_rows * run.rows.n_columns)
    shift = float(((updated.astype(np.float64) - state.centers) ** 2).sum())
    n_passes, bytes_read = run.spent()
    return State(
        updated, run.labels, state.n_iter + 1, shift <= threshold, total_ss, threshold, n_passes, bytes_read,
        tuple(run.history),
    )  # fmt: skip


def _check_options(max_iter: int, tol: float) -> None:
    if max_iter < 1:
        raise UsageError(f"max_iter={max_iter} moves no center. Use 1 or more.")
    if not tol >= 0:
        raise UsageError(f"tol={tol} is not a tolerance. Use 0 or more.")


def _updated(run: _Run, found: Assigned, centers: np.ndarray) -> np.ndarray:
    """Centers of the rows assigned to them; one whose rows cancel (cosine), or that has none, stays where it was."""
    found = _relocated(run, found) if (found.counts == 0).any() else found
    kept = centers.astype(np.float64)
    means = np.divide(found.sums, found.counts[:, None], out=kept.copy(), where=found.counts[:, None] > 0)
    if run.metric == "cosine":
        norms = np.linalg.norm(means, axis=1, keepdims=True)
        means = np.divide(means, norms, out=kept, where=norms > np.finfo(centers.dtype).eps)
    updated: np.ndarray = means.astype(centers.dtype)
    return updated


def _relocated(run: _Run, found: Assigned) -> Assigned:
    """Give each empty cluster one of the farthest rows, taken from the sum of the cluster that had it.

    Raises BadInput when every row already lies on its center: there are no more distinct rows to give.
    """
    empty = np.flatnonzero(found.counts == 0)
    far, distances, counts = _spare_rows(run.labels, found, len(empty))
    order = np.argsort(far)
    x = np.empty((len(far), run.rows.n_columns))
    x[order] = gather(run.rows, far[order], mapper=run.mapper, tally=run.tally)
    x = unit(x) if run.metric == "cosine" else x
    apart = distances > rounding_floor(x, run.distances.dtype, run.rows.n_rows)
    if not apart.any():
        filled = len(counts) - len(empty)
        raise BadInput(
            f"{plural(len(counts), 'cluster')} were asked for, but the {format_count(run.rows.n_rows)} rows hold only "
            f"{format_count(filled)} distinct ones. Use n_clusters <= {filled}."
        )
    sums, counts = found.sums.copy(), found.counts.copy()
    for cluster, row, values in zip(empty, far[apart], x[apart], strict=False):
        donor = run.labels[row]
        sums[donor] -= values
        sums[cluster] = values
        counts[donor] -= 1
        counts[cluster] = 1
    return replace(found, sums=sums, counts=counts)


def _spare_rows(labels: np.ndarray, found: Assigned, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `n` farthest rows whose clusters keep at least one row without them, their squared distances, and counts."""
    counts = found.counts.copy()
    chosen: list[int] = []
    for at, row in enumerate(found.far_rows):
        if len(chosen) < n and counts[labels[row]] > 1:
            counts[labels[row]] -= 1
            chosen.append(at)
    return found.far_rows[chosen], found.far_distances[chosen], counts


def rounding_floor(x: np.ndarray, dtype: np.dtype[Any], n_summed: int = 0) -> np.ndarray:
    """Squared distance, per row, that rounding alone explains: to an equal row of `dtype`, or a mean of `n_summed`."""
    relative = float(np.finfo(dtype).eps) + n_summed * float(np.finfo(np.float64).eps)
    norms: np.ndarray = np.einsum("ij,ij->i", x, x, dtype=np.float64)
    return relative**2 * norms
