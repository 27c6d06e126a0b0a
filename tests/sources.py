"""Small folders of shards, as extractors write them, with the values that went in.

Invariant: every builder returns what it wrote, in the order that a reader must give it back, and never reads it from
our own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest

from tsclust_ooc.pipeline.consolidating import ConsolidateOptions
from tsclust_ooc.shards.parsers import Parsers

KEY = "embeddings"
ITEM = (3, 16)
ITEM_BYTES = 3 * 16 * 4
SMALL_CHUNKS = "4096"
"""The smallest chunk that may be asked for: 21 samples of ITEM."""

OPTIONS = ConsolidateOptions(chunk_bytes=SMALL_CHUNKS, workers=2)


def values(n: int, item: tuple[int, ...] = ITEM, dtype: str = "<f4", seed: int = 0) -> np.ndarray:
    """`n` seeded samples."""
    return np.random.default_rng(seed).standard_normal((n, *item)).astype(dtype)


def write_shard(path: Path, array: np.ndarray, key: str = KEY, **options: Any) -> None:
    """One file with one dataset; `options` go to h5py (chunks, compression, fletcher32)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset(key, data=array, **options)


def read_shard(path: Path, key: str = KEY) -> np.ndarray:
    """The dataset as h5py reads it."""
    with h5py.File(path, "r") as file:
        return file[key][()]


def item_per_file(folder: Path, n: int = 50, *, item: tuple[int, ...] = ITEM, dtype: str = "<f4", seed: int = 0,
                  stored: Callable[[np.ndarray], np.ndarray] = lambda x: x, **options: Any) -> np.ndarray:  # fmt: skip
    """`n` shards 0.h5 ... of one sample each; `stored` reshapes a sample before it is written."""
    samples = values(n, item, dtype, seed)
    for i, sample in enumerate(samples):
        write_shard(folder / f"{i}.h5", stored(sample), **options)
    return samples


def three_splits(folder: Path, sizes: Sequence[int] = (50, 9, 23), **options: Any) -> dict[str, np.ndarray]:
    """train/, val/ and test/ with one sample a shard."""
    names = ("train", "val", "test")
    return {
        name: item_per_file(folder / name, n, seed=i, **options)
        for i, (name, n) in enumerate(zip(names, sizes, strict=True))
    }


def rows_per_file(folder: Path, counts: Sequence[int] = (5, 0, 70, 1, 30), *, item: tuple[int, ...] = (16,),
                  dtype: str = "<f4", key: str = "features", **options: Any) -> np.ndarray:  # fmt: skip
    """One shard for each of `counts`, with that many samples."""
    samples = values(sum(counts), item, dtype)
    ends = np.cumsum(counts)
    for i, (n, end) in enumerate(zip(counts, ends, strict=True)):
        write_shard(folder / f"slide_{i}.h5", samples[end - n : end], key, **(options if n else {}))
    return samples


def dataset_per_item(folder: Path, ids: Mapping[str, Sequence[str]], item: tuple[int, ...] = ITEM) -> np.ndarray:
    """Files with one dataset an id; the ids of each file are given in the order in which they must be read."""
    samples = values(sum(map(len, ids.values())), item)
    rows = iter(samples)
    for name, inside in ids.items():
        folder.mkdir(parents=True, exist_ok=True)
        with h5py.File(folder / name, "w") as file:
            for one in inside:
                file[one] = next(rows)
    return samples


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`: relative name -> bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def data_of(dataset: Path) -> dict[str, bytes]:
    """What must not depend on who made a dataset: all but its manifest."""
    return {name: data for name, data in contents(dataset).items() if name != "manifest.json"}


class _Kept(Parsers):
    def __exit__(self, *exc: object) -> None:
        """Stay: the next user comes soon."""


@contextmanager
def shared_parsers(*modules: ModuleType) -> Iterator[None]:
    """One pair of parser processes for all that `modules` do inside the block; to start one costs 0.3 s."""
    kept = _Kept(2)
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "Parsers", lambda n: kept)
        yield
    Parsers.__exit__(kept)
