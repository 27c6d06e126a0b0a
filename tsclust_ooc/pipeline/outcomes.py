"""What a consolidation says when it is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tsclust_ooc.dataset import Manifest
from tsclust_ooc.plan import Plan
from tsclust_ooc.provenance import Meter


@dataclass(frozen=True)
class Consolidated:
    """Result of consolidate. `reused`: the dataset was there already, made from these very shards and options.

    The `n_chunks` chunks lie in `n_files` files: fewer with --sharding. Of an append `n_appended` samples of
    `n_appended_shards` shards are new; `n_changed` committed shards have another stamp now, `n_vanished` are gone.
    `n_retries` reads were tried again, for the disk or the network failed at them in passing.
    """

    dataset: str
    n_shards: int
    n_samples: int
    n_rejected: int
    bytes: int
    n_chunks: int
    n_files: int
    item_shape: tuple[int, ...]
    dtype: str
    splits: dict[str, int]
    seconds: float
    peak_bytes: int
    dashboard: str
    digest: str
    reused: bool
    n_appended: int = 0
    n_appended_shards: int = 0
    n_changed: int = 0
    n_vanished: int = 0
    n_retries: int = 0


@dataclass(frozen=True)
class DryRun:
    """What consolidate would do: partitions, chunks, bytes of disk and of memory here, with how many workers.

    An append would add `n_appended` samples of `n_appended_shards` shards, and write `n_new_partitions` partitions.
    """

    dataset: str
    n_shards: int
    n_samples: int
    n_rejected: int
    n_partitions: int
    n_chunks: int
    disk_bytes: int
    memory_bytes: int
    n_workers: int
    n_new_partitions: int
    n_appended: int = 0
    n_appended_shards: int = 0
    n_changed: int = 0
    n_vanished: int = 0


def result(manifest: Manifest, final: Path, meter: Meter, *, dashboard: str, plan: Plan | None = None) -> Consolidated:
    """What a command says of the dataset that it published, by its `plan`, or found."""
    n_appended, n_appended_shards = new_in(plan) if plan is not None else (0, 0)
    return Consolidated(
        dataset=str(final), n_shards=sum(s.n_shards for s in manifest.splits.values()),
        n_samples=sum(s.shape[0] for s in manifest.splits.values()), n_rejected=manifest.n_rejected,
        bytes=sum(entry.n_bytes for entry in manifest.files.values()),
        n_chunks=sum(-(-s.shape[0] // s.chunk_shape[0]) for s in manifest.splits.values()),
        n_files=sum("/c/" in name for name in manifest.files), item_shape=manifest.schema.item_shape,
        dtype=manifest.schema.dtype, splits={name: s.shape[0] for name, s in manifest.splits.items()},
        seconds=round(meter.elapsed(), 3), peak_bytes=meter.peak_bytes, dashboard=dashboard,
        digest=manifest.digest, reused=plan is None, n_appended=n_appended, n_appended_shards=n_appended_shards,
    )  # fmt: skip


def new_in(plan: Plan) -> tuple[int, int]:
    """Samples and shards that a plan appends; none where it appends to nothing."""
    if plan.base is None:
        return 0, 0
    return plan.n_rows - sum(plan.base.rows.values()), len(plan.shards) - plan.base.n_shards
