"""tsclust cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tsclust_ooc.cli.console import Output, OutputOptions, expand, expanded, session
from tsclust_ooc.pipeline.clustering import Clustered
from tsclust_ooc.pipeline.clustering import cluster as run_cluster
from tsclust_ooc.pipeline.options import ClusterOptions
from tsclust_ooc.units import format_bytes, format_count, format_seconds, plural


def cluster(
    dataset: Path,
    run: Path,
    /,
    *,
    k: Annotated[int, Parameter(name=["-k", "--clusters"])],
    options: Annotated[ClusterOptions, Parameter(name="*")] = ClusterOptions(),
    output: Output = OutputOptions(),
) -> None:
    """Cluster a dataset with k-means and publish the run: labels of every split, model, metrics, report.

    Parameters
    ----------
    dataset
        A published dataset.
    run
        Directory to publish; it appears when it is complete.
    k
        Number of clusters.
    """
    options = expanded(options)
    with session(output) as show:
        done = run_cluster(expand(dataset), expand(run), k, options, show)
        show.result(done, lines(done))


def lines(done: Clustered) -> list[str]:
    """A finished run for a person."""
    sizes = " ".join(format_count(n) for n in sorted(done.sizes, reverse=True))
    how = "there already, made with these options" if done.reused else "converged" if done.converged else "stopped"
    after = f" after {plural(done.n_iter, 'iteration')}" if done.n_iter else ""
    scores = " · ".join(f"{name} {value:.4g}" for name, value in done.scores.items() if "(" not in name)
    rows = ", ".join(f"{split} {format_count(n)}" for split, n in done.splits.items())
    return [
        f"{how}{after} · inertia {done.inertia:.6e} · sizes {sizes}",
        *([f"  {scores}"] if scores else []),
        *_against_truth(done),
        f"  {rows} rows · {_passes(done.n_passes)} over the data, {format_bytes(done.bytes_read)} read · "
        f"{format_seconds(done.seconds)}, peak {format_bytes(done.peak_bytes)}",
        f'  labels   {done.labels}   pandas.read_parquet("{done.labels}")',
        f"  report   {done.report}",
    ]


def _against_truth(done: Clustered) -> list[str]:
    """The adjusted Rand index of each split; the others are in metrics.json and the report."""
    found = {name: value for name, value in done.scores.items() if name.startswith("adjusted_rand (")}
    shown = ", ".join(f"{name.partition('(')[2].rstrip(')')} {value:.4f}" for name, value in found.items())
    return [f"  adjusted Rand index (ARI) against the known classes: {shown}"] if found else []


def _passes(n: int) -> str:
    return "1 pass" if n == 1 else f"{n} passes"
