"""Shards to one matrix on disk: ours, the peer, and the floor, in one run.

    python benchmarks/consolidate.py [--shards 20000] [--shape 7 768] [--rounds 3] [--dir /var/tmp]

The peer is what people write: a loop of h5py reads, np.vstack, zarr.save. The floor reads all bytes of all shards once
and writes all bytes once, with fsync. Each way runs in a process of its own; its time is from after its imports to the
end, and the whole process is timed as well. Shards are written before, so all ways read a warm page cache.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ways import SHAPE, in_turn, make_shards, options, place, run, say

T = TypeVar("T")
OURS, PEER, FLOOR = "ours", "h5py loop + vstack + zarr.save", "floor: read all, write all, fsync"


def ours(source: Path, target: Path) -> None:
    """Survey, plan, write, digests, fsync, publish."""
    from tsclust_ooc import consolidate as work_on  # noqa: PLC0415
    from tsclust_ooc.pipeline import consolidating  # noqa: PLC0415

    stages: dict[str, float] = {}
    for module, name in (
        (consolidating, "survey"), (consolidating, "make_plan"), (work_on, "init"), (work_on, "run"),
        (work_on, "finalize"),
    ):  # fmt: skip
        setattr(module, name, noted(getattr(module, name), stages))
    with timed(stages):
        consolidating.consolidate(source, target / "dataset")


def noted(function: Callable[..., T], stages: dict[str, float]) -> Callable[..., T]:
    """`function`, its seconds noted."""

    def call(*args: Any, **kwargs: Any) -> T:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            stages[function.__name__] = stages.get(function.__name__, 0.0) + time.perf_counter() - began

    return call


@contextmanager
def timed(stages: dict[str, float] | None = None) -> Iterator[None]:
    """Says the seconds of its block, and of its stages."""
    began = time.perf_counter()
    yield
    say([time.perf_counter() - began, stages or {}])


def peer(source: Path, target: Path) -> None:
    """An h5py loop, np.vstack and zarr.save."""
    import h5py  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415
    import zarr  # noqa: PLC0415

    with timed():
        rows = []
        for path in sorted((source / "train").iterdir(), key=lambda p: int(p.stem)):
            with h5py.File(path, "r") as file:
                rows.append(file["embeddings"][...])
        zarr.save(str(target / "matrix.zarr"), np.vstack(rows))


def floor(source: Path, target: Path) -> None:
    """Every byte read once, every byte written once with fsync."""
    with timed(), (target / "bytes").open("wb", buffering=0) as out:
        for entry in os.scandir(source / "train"):
            with open(entry.path, "rb", buffering=0) as file:
                out.write(file.read())
        os.fsync(out.fileno())


WAYS = {OURS: ours, PEER: peer, FLOOR: floor}


def measure(way: str, source: Path, place: Path) -> tuple[float, float, dict[str, float]]:
    """Seconds of one way in a fresh process, without and with its start and imports; and of its stages."""
    (seconds, stages), whole = run(__file__, way, source, place)
    return seconds, whole, stages


def main() -> None:
    """Measure every way in turn, a few rounds, and print the table."""
    parser = options(__doc__, WAYS)
    parser.add_argument("--shards", type=int, default=20_000)
    parser.add_argument("--shape", type=int, nargs="+", default=SHAPE)
    given = parser.parse_args()
    if given.way:
        WAYS[given.way](given.source, given.dir)
        return
    with place(given.dir) as here:
        make_shards(here / "source" / "train", given.shards, given.shape)
        show(in_turn(WAYS, given.rounds, lambda way: measure(way, here / "source", here)), given.shards, given.shape)


def show(found: dict[str, list[tuple[float, float, dict[str, float]]]], n: int, shape: Sequence[int]) -> None:
    """The table: medians, rate, and how many times the peer's and the floor's time."""
    medians = {way: [statistics.median(row[i] for row in rows) for i in (0, 1)] for way, rows in found.items()}
    rounds = len(found[OURS])
    print(f"{n:,} shards {tuple(shape)} float32, {os.cpu_count()} cores, median of {rounds}")
    heads = ("way", "seconds", "shards/s", "peer / it", "it / floor", "whole process", "peer / it", "it / floor")
    print("{:<36}{:>9}{:>10}{:>11}{:>12}{:>15}{:>11}{:>12}".format(*heads))
    for way, times in medians.items():
        ratios = [(medians[PEER][i] / s, s / medians[FLOOR][i]) for i, s in enumerate(times)]
        (inner, whole), (first, second) = times, ratios
        print(
            f"{way:<36}{inner:>9.2f}{n / inner:>10,.0f}{first[0]:>11.1f}{first[1]:>12.2f}"
            f"{whole:>15.2f}{second[0]:>11.1f}{second[1]:>12.2f}"
        )
    stages = {name: statistics.median(row[2][name] for row in found[OURS]) for name in found[OURS][0][2]}
    imports = statistics.median(row[1] - row[0] for row in found[OURS])
    print(f"ours: {', '.join(f'{name} {s:.2f} s' for name, s in stages.items())}; start and imports {imports:.2f} s")


if __name__ == "__main__":
    main()
