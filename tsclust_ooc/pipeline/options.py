"""What a user may choose of cluster and predict, declared once: help, environment and TOML come from here.

Annotations are evaluated here, not kept as text: those of ComputeOptions are inherited in other modules, where cyclopts
would look for their names in vain.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tsclust_ooc.cluster import INITS
from tsclust_ooc.dataset import VIEWS
from tsclust_ooc.errors import UsageError
from tsclust_ooc.runtime import Jobs

ENGINES = ("lloyd", "dask-ml")
METRICS = ("euclidean", "cosine")


@dataclass(frozen=True)
class ComputeOptions:
    """Where the work runs.

    Attributes
    ----------
    scheduler
        'threads' (no open port), 'local' (a dask cluster of processes here: TLS, loopback only, with a dashboard),
        'slurm' (the same with Slurm jobs as workers), or the address tls://HOST:PORT of a running dask cluster.
    memory
        Memory of the whole process tree here, like 4GB. Default: half of what this job may use.
    workers
        Tasks that run side by side. Default: from cores and memory; with slurm as many as one job has cores.
    scratch
        Directory on a disk of this node. Default: the first node-local one found.
    overwrite
        Replace the result that is already there, in one step, when the new one is complete.
    jobs
        What a batch scheduler is asked for.
    """

    scheduler: str = "threads"
    memory: str | None = None
    workers: int | None = None
    scratch: Path | None = None
    overwrite: bool = False
    jobs: Annotated[Jobs, Parameter(name="*", group="Batch jobs and clusters")] = Jobs()


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
            ("init", self.init, INITS),
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
