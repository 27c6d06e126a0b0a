"""tsclust evaluate."""

from __future__ import annotations

from pathlib import Path

from tsclust_ooc.cli.console import Output, OutputOptions, expand, session, table
from tsclust_ooc.pipeline.clustering import evaluate as compare


def evaluate(
    run: Path,
    /,
    *,
    truth: Path,
    output: Output = OutputOptions(),
) -> None:
    """Compare the labels of a run with known classes: adjusted Rand index and others, for each split.

    Parameters
    ----------
    run
        A published run (of cluster or of predict).
    truth
        Parquet file with the columns split, sample_id and class.
    """
    with session(output) as show:
        found = compare(expand(run), expand(truth))
        names = list(next(iter(found.values())))
        rows = [("split", *(name.replace("_", " ") for name in names))]
        rows += [(split, *(f"{values[name]:.4f}" for name in names)) for split, values in found.items()]
        show.result(found, table(rows, right=range(1, len(names) + 1)))
