"""The nouns of a source: Shard, Schema, Problem, and the structure HDF5 found in one file.

Invariant: all are frozen, and a Schema says everything about a sample that must agree between shards.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

ITEM_PER_FILE, ROWS_PER_FILE, DATASET_PER_ITEM = "item-per-file", "rows-per-file", "dataset-per-item"
LAYOUTS = (ITEM_PER_FILE, ROWS_PER_FILE, DATASET_PER_ITEM)
FIRST, LAST = "first", "last"
FEATURE_AXES = (LAST, FIRST)
TEXT, INTEGER = "text", "integer"


@dataclass(frozen=True, slots=True)
class Shard:
    """One input file as it was surveyed: `path` relative to the source, `n_samples` in it, and its stamp."""

    path: str
    split: str
    size: int
    mtime_ns: int
    n_samples: int


@dataclass(frozen=True)
class Problem:
    """Why a shard is left out: `code` from a small closed set, `detail` for a person."""

    path: str
    code: str
    detail: str


class ShardError(Exception):
    """A shard that cannot be used; carries the Problem (its path may still be empty)."""

    def __init__(self, code: str, detail: str, path: str = "") -> None:
        super().__init__(f"{path}: {code}: {detail}")
        self.problem = Problem(path, code, detail)


@dataclass(frozen=True)
class Schema:
    """What all shards of a source agree on.

    `item_shape` is (variable, feature) or (feature,), `dtype` little-endian numpy ('<f4'), `key` the dataset that
    holds the samples ('' when every dataset is one). With `feature_axis` 'first' a shard stores a sample as
    (feature, variable); `item_shape` is the shape it is given. `ids` is the dataset that names the samples of a file
    of rows ('' when they have no names of their own).
    """

    layout: str
    key: str
    item_shape: tuple[int, ...]
    dtype: str
    feature_axis: str = LAST
    ids: str = ""

    @cached_property
    def item_bytes(self) -> int:
        """Bytes of one sample."""
        return math.prod(self.item_shape) * np.dtype(self.dtype).itemsize

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of one sample as it lies in a shard."""
        return self.item_shape[::-1] if self.feature_axis == FIRST else self.item_shape

    @property
    def dimension_names(self) -> tuple[str, ...]:
        """Names of the axes of an array of samples."""
        return ("sample", "variable", "feature") if len(self.item_shape) == 2 else ("sample", "feature")


@dataclass(frozen=True)
class Wanted:
    """What a user says of a source; None where it is to be guessed, or told by folders (`split_pattern`)."""

    layout: str | None = None
    key: str | None = None
    feature_axis: str | None = None
    ids: str | None = None
    split_pattern: str | None = None


AS_GUESSED = Wanted()


@dataclass(frozen=True)
class Member:
    """One dataset in a file: numpy `shape` and `dtype` (as stored), where its bytes lie, what forbids reading it.

    `offset` is that of contiguous, unfiltered data, -1 otherwise. `code` is '' for a dataset that may be read as
    vectors. One that may be read as names of samples instead says in `ids` what they are: 'text' or 'integer'.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    code: str
    detail: str
    ids: str = ""

    @property
    def n_bytes(self) -> int:
        """Bytes of the data, unpacked."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize if self.dtype else 0


@dataclass(frozen=True)
class Structure:
    """What HDF5 says is in a file. `warnings` are oddities that do not forbid reading."""

    members: tuple[Member, ...]
    warnings: tuple[str, ...]


_DIGITS = re.compile(r"([0-9]+)")


def natural_key(path: str) -> list[list[tuple[int, str]]]:
    """Sort key that puts 2.h5 before 10.h5, folder by folder; equal numbers fall back to their spelling."""
    folder, _, name = path.rpartition("/")
    return [*_folder_key(folder), _name_key(name)]


def _name_key(name: str) -> list[tuple[int, str]]:
    words = _DIGITS.split(name)  # text, digits, text, digits, ...
    words[1::2] = [_number_key(digits) for digits in words[1::2]]
    words[::2] = [(-1, text) for text in words[::2]]
    return words  # type: ignore[return-value]


def _number_key(digits: str) -> tuple[int, str]:
    # Not int(): a dataset may be named by more digits than Python turns into a number.
    number = digits.lstrip("0")
    return len(number), f"{number} {digits}"


@lru_cache(maxsize=1024)
def _folder_key(folder: str) -> list[list[tuple[int, str]]]:
    return [_name_key(part) for part in folder.split("/")] if folder else []
