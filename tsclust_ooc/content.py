"""What samples hold: digests that find copies; zeros, constants, NaN and infinities.

Invariant: a sample is judged by its own bytes alone, so what is found does not depend on how rows were cut into blocks.
Equal digests mean equal bytes: xxh3-128 of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from tsclust_ooc.plan import Plan
from tsclust_ooc.shards.schema import ITEM_PER_FILE

ZERO, CONSTANT, NAN, INF, UNREAD = 1, 2, 4, 8, 16
"""Flags of a sample; ZERO excludes CONSTANT, and UNREAD all others."""

DIGEST_BYTES = 16

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Looked:
    """Of n samples: digests (n, 2) uint64, flags (n,) uint8, and how many values are NaN or infinite."""

    digests: Array
    flags: Array
    n_nan: int
    n_inf: int


def look_at(samples: Array) -> Looked:
    """Look at samples (n, ...), C-contiguous, of any float type."""
    rows = samples.reshape(len(samples), -1)
    digests = b"".join(xxhash.xxh3_128_digest(row.data) for row in rows)
    low, high = rows.min(axis=1), rows.max(axis=1)  # NaN wins both
    flags = np.where(low == high, np.where(low == 0, ZERO, CONSTANT), 0).astype(np.uint8)
    n_nan = n_inf = 0
    for i in np.flatnonzero(~(np.isfinite(low) & np.isfinite(high))):
        nan, inf = int(np.isnan(rows[i]).sum()), int(np.isinf(rows[i]).sum())
        flags[i] = (NAN if nan else 0) | (INF if inf else 0)
        n_nan, n_inf = n_nan + nan, n_inf + inf
    return Looked(np.frombuffer(digests, np.uint64).reshape(-1, 2), flags, n_nan, n_inf)


def groups_of_equals(digests: Array, known: Array) -> Iterator[Array]:
    """Indices, rising, of each group of two or more equal digests; those where `known` is False are left out."""
    rows = np.flatnonzero(known)
    order = rows[np.lexsort((rows, digests[rows, 1], digests[rows, 0]))]
    alike = (digests[order[1:]] == digests[order[:-1]]).all(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], alike, [0])).astype(np.int8)))
    for first, last in edges.reshape(-1, 2):
        yield order[first : last + 1]


def name_of(plan: Plan, split: str, row: int) -> str:
    """A sample as a person finds it: the path of its shard, and which sample of the shard where there are more."""
    (segment,) = plan.segments(split, row, row + 1)
    only = plan.schema.layout == ITEM_PER_FILE
    return segment.shard.path if only else f"{segment.shard.path}:{segment.start}"


def shards_of(plan: Plan, split: str, rows: Sequence[int], most: int) -> tuple[str, ...]:
    """Paths of the first `most` different shards that hold `rows` of a split."""
    found: dict[str, None] = {}
    for row in rows:
        for segment in plan.segments(split, row, row + 1):
            found[segment.shard.path] = None
        if len(found) == most:
            break
    return tuple(found)
