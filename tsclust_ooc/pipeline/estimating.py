"""What a consolidation will take: time, from a timed read of a part; disk and memory, from the plan.

Invariant: nothing is written, and no more than a few megabytes and half a second of the source are read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from tsclust_ooc import budget
from tsclust_ooc.plan import Plan
from tsclust_ooc.reading import RowReader
from tsclust_ooc.units import format_bytes, plural

_READERS_A_CORE = 4  # as many as consolidate has by default
_CHUNKS_A_WORKER = 2
_PLACES, _PLACE_BYTES, _MOST_SECONDS = 64, 256 * 2**10, 0.5
_STARTUP_SECONDS = 1.5
_WRITTEN_A_SECOND = 300 * 10**6  # with digests and fsync, on a plain disk
_BLOCK_BYTES, _BLOCKS, _SAMPLE_BYTES = 16 * 2**20, 4, 64 * 2**20  # of a pass of k-means, and of its first centers


@dataclass(frozen=True)
class Estimate:
    """What consolidating takes, with the defaults, on this machine or job; and the least memory of clustering.

    `seconds` come from reading `n_samples_timed` samples spread over the source; `basis` says what it all comes from.
    """

    seconds: float
    disk_bytes: int
    memory_bytes: int
    cluster_memory_bytes: int
    n_samples_timed: int
    basis: str


def estimate(plan: Plan, reader: RowReader) -> Estimate:
    """The estimate for a plan, `reader` being one of its rows."""
    n_readers = _READERS_A_CORE * budget.available_cores()
    n_timed, spent = _timed(plan, reader, n_readers)
    reading = spent * plan.n_rows / max(n_timed, 1)
    return Estimate(
        seconds=round(_STARTUP_SECONDS + reading + plan.disk_bytes / _WRITTEN_A_SECOND, 1),
        disk_bytes=plan.disk_bytes, memory_bytes=_memory(plan, n_readers), cluster_memory_bytes=_for_clustering(plan),
        n_samples_timed=n_timed,
        basis=f"time from reading {plural(n_timed, 'sample')} spread over the source (a disk's cache reads faster), "
        f"and writing taken as {format_bytes(_WRITTEN_A_SECOND)}/s; disk from the plan; memory for the readers "
        "that consolidate starts by default; for clustering one worker's blocks and the rows that centers start from",
    )  # fmt: skip


def _timed(plan: Plan, reader: RowReader, n_readers: int) -> tuple[int, float]:
    """Samples read, and the seconds that took, with as many readers as consolidate has."""
    ranges = list(_ranges(plan))
    n_done = 0
    began = time.perf_counter()

    def read(one: tuple[str, int, int]) -> int:
        if time.perf_counter() - began > _MOST_SECONDS:
            return 0
        split, start, stop = one
        reader.read(split, start, stop, np.empty((stop - start, *plan.schema.item_shape), plan.schema.dtype))
        return stop - start

    with ThreadPoolExecutor(n_readers, thread_name_prefix="estimate") as pool:
        n_done = sum(pool.map(read, ranges))
    return n_done, time.perf_counter() - began


def _ranges(plan: Plan) -> Iterator[tuple[str, int, int]]:
    """Row ranges spread over the splits; the first ones read are spread already, should time run out."""
    rows = max(1, _PLACE_BYTES // plan.schema.item_bytes)
    places = [(s.name, start, min(start + rows, s.n_rows)) for s in plan.splits for start in range(0, s.n_rows, rows)]
    step = max(1, len(places) // _PLACES)
    chosen = places[::step][:_PLACES]
    for offset in range(8):
        yield from chosen[offset::8]


def _memory(plan: Plan, n_readers: int) -> int:
    """Of a consolidation by threads: as many readers as half of the memory holds, a chunk and its file each."""
    each = _CHUNKS_A_WORKER * plan.largest_chunk_bytes
    fit = max(1, (budget.memory_limit() // 2 - budget.BASE_BYTES) // each)
    return int(budget.BASE_BYTES + min(n_readers, fit, len(plan.partitions)) * each)


def _for_clustering(plan: Plan) -> int:
    """The least with which k-means runs: one worker, whose blocks are whole chunks, and a sample of rows twice."""
    block = max(_BLOCK_BYTES, plan.largest_chunk_bytes)
    sample = min(_SAMPLE_BYTES, max((s.n_rows for s in plan.splits), default=0) * plan.schema.item_bytes)
    return int(budget.BASE_BYTES + _BLOCKS * block + 2 * sample)
