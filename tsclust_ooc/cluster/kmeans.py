"""KMeans: the estimator of `dask_ml.cluster.KMeans`, over one fused pass an iteration.

Invariant: a thin shell. What it does is in `starts` and `lloyd`; what it keeps after `fit` belongs together: labels and
inertia are those of `cluster_centers_`, exactly.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from tsclust_ooc import extras
from tsclust_ooc.budget import available_cores
from tsclust_ooc.cluster.fused import Metric, check_rows, fused, unit
from tsclust_ooc.cluster.lloyd import Fit, PassInfo, assign, lloyd
from tsclust_ooc.cluster.starts import N_ROUNDS, SAMPLE_BYTES, Start, check_k, initial_centers
from tsclust_ooc.errors import BadInput, UsageError
from tsclust_ooc.passes import DaskRows, Mapper, Rows, Tally, as_rows, thread_mapper, working_dtype


class KMeans:
    """K-means of rows that need not fit in memory. A drop-in for `dask_ml.cluster.KMeans`.

    Parameters
    ----------
    n_clusters : int
        Number of clusters.
    init : {'auto', 'k-means||', 'k-means++', 'random'} or array of shape (n_clusters, columns)
        Where to start, see `starts.initial_centers`. The one default that differs from dask-ml's ('k-means||'): 'auto'
        clusters a sample first, reads the data once, and ends at least as well.
    oversampling_factor : float
        k-means||: candidates a round, as a multiple of `n_clusters`.
    max_iter : int
        Updates of the centers, at most.
    tol : float
        Stop when the squared movement of all centers is below `tol` times the mean variance of the columns, as
        scikit-learn does (dask-ml's is absolute).
    random_state : int, numpy RandomState, numpy Generator, or None
        Seed of the start; None draws a fresh one.
    init_max_iter : int, optional
        k-means||: rounds, 5 by default.
    n_init : 'auto' or int
        Starts to try; the least inertia wins. 'auto' is 1.
    precompute_distances, copy_x, n_jobs : ignored
        Accepted for compatibility. Nothing is copied and distances are never stored.
    algorithm : {'full', 'lloyd', 'auto'}
        Lloyd's, by each of its names.
    metric : {'euclidean', 'cosine'}
        'cosine' is spherical k-means: rows and centers have unit length.
    mapper : callable, optional
        Runs the blocks: called like builtin `map`, gives results in order. Default: threads, one a core.
    sample_bytes : int
        Most memory a sample for the start may take.
    on_pass : callable, optional
        Called with a `PassInfo` after each pass of the fit.

    Attributes
    ----------
    cluster_centers_ : (n_clusters, columns) float32 or float64, as the rows are read (float16 as float32).
    labels_ : (rows,) int32; a dask array when X is one.
    inertia_ : float, sum of squared distances of the rows to their centers.
    n_iter_, n_features_in_ : int
    n_passes_, bytes_read_ : int, reads of all rows and bytes as stored, start included.
    history_ : tuple of PassInfo, one a pass.

    Errors are of `tsclust_ooc.errors`: BadInput for data (NonFiniteRows and ZeroRows name the first row; both are
    ValueErrors too), UsageError for parameters.
    """

    _estimator_type = "clusterer"

    def __init__(
        self,
        n_clusters: int = 8,
        init: Any = "auto",
        oversampling_factor: float = 2,
        max_iter: int = 300,
        tol: float = 0.0001,
        precompute_distances: Any = "auto",
        random_state: Any = None,
        copy_x: bool = True,
        n_jobs: int = 1,
        algorithm: str = "full",
        init_max_iter: int | None = None,
        n_init: Any = "auto",
        *,
        metric: Metric = "euclidean",
        mapper: Mapper | None = None,
        sample_bytes: int = SAMPLE_BYTES,
        on_pass: Callable[[PassInfo], None] | None = None,
    ) -> None:
        """Keep the parameters as given; `fit` checks them."""
        self.n_clusters = n_clusters
        self.init = init
        self.oversampling_factor = oversampling_factor
        self.max_iter = max_iter
        self.tol = tol
        self.precompute_distances = precompute_distances
        self.random_state = random_state
        self.copy_x = copy_x
        self.n_jobs = n_jobs
        self.algorithm = algorithm
        self.init_max_iter = init_max_iter
        self.n_init = n_init
        self.metric = metric
        self.mapper = mapper
        self.sample_bytes = sample_bytes
        self.on_pass = on_pass

    def fit(self, X: Any, y: Any = None) -> KMeans:  # noqa: ARG002
        """Cluster the rows of `X`: a numpy, zarr or dask array of shape (rows, columns), or `passes.Rows`."""
        _check_algorithm(self.algorithm)
        rows, tally = as_rows(X), Tally()
        check_k(self.n_clusters, rows.n_rows)
        with _running(self.mapper) as (mapper, local):
            fits = (self._fit_once(rows, seed, mapper, local, tally) for seed in self._seeds())
            best = min(fits, key=lambda fit: fit.inertia)
        self.cluster_centers_ = best.centers
        self.labels_ = _like(X, rows, best.labels)
        self.inertia_ = best.inertia
        self.n_iter_ = best.n_iter
        self.n_features_in_ = rows.n_columns
        self.n_passes_, self.bytes_read_ = tally.n_passes, tally.bytes_read
        self.history_ = best.history
        return self

    def fit_predict(self, X: Any, y: Any = None) -> Any:  # noqa: ARG002
        """Fit, and return `labels_`."""
        return self.fit(X).labels_

    def fit_transform(self, X: Any, y: Any = None) -> Any:  # noqa: ARG002
        """Fit, and return `transform(X)`."""
        return self.fit(X).transform(X)

    def predict(self, X: Any) -> Any:
        """Label of the nearest center of each row, (rows,) int32; lazy when `X` is a dask array."""
        rows = self._rows(X)
        if isinstance(rows, DaskRows):
            return rows.array.map_blocks(
                _Labels(self.cluster_centers_, self.metric), dtype=np.int32, drop_axis=1, meta=np.empty(0, np.int32)
            )
        labels = np.empty(rows.n_rows, np.int32)

        def keep(start: int, per_row: tuple[np.ndarray, np.ndarray]) -> None:
            labels[start : start + len(per_row[0])] = per_row[0]

        with _running(self.mapper) as (mapper, _):
            assign(rows, self.cluster_centers_, metric=self.metric, mapper=mapper, sink=keep)
        return labels

    def transform(self, X: Any, y: Any = None) -> Any:  # noqa: ARG002
        """Euclidean distance of each row to each center, (rows, n_clusters) in the rows' float type; lazy for dask.

        With metric 'cosine' between unit rows and unit centers: the square root of 2 * (1 - cosine).
        """
        rows = self._rows(X)
        dtype, k = working_dtype(rows.dtype), len(self.cluster_centers_)
        distances = _Distances(self.cluster_centers_, self.metric)
        if isinstance(rows, DaskRows):
            chunks = (rows.array.chunks[0], (k,))
            return rows.array.map_blocks(distances, dtype=dtype, chunks=chunks, meta=np.empty((0, 0), dtype))
        found = np.empty((rows.n_rows, k), dtype)
        with _running(self.mapper) as (mapper, _):
            blocks = mapper(_OfBlock(distances, rows), range(len(rows.bounds) - 1))
            for start, block in zip(rows.bounds, blocks, strict=False):
                found[start : start + len(block)] = block
        return found

    def get_params(self, deep: bool = True) -> dict[str, Any]:  # noqa: ARG002
        """Constructor parameters by name (scikit-learn's protocol)."""
        return {name: getattr(self, name) for name in _PARAMETERS}

    def set_params(self, **params: Any) -> KMeans:
        """Set constructor parameters by name; UsageError for an unknown one."""
        for name, value in params.items():
            if name not in _PARAMETERS:
                raise UsageError(f"KMeans has no parameter {name!r}. Use one of {', '.join(_PARAMETERS)}.")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        """The call that makes it, parameters at their defaults left out."""
        changed = (f"{name}={getattr(self, name)!r}" for name in _PARAMETERS if not self._is_default(name))
        return f"KMeans({', '.join(changed)})"

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn's pipelines ask of a step; only they call this, so only then is it imported."""
        tags = extras.load("sklearn.utils")
        return tags.Tags(
            estimator_type="clusterer",
            target_tags=tags.TargetTags(required=False),
            transformer_tags=tags.TransformerTags(),
        )

    def _is_default(self, name: str) -> bool:
        value, default = getattr(self, name), _PARAMETERS[name].default
        return type(value) is type(default) and value == default

    def _fit_once(self, rows: Rows, seed: int, mapper: Mapper, local: Mapper, tally: Tally) -> Fit:
        start = Start(
            self.init,
            self.metric,
            seed,
            self.oversampling_factor,
            N_ROUNDS if self.init_max_iter is None else self.init_max_iter,
            self.sample_bytes,
        )
        centers = initial_centers(rows, self.n_clusters, start, mapper=mapper, local=local, tally=tally)
        return lloyd(
            rows,
            centers,
            metric=self.metric,
            max_iter=self.max_iter,
            tol=self.tol,
            mapper=mapper,
            tally=tally,
            on_pass=self.on_pass,
        )

    def _seeds(self) -> list[int]:
        """One seed a start; a given array of centers is one start, whatever `n_init`."""
        n = 1 if self.n_init == "auto" or not isinstance(self.init, str) else self.n_init
        if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
            raise UsageError(f"n_init={self.n_init!r} is not a number of starts. Use 'auto' or a whole number from 1.")
        first = seed_of(self.random_state)
        return [first, *np.random.default_rng([first, 1]).integers(2**31, size=int(n) - 1).tolist()]

    def _rows(self, x: Any) -> Rows:
        if not hasattr(self, "cluster_centers_"):
            raise UsageError("This KMeans has no centers yet. Call fit first.")
        rows = as_rows(x)
        if rows.n_columns != self.n_features_in_:
            raise BadInput(f"Rows of {rows.n_columns} columns were given. Wanted: {self.n_features_in_}, as fitted.")
        return rows


_PARAMETERS = {
    name: parameter for name, parameter in inspect.signature(KMeans.__init__).parameters.items() if name != "self"
}


def seed_of(random_state: Any) -> int:
    """One whole number of a seed, a numpy RandomState or Generator, or None (a fresh one)."""
    if random_state is None:
        return int(np.random.default_rng().integers(2**31))
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31 - 1))
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(2**31))
    if isinstance(random_state, bool) or not isinstance(random_state, (int, np.integer)) or random_state < 0:
        raise UsageError(f"random_state={random_state!r} is not a seed. Use a whole number from 0, or None.")
    return int(random_state)


@dataclass(frozen=True)
class _Labels:
    """Labels of one dask block. The row an error names counts from the start of the array."""

    centers: np.ndarray
    metric: Metric

    def __call__(self, block: np.ndarray, block_info: Any = None) -> np.ndarray:
        x = np.ascontiguousarray(block, working_dtype(block.dtype))
        where = block_info[0] if block_info else {}
        start = where["array-location"][0][0] if where else 0
        found, (labels, _) = fused(self.centers, self.metric, x.dtype).chunk(x, start)
        check_rows(found, where["shape"][0] if where else len(x))
        return labels


@dataclass(frozen=True)
class _Distances:
    """Distances of rows to all centers, in float64 around the centers' mean, so that an offset costs no digits."""

    centers: np.ndarray
    metric: Metric

    def __call__(self, block: np.ndarray) -> np.ndarray:
        x = np.ascontiguousarray(block, working_dtype(block.dtype))
        centers = self.centers.astype(np.float64)
        shift = centers.mean(axis=0)
        centers -= shift
        exact = (unit(x.astype(np.float64)) if self.metric == "cosine" else x) - shift
        squared = np.einsum("ij,ij->i", exact, exact)[:, None] - 2 * (exact @ centers.T)
        squared += np.einsum("ij,ij->i", centers, centers)
        found: np.ndarray = np.sqrt(np.maximum(squared, 0, out=squared)).astype(x.dtype)
        return found


@dataclass(frozen=True)
class _OfBlock:
    """A function of rows, applied to a block by its number."""

    function: Callable[[np.ndarray], np.ndarray]
    rows: Rows

    def __call__(self, block: int) -> np.ndarray:
        return self.function(self.rows.read(block))


@contextmanager
def _running(mapper: Mapper | None) -> Iterator[tuple[Mapper, Mapper]]:
    """The mapper of passes, and one for arrays of this process: threads, unless the caller brought a mapper."""
    threads = thread_mapper(available_cores()) if mapper is None else contextlib.nullcontext(map)
    with threads as local:
        yield mapper or local, local


def _check_algorithm(name: str) -> None:
    if name not in ("full", "lloyd", "auto"):
        raise UsageError(f"algorithm={name!r} is not known. Use 'full' (Lloyd's).")


def _like(x: Any, rows: Rows, labels: np.ndarray) -> Any:
    """`labels` as the kind of array `x` is."""
    if not isinstance(rows, DaskRows) or x is rows:
        return labels
    return extras.load("dask.array").from_array(labels, chunks=(rows.array.chunks[0],))
