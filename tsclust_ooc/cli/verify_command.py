"""tsclust verify."""

from __future__ import annotations

from pathlib import Path

from tsclust_ooc.cli.console import Output, OutputOptions, Place, expand, expand_place, session
from tsclust_ooc.errors import BadInput, UsageError
from tsclust_ooc.pipeline.verifying import verify as check
from tsclust_ooc.units import format_bytes, plural

_SHOWN = 50


def verify(
    dataset: Path,
    /,
    *,
    against: Place | None = None,
    also: tuple[Path, ...] = (),
    workers: int | None = None,
    output: Output = OutputOptions(),
) -> None:
    """Check every byte of a dataset against its manifest; with --against, every sample against its shard.

    Parameters
    ----------
    dataset
        A published dataset.
    against
        The source it was made from (or a copy of it): a folder, one file, a text file with a path a line, or a URL.
    also
        A further source that it was made from; give it once for each.
    workers
        Threads that read. Default: the cores of this job.
    """
    with session(output) as show:
        if also and against is None:
            raise UsageError("--also is a further source. Give the first one with --against.")
        sources = None if against is None else [expand_place(against), *map(expand, also)]
        found = check(expand(dataset), sources, show, workers=workers)
        if found.damage:
            shown = [f"  {d.file}   {d.what}" for d in found.damage[:_SHOWN]]
            more = len(found.damage) - len(shown)
            rest = f"\n  ... and {more:,} more" if more else ""
            show.result(found, [])
            raise BadInput(
                f"{found.dataset}: {plural(len(found.damage), 'difference')} found.\n" + "\n".join(shown) + rest
                + "\nConsolidate it again with --overwrite."
            )  # fmt: skip
        compared = f"; {plural(found.n_samples_compared, 'sample')} equal to their shards" if against else ""
        show.result(
            found, [f"{found.dataset} is whole: {plural(found.n_files, 'file')}, {format_bytes(found.bytes)}{compared}"]
        )
