"""tsclust report."""

from __future__ import annotations

from pathlib import Path

from tsclust_ooc.cli.console import Output, OutputOptions, expand, session
from tsclust_ooc.pipeline.clustering import rewrite_report


def report(
    run: Path,
    out: Path | None = None,
    /,
    *,
    output: Output = OutputOptions(),
) -> None:
    """Write the HTML report of a published run again (the run holds one already: RUN/report.html).

    Parameters
    ----------
    run
        A published run.
    out
        File to write. Default: RUN-report.html beside the run.
    """
    with session(output) as show:
        written = rewrite_report(expand(run), None if out is None else expand(out))
        show.result({"report": str(written)}, [f"report   {written}"])
