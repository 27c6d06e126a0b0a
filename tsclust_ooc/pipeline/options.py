"""What a user may choose of cluster and predict, declared once: help, environment and TOML come from here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from tsclust_ooc.cluster import starts
from tsclust_ooc.dataset import VIEWS
from tsclust_ooc.errors import UsageError

ENGINES = ("lloyd", "dask-ml")
METRICS = ("euclidean", "cosine")


@dataclass(frozen=True)
class ComputeOptions:
    """Where the passes run.

    Attributes
    ----------
    scheduler
        'threads' (no open port), or 'local' (a dask cluster of processes here: TLS, loopback only, with a dashboard).
    memory
        Memory of the whole process tree, like 4GB. Default: half of what this job may use.
    workers
        Blocks computed side by side. Default: from cores and memory.
    scratch
        Directory on a disk of this node. Default: the first node-local one found.
    overwrite
        Replace the result that is already there, in one step, when the new one is complete.
    """

    scheduler: str = "threads"
    memory: str | None = None
    workers: int | None = None
    scratch: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class ClusterOptions(ComputeOptions):
    """Options of cluster.

    Attributes
    ----------
    view
        How a sample becomes rows: 'flatten' (variable x feature columns), 'variable' (one row a variable), or 'mean'.
    metric
        'euclidean', or 'cosine' (spherical k-means: rows and centers of unit length).
    engine
        'lloyd' (one fused read of the data an iteration), or 'dask-ml' (the stock estimator, for comparison).
    fit_split
        Split the centers are fitted on; every split gets labels. Default: train if there is one, else the only one.
    init
        'auto' (k-means++ and Lloyd on a uniform sample, then full passes), 'k-means++', 'k-means||' or 'random'.
    max_iter
        Most updates of the centers.
    tol
        Stop when the centers move less than this, relative to the mean variance of the columns.
    seed
        The same dataset, options and seed give the same labels, whatever the workers.
    truth
        Parquet file of known classes (split, sample_id, class): scores against them go into the report.
    """

    view: str = "flatten"
    metric: str = "euclidean"
    engine: str = "lloyd"
    fit_split: str | None = None
    init: str = "auto"
    max_iter: int = 300
    tol: float = 1e-4
    seed: int = 0
    truth: Path | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("view", self.view, VIEWS), ("metric", self.metric, METRICS), ("engine", self.engine, ENGINES),
            ("init", self.init, starts.INITS),
        ):  # fmt: skip
            if value not in known:
                raise UsageError(f"--{name} {value} is not known. Use one of: {', '.join(known)}.")
        if self.engine == "dask-ml" and self.metric != "euclidean":
            raise UsageError("--engine dask-ml knows the euclidean metric only. Use --engine lloyd.")
        if self.max_iter < 1:
            raise UsageError(f"--max-iter {self.max_iter} moves no center. Use 1 or more.")
        if not 0 <= self.tol < math.inf:
            raise UsageError(f"--tol {self.tol} is not a tolerance. Use 0 or more.")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed} is negative. Use 0 or more.")
