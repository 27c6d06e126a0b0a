"""tsclust demo."""

from __future__ import annotations

from pathlib import Path

from tsclust_ooc import demo as source
from tsclust_ooc.cli.console import Output, OutputOptions, expand, session
from tsclust_ooc.units import format_bytes, format_count


def demo(
    folder: Path,
    /,
    *,
    samples: int = 1200,
    seed: int = 0,
    output: Output = OutputOptions(),
) -> None:
    """Write a labelled demo source: control-chart series embedded into small HDF5 shards, and truth.parquet.

    Parameters
    ----------
    folder
        Where to write; must not exist yet (a demo with the same parameters is left as it is).
    samples
        Samples in train; val and test get a quarter each.
    seed
        The same seed gives the same bytes.
    """
    with session(output) as show:
        made = source.write_demo(expand(folder), samples=samples, seed=seed, listener=show)
        counts = " / ".join(format_count(n) for n in made.samples)
        show.result(made, [
            f"{'already there' if made.reused else 'wrote'} {made.folder}   {counts} shards (train / val / test), "
            f"{format_bytes(made.n_bytes)}, sample {made.item_shape} float32",
            f"  truth   {made.folder / 'truth.parquet'}   classes: {', '.join(made.classes)}",
            f"  Next: tsclust inspect {made.folder}",
        ])  # fmt: skip
