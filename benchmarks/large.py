"""Large compressed shards to one matrix on disk: ours, the peers, and the floor, in one run.

    python benchmarks/large.py [--files 64] [--rounds 3] [--dir /var/tmp] [--memory 1GB]

Files are (20,000, 768) float16, gzip 4, chunks (128, 768). The first peer is what people write: one process that reads
each file whole with h5py and assigns it to its rows of a zarr array, here at its best: no compression, and a chunk a
file, so that nothing is written twice. The second is h5py reading alone, nothing written. The floor is the first peer's
own work spread over all cores, free of charge. Each way runs in a process of its own; its time is from after its
imports to the end, its memory the peak of the process tree.
"""

from __future__ import annotations

import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from ways import in_turn, options, place, run, say

ROWS, WIDTH, KEY = 20_000, 768, "embeddings"
LOOP, ALONE = "h5py + zarr, one process", "h5py read alone, one process"


def ours(source: Path, target: Path, memory: str) -> None:
    """Survey, plan, decode, write, digests, fsync, publish."""
    from tsclust_ooc.pipeline.consolidating import ConsolidateOptions, consolidate  # noqa: PLC0415

    began = time.perf_counter()
    done = consolidate(source, target / "dataset", ConsolidateOptions(memory=memory))
    told(began, done.peak_bytes)


def peer(source: Path, target: Path, memory: str) -> None:  # noqa: ARG001
    """Each file read whole, then written to its rows of a zarr array."""
    import h5py  # noqa: PLC0415
    import zarr  # noqa: PLC0415

    began = time.perf_counter()
    paths = sorted(source.iterdir(), key=lambda path: int(path.stem))
    whole = zarr.create_array(
        target / "matrix.zarr", shape=(ROWS * len(paths), WIDTH), chunks=(ROWS, WIDTH), dtype="f2", compressors=None
    )
    for i, path in enumerate(paths):
        with h5py.File(path, "r") as file:
            whole[i * ROWS : (i + 1) * ROWS] = file[KEY][...]
    told(began)


def alone(source: Path, target: Path, memory: str) -> None:  # noqa: ARG001
    """Each file read whole, and dropped."""
    import h5py  # noqa: PLC0415

    began = time.perf_counter()
    for path in source.iterdir():
        with h5py.File(path, "r") as file:
            file[KEY][...]
    told(began)


def told(began: float, peak_bytes: int = 0) -> None:
    """Says the seconds of a way, and the bytes of memory of its process tree where it measured them."""
    say([time.perf_counter() - began, peak_bytes or peak_of_this_process()])


def peak_of_this_process() -> int:
    """Peak resident bytes (Linux counts ru_maxrss in KiB)."""
    import resource  # noqa: PLC0415

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


WAYS = {"ours": ours, LOOP: peer, ALONE: alone}


def make_file(path: Path) -> None:
    """One file as a batch of an extractor leaves it."""
    import h5py  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    rows = np.random.default_rng(int(path.stem)).standard_normal((ROWS, WIDTH), dtype=np.float32).astype(np.float16)
    with h5py.File(path, "w") as file:
        file.create_dataset(KEY, data=rows, chunks=(128, WIDTH), compression="gzip", compression_opts=4)


def make_files(folder: Path, n: int) -> None:
    """`n` files, a process a core."""
    folder.mkdir(parents=True)
    with ProcessPoolExecutor() as pool:
        list(pool.map(make_file, [folder / f"{i}.h5" for i in range(n)]))


def main() -> None:
    """Measure every way in turn, a few rounds, and print the table."""
    parser = options(__doc__, WAYS)
    parser.add_argument("--files", type=int, default=64)
    parser.add_argument("--memory", default="1GB")
    given = parser.parse_args()
    if given.way:
        WAYS[given.way](given.source, given.dir, given.memory)
        return
    with place(given.dir) as here:
        source = here / "source"
        make_files(source, given.files)
        more = ("--memory", given.memory)
        show(in_turn(WAYS, given.rounds, lambda way: run(__file__, way, source, here, *more)[0]), given.files)


def show(found: dict[str, list[tuple[float, float]]], n: int) -> None:
    """The table: medians, rate of unpacked bytes, and how many times as fast as the first peer."""
    medians = {way: [statistics.median(column) for column in zip(*rows, strict=True)] for way, rows in found.items()}
    cores = len(os.sched_getaffinity(0))
    medians[f"floor: the loop on {cores} cores"] = [medians[LOOP][0] / cores, 0.0]
    rounds = len(next(iter(found.values())))
    print(f"{n} files ({ROWS:,}, {WIDTH}) float16, gzip 4, {cores} cores, median of {rounds}")
    print(f"{'way':<32}{'seconds':>9}{'MB/s':>8}{'x peer':>8}{'peak MB':>9}")
    for way, (seconds, peak) in medians.items():
        rate, against = n * ROWS * WIDTH * 2e-6 / seconds, medians[LOOP][0] / seconds
        print(f"{way:<32}{seconds:>9.2f}{rate:>8.0f}{against:>8.2f}" + (f"{peak / 1e6:>9.0f}" if peak else ""))


if __name__ == "__main__":
    main()
