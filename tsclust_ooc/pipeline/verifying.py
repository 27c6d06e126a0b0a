"""verify: proof that a dataset holds what its manifest says, and what its shards hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tsclust_ooc import budget, records
from tsclust_ooc.dataset import SHARDS, Damage, Dataset, open_dataset, read_rejected, read_shards
from tsclust_ooc.dataset import verify as verify_dataset
from tsclust_ooc.pipeline import origins
from tsclust_ooc.pipeline.origins import Origin
from tsclust_ooc.plan import Partition, Plan, make_plan
from tsclust_ooc.progress import Listener, silent
from tsclust_ooc.reading import RowReader
from tsclust_ooc.runtime import ClusterSpec, open_runtime
from tsclust_ooc.shards.parsers import Parsers
from tsclust_ooc.shards.schema import Wanted
from tsclust_ooc.shards.splits import split_order
from tsclust_ooc.shards.survey import Survey, survey
from tsclust_ooc.units import plural

Mapper = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Verified:
    """Result of verify: what was checked, and what is damaged or different."""

    dataset: str
    n_files: int
    bytes: int
    n_samples_compared: int
    damage: tuple[Damage, ...]


def verify(
    dataset: str | Path,
    against: str | Path | Sequence[str | Path] | None = None,
    listener: Listener = silent,
    *,
    workers: int | None = None,
) -> Verified:
    """Check every byte of a dataset against its manifest; with `against`, every sample against its shard too.

    `against` is what the dataset was made from: a folder, a list of paths, or a sequence of these. The folder that all
    of them have in common will do as well, if it holds no other shards.
    """
    opened = open_dataset(dataset, check=False)
    limits = budget.resolve(None, workers)
    spec = ClusterSpec("threads", limits.n_workers, limits.memory_bytes, Path())
    with open_runtime(spec, listener) as runtime:
        damage = verify_dataset(opened, mapper=runtime.mapper, listener=listener)
        n_compared = 0
        if against is not None and not damage:
            n_compared, damage = _compare(opened, *origins.gathered(against), runtime.mapper, listener)
    manifest = opened.manifest
    total = sum(entry.n_bytes for entry in manifest.files.values())
    return Verified(str(opened.path), len(manifest.files), total, n_compared, tuple(damage))


def _compare(
    opened: Dataset, source: Origin, also: Sequence[Path], mapper: Mapper, listener: Listener
) -> tuple[int, list[Damage]]:
    """Read every sample from its shard again and compare bits."""
    schema, damage, n_compared = opened.schema, list[Damage](), 0
    with Parsers(budget.available_cores()) as parsers, origins.opened(source, parsers.patience) as stage:
        told = Wanted(schema.layout, schema.key, schema.feature_axis, schema.ids)
        listing = origins.listed(source, also, parsers.patience)
        found = survey(listing, parsers, told, listener=listener, local=origins.local_in(stage))
        plan = make_plan(_as_committed(found, opened), opened.manifest.options)
        reader = RowReader(plan, parsers, stage)
        for name in dict.fromkeys([*opened, *(split.name for split in plan.splits)]):
            differing = _compare_shards(opened, plan, name)
            damage += differing
            if differing:
                continue
            ranges = [p for p in plan.partitions if p.split == name]
            for p, rows in zip(ranges, mapper(_Comparison(opened, reader), ranges), strict=True):
                damage += rows
                n_compared += p.stop - p.start
                listener.advance("compare", n_compared, plan.n_rows)
    return n_compared, damage


def _as_committed(found: Survey, opened: Dataset) -> Survey:
    """The survey with its shards in the splits and the order that the dataset has them in, and others after them.

    Splits may come from an expression that only consolidate was told, and what was appended lies where it was appended.
    Shards that the dataset left out are left out here.
    """
    if SHARDS not in opened.manifest.files:
        return found
    committed = {s.path: (i, s.split) for i, s in enumerate(read_shards(opened.path / SHARDS))}
    left_out = {problem.path for problem in read_rejected(opened.path)} - committed.keys()
    kept = [replace(s, split=committed.get(s.path, (0, s.split))[1]) for s in found.shards if s.path not in left_out]
    last = (len(committed), "")
    kept.sort(key=lambda shard: (split_order(shard.split), committed.get(shard.path, last)[0]))
    return replace(found, shards=tuple(kept))


def _compare_shards(opened: Dataset, plan: Plan, split: str) -> list[Damage]:
    """Shards of a split that the source no longer has, has in addition, or has with another number of samples."""
    if plan.schema != opened.schema:
        return [Damage(split, f"the source now holds {plan.schema}, the dataset {opened.schema}")]
    paths = opened[split].index().column("shard").to_pylist() if split in opened else []
    ours = Counter(records.text_to_path(path) for path in paths)
    theirs = plan.n_kept(split)
    gone = [Damage(path, "in the dataset, not in the source") for path in ours if path not in theirs]
    new = [Damage(path, "in the source, not in the dataset") for path in theirs if path not in ours]
    other = [
        Damage(path, f"now holds {plural(theirs[path], 'sample')}, the dataset has {n} of it")
        for path, n in ours.items() if path in theirs and theirs[path] != n
    ]  # fmt: skip
    differing = gone + new + other
    return differing or ([] if list(ours) == list(theirs) else [Damage(split, "its shards are in another order")])


@dataclass(frozen=True)
class _Comparison:
    opened: Dataset
    reader: RowReader

    def __call__(self, partition: Partition) -> list[Damage]:
        chunks = self.reader.plan.chunks_of(partition)  # a partition may be a zarr shard of gigabytes
        return [found for start, stop in chunks for found in self._compare(partition.split, start, stop)]

    def _compare(self, name: str, start: int, stop: int) -> list[Damage]:
        split = self.opened[name]
        stored = np.asarray(split.array[start:stop])
        read = np.empty_like(stored)
        ids, problems = self.reader.read(name, start, stop, read)
        if problems:
            return [Damage(p.path, f"{p.code}: {p.detail}") for _, p in problems]
        same = (_bits(stored) == _bits(read)).reshape(len(stored), -1).all(axis=1)
        return [
            Damage(ids.shards[i], f"sample {ids.shard_rows[i]} differs from row {start + i} of {split.name}")
            for i in np.flatnonzero(~same)
        ]


def _bits(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The bits of floats as integers, so that NaN equals NaN and 0.0 differs from -0.0."""
    return x.view(f"u{x.dtype.itemsize}")
