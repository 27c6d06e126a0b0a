"""Small published datasets with known values, for the tests of what comes after consolidation."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from matrices import blobs
from sources import ITEM, OPTIONS, write_shard

from tsclust_ooc.pipeline.consolidating import consolidate
from tsclust_ooc.rows import DatasetRows

SIZES = {"train": 60, "val": 23, "test": 9}
"""Samples of the splits: 3, 2 and 1 chunks."""


def three_splits(seed=0, sizes=SIZES, item=ITEM, dtype=np.float32):
    """Samples around five points: split -> (sample, variable, feature)."""
    n = sum(sizes.values())
    x = blobs(n, int(np.prod(item)), k=5, seed=seed, spread=2.0, dtype=dtype).reshape(n, *item)
    return dict(zip(sizes, np.split(x, np.cumsum([*sizes.values()])[:-1]), strict=True))


def write_source(folder: Path, samples) -> Path:
    """One shard a sample; split 'all' lies in the folder itself."""
    for split, x in samples.items():
        for i, sample in enumerate(x):
            write_shard(folder / ("" if split == "all" else split) / f"{i}.h5", sample)
    return folder


def publish(folder: Path, samples, **options) -> Path:
    """`folder/dataset` of `samples`, consolidated from `folder/source`."""
    source = write_source(folder / "source", samples)
    consolidate(source, folder / "dataset", replace(OPTIONS, scratch=folder, **options))
    return folder / "dataset"


def rows_of(samples, view):
    """The rows of a view, by numpy, as they are read (float32) but exact (float64)."""
    if view == "mean":
        return samples.mean(axis=1, dtype=np.float64).astype(samples.dtype).astype(np.float64)
    return samples.reshape(-1, samples.shape[-1] if view == "variable" else samples[0].size).astype(np.float64)


def count_reads(monkeypatch) -> Counter:
    """Counts every read of a block from now on: (split, block) -> times."""
    reads, read = Counter(), DatasetRows.read

    def counted(self, block):
        reads[Path(self.folder).parent.name, block] += 1
        return read(self, block)

    monkeypatch.setattr(DatasetRows, "read", counted)
    return reads
