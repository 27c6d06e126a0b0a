"""All distances of one matrix: ours to zarr, the peers, and how true each is, in one run.

    python benchmarks/distances.py [--rows 20000] [--columns 768] [--metric euclidean] [--dir /var/tmp]

Peers: scikit-learn's pairwise_distances in memory (nothing written), dask-ml's blocks written to zarr, and scipy's
cdist of 2,000 rows to all, in float64, its time multiplied to all rows. The error is the largest relative one against
scipy in float64, over 200 rows to all; where the exact distance is 0, the found one counts as it is. Each way runs in
a process of its own; its time is from after its imports, with a first small call so that nothing is compiled in it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKED, SLICE = 200, 2000


def ours(rows, metric: str, target: Path) -> tuple[float, object]:
    """Blocks on threads, digests, fsync: what the command does, less its dataset."""
    import zarr  # noqa: PLC0415

    from tsclust_ooc.distance.pairwise import Blocks, Kept, as_rows, grid  # noqa: PLC0415
    from tsclust_ooc.matrix import MatrixPlan, Spent, finalize, init, work_for  # noqa: PLC0415
    from tsclust_ooc.passes import one_blas_thread, thread_mapper  # noqa: PLC0415
    from tsclust_ooc.pipeline.distancing import BlockTask  # noqa: PLC0415

    def compute(x, final: Path) -> None:
        cells = grid(len(x))
        plan = MatrixPlan("", "all", "", "flatten", metric, (len(x), len(x)), (cells.height, cells.width))
        work, order = work_for(final, plan), cells.order(1000)
        init(work)
        with thread_mapper(os.cpu_count() or 1) as mapper, one_blas_thread:
            for _ in mapper(BlockTask(Blocks(as_rows(x), None, metric, cells, Kept(1000)), work), order):
                pass
        finalize(work, order, Spent("", "threads", 1, 0, 0.0, 0), replace=False)

    compute(rows[:100], target / "small")
    began = time.perf_counter()
    compute(rows, target / "matrix")
    return time.perf_counter() - began, zarr.open_group(target / "matrix/distances.zarr", mode="r")["distances"]


def dask_ml(rows, metric: str, target: Path) -> tuple[float, object]:
    """dask-ml's pairwise_distances of 2,000-row chunks, to zarr."""
    import dask.array as da  # noqa: PLC0415
    import zarr  # noqa: PLC0415
    from dask_ml.metrics import pairwise_distances  # noqa: PLC0415

    began = time.perf_counter()
    lazy = pairwise_distances(da.from_array(rows, chunks=(SLICE, -1)), rows, metric=metric)
    lazy.rechunk((SLICE, SLICE)).to_zarr(str(target / "matrix.zarr"))
    return time.perf_counter() - began, zarr.open_array(str(target / "matrix.zarr"), mode="r")


def sklearn(rows, metric: str, _target: Path) -> tuple[float, object]:
    """scikit-learn in memory."""
    from sklearn.metrics import pairwise_distances  # noqa: PLC0415

    began = time.perf_counter()
    found = pairwise_distances(rows, metric=metric)
    return time.perf_counter() - began, found


def scipy(rows, metric: str, _target: Path) -> tuple[float, object]:
    """scipy of a slice, scaled."""
    from scipy.spatial.distance import cdist  # noqa: PLC0415

    began = time.perf_counter()
    found = cdist(rows[:SLICE], rows, metric)
    return (time.perf_counter() - began) * len(rows) / SLICE, found


WAYS = {
    "ours, to zarr": ours,
    "dask-ml blocks, to zarr": dask_ml,
    "scikit-learn, in memory": sklearn,
    f"scipy float64, {SLICE:,} rows, scaled": scipy,
}


def run(way: str, n: int, columns: int, metric: str, offset: float, target: Path) -> None:
    """One way in this process; prints seconds and the largest relative error."""
    import numpy as np  # noqa: PLC0415
    from scipy.spatial.distance import cdist  # noqa: PLC0415

    rows = np.random.default_rng(0).standard_normal((n, columns), dtype=np.float32) + np.float32(offset)
    seconds, found = WAYS[way](rows, metric, target)
    exact = cdist(rows[:CHECKED].astype(float), rows.astype(float), metric)
    np.fill_diagonal(exact, 0)
    gaps = np.abs(np.asarray(found[:CHECKED]) - exact)
    error = np.divide(gaps, exact, out=gaps.copy(), where=exact > 0).max()
    print(json.dumps([seconds, float(error)]))


def main() -> None:
    """Measure every way and print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=20_000)
    options.add_argument("--columns", type=int, default=768)
    options.add_argument("--metric", default="euclidean", choices=["euclidean", "sqeuclidean", "cosine", "cityblock"])
    options.add_argument("--offset", type=float, default=0.0, help="added to all values")
    options.add_argument("--dir", type=Path, default=Path("/var/tmp"))
    options.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.way:
        run(given.way, given.rows, given.columns, given.metric, given.offset, given.dir)
        return
    print(f"{given.rows:,} x {given.columns} float32 + {given.offset:g}, {given.metric}, {os.cpu_count()} cores")
    print(f"{'way':<36}{'seconds':>9}{'largest relative error':>25}")
    for way in WAYS:
        place = Path(tempfile.mkdtemp(prefix="tsclust-bench-", dir=given.dir))
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way, "--dir", str(place)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        shutil.rmtree(place)
        seconds, error = json.loads(done.stdout.splitlines()[-1])
        print(f"{way:<36}{seconds:>9.2f}{error:>25.1e}")


if __name__ == "__main__":
    main()
