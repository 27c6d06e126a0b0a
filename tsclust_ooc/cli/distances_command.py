"""tsclust distances."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tsclust_ooc.cli.console import Output, OutputOptions, expand, expanded, session
from tsclust_ooc.pipeline.distancing import DEFAULTS, Distanced, DistancesOptions
from tsclust_ooc.pipeline.distancing import distances as run_distances
from tsclust_ooc.units import format_bytes, format_count, format_seconds, plural


def distances(
    dataset: Path,
    out: Path,
    /,
    *,
    options: Annotated[DistancesOptions, Parameter(name="*")] = DEFAULTS,
    output: Output = OutputOptions(),
) -> None:
    """Distances of all rows of a split to each other, or to those of another, as one zarr array.

    Parameters
    ----------
    dataset
        A published dataset.
    out
        Directory to publish; it appears when it is complete.
    """
    options = expanded(options)
    with session(output) as show:
        done = run_distances(expand(dataset), expand(out), options, show)
        show.result(done, lines(done))


def lines(done: Distanced) -> list[str]:
    """A finished matrix for a person."""
    blocks = f"{format_count(done.n_computed)} of {plural(done.n_blocks, 'block')} computed"
    how = "there already, made with these options" if done.reused else blocks
    return [
        f"{format_count(done.n_rows)} x {format_count(done.n_columns)} {done.metric} distances · {how}",
        f"  {format_bytes(done.bytes)} · {format_bytes(done.bytes_read)} read · {format_seconds(done.seconds)}, "
        f"peak {format_bytes(done.peak_bytes)}",
        f'  distances   {done.distances}   zarr.open_group("{done.distances}")["distances"]',
    ]
