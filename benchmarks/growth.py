"""How the time of a consolidation grows with the number of shards, and with their size: a table and a plot.

    python benchmarks/growth.py [--most 200000] [--bytes 430000000] [--plot docs/growth.svg] [--dir /var/tmp]

Each point is a whole process, imports included, on shards that were just written (a warm page cache); ways, peer and
floor are those of consolidate.py. The number grows at (7, 768) float32; the size grows at the same number of bytes in
all. The peer holds all samples twice in memory, so it is left out beyond --peer-most shards.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from consolidate import FLOOR, OURS, PEER, measure
from ways import SHAPE, make_shards
from ways import place as fresh

matplotlib.use("svg")
from matplotlib import pyplot as plt

COUNTS = (1_000, 3_000, 10_000, 30_000, 100_000, 200_000)
SHAPES = ((1, 768), (7, 768), (49, 768), (321, 768), (2_000, 768))

Points = dict[str, list[tuple[int, float]]]


def grow(cases: Sequence[tuple[int, int, Sequence[int]]], place: Path, peer_most: int) -> Points:
    """Seconds of each way at each case (x, shards, shape)."""
    points: Points = {OURS: [], PEER: [], FLOOR: []}
    for x, n, shape in cases:
        source = place / "source"
        make_shards(source / "train", n, shape)
        for way in points:
            if way != PEER or n <= peer_most:
                seconds = measure(way, source, place)[1]
                points[way].append((x, seconds))
                print(f"{n:>9,} shards {tuple(shape)!s:<12} {way:<36}{seconds:>9.2f} s", flush=True)
        shutil.rmtree(source)
    return points


def draw(by_number: Points, by_size: Points, target: Path) -> None:
    """Both growths, seconds on logarithmic axes, with a line of slope 1 through our largest point."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), constrained_layout=True)
    for axes, points, label in (
        (left, by_number, "shards of (7, 768) float32"), (right, by_size, "KB a shard, same bytes in all"),
    ):  # fmt: skip
        for way, marker in ((PEER, "s"), (OURS, "o"), (FLOOR, "^")):
            axes.loglog(*zip(*points[way], strict=True), marker=marker, label=way)
        axes.set_xlabel(label)
        axes.set_ylabel("seconds, whole process")
        axes.grid(visible=True, which="both", alpha=0.25)
    x, y = by_number[OURS][-1]
    ends = [by_number[OURS][0][0], x]
    left.plot(ends, [y * end / x for end in ends], "k:", linewidth=1, label="slope 1")
    left.legend(fontsize="small")
    figure.savefig(target)


def main() -> None:
    """Measure both growths, write the plot and a table beside it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--most", type=int, default=COUNTS[-1])
    options.add_argument("--peer-most", type=int, default=100_000)
    options.add_argument("--bytes", type=int, default=430_000_000)
    options.add_argument("--plot", type=Path, default=Path("docs/growth.svg"))
    options.add_argument("--dir", type=Path, default=Path("/var/tmp"))
    given = options.parse_args()
    print(f"{os.cpu_count()} cores; seconds of whole processes")
    with fresh(given.dir) as place:
        counts = [n for n in COUNTS if n <= given.most]
        by_number = grow([(n, n, SHAPE) for n in counts], place, given.peer_most)
        sizes = [(4 * a * b, max(1, given.bytes // (4 * a * b)), (a, b)) for a, b in SHAPES]
        by_size = grow([(x // 1000, n, shape) for x, n, shape in sizes], place, given.peer_most + sizes[0][1])
    draw(by_number, by_size, given.plot)
    with given.plot.with_suffix(".csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["growth of", "way", "shards or KB", "seconds"])
        for name, points in (("number", by_number), ("size", by_size)):
            table.writerows([name, way, x, round(y, 3)] for way, found in points.items() for x, y in found)
    print(f"plot: {given.plot}")


if __name__ == "__main__":
    main()
