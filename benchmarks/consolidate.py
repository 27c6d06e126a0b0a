"""Shards to one matrix on disk: ours, the peer, and the floor, in one run.

    python benchmarks/consolidate.py [--shards 20000] [--shape 7 768] [--rounds 3] [--dir /var/tmp]

The peer is what people write: a loop of h5py reads, np.vstack, zarr.save. The floor reads all bytes of all shards once
and writes all bytes once, with fsync. Each way runs in a process of its own; its time is from after its imports to the
end, and the whole process is timed as well. Shards are written before, so all ways read a warm page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

SHAPE = (7, 768)
OURS, PEER, FLOOR = "ours", "h5py loop + vstack + zarr.save", "floor: read all, write all, fsync"


def ours(source: Path, target: Path) -> None:
    """Survey, plan, write, digests, fsync, publish."""
    from tsclust_ooc.pipeline.consolidating import consolidate  # noqa: PLC0415

    with timed():
        consolidate(source, target / "dataset")


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


class timed:  # noqa: N801
    """Prints the seconds of its block as the last line."""

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None:
            print(json.dumps(time.perf_counter() - self.began))


WAYS = {OURS: ours, PEER: peer, FLOOR: floor}


def make_shards(folder: Path, n: int, shape: Sequence[int] = SHAPE) -> None:
    """`n` shards as h5py writes them by default."""
    import h5py  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(n):
        with h5py.File(folder / f"{i}.h5", "w") as file:
            file.create_dataset("embeddings", data=rng.standard_normal(shape, dtype=np.float32))


def measure(way: str, source: Path, place: Path) -> tuple[float, float]:
    """Seconds of one way in a fresh process: without and with its start and imports."""
    target = Path(tempfile.mkdtemp(dir=place))
    os.sync()
    began = time.perf_counter()
    command = [sys.executable, __file__, "--way", way, "--source", str(source), "--dir", str(target)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    whole = time.perf_counter() - began
    shutil.rmtree(target)
    return float(done.stdout.splitlines()[-1]), whole


def main() -> None:
    """Measure every way in turn, a few rounds, and print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shards", type=int, default=20_000)
    options.add_argument("--shape", type=int, nargs="+", default=SHAPE)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--dir", type=Path, default=Path("/var/tmp"))
    options.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    options.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.way:
        WAYS[given.way](given.source, given.dir)
        return
    place = Path(tempfile.mkdtemp(prefix="tsclust-bench-", dir=given.dir))
    try:
        make_shards(place / "source" / "train", given.shards, given.shape)
        seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for _ in range(given.rounds):
            for way in WAYS:
                seconds[way].append(measure(way, place / "source", place))
        show(seconds, given.shards, given.shape)
    finally:
        shutil.rmtree(place)


def show(seconds: dict[str, list[tuple[float, float]]], n: int, shape: Sequence[int]) -> None:
    """The table: medians, rate, and how many times the peer's and the floor's time."""
    medians = {way: [statistics.median(column) for column in zip(*rows, strict=True)] for way, rows in seconds.items()}
    rounds = len(next(iter(seconds.values())))
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


if __name__ == "__main__":
    main()
