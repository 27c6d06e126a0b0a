"""tsclust predict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tsclust_ooc.cli.cluster_command import lines
from tsclust_ooc.cli.console import Output, OutputOptions, expand, expanded, session
from tsclust_ooc.pipeline.clustering import predict as run_predict
from tsclust_ooc.pipeline.options import ComputeOptions


def predict(
    run: Path,
    dataset: Path,
    out: Path,
    /,
    *,
    options: Annotated[ComputeOptions, Parameter(name="*")] = ComputeOptions(),
    output: Output = OutputOptions(),
) -> None:
    """Label every row of a dataset by the centers of a published run.

    Parameters
    ----------
    run
        A run that cluster published.
    dataset
        A published dataset with the same features.
    out
        Directory to publish: labels, metrics and a report.
    """
    options = expanded(options)
    with session(output) as show:
        done = run_predict(expand(run), expand(dataset), expand(out), options, show)
        show.result(done, lines(done))
