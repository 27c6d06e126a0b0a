"""What a survey counted: how sizes and shapes are distributed, which shards are odd, which numbers are missing.

Invariant: pure, and every shard of the survey is counted; names are given for the first few, numbers for all.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tsclust_ooc.shards.schema import Problem, Schema, Shard

NAMED = 10
"""Names that are given of a group of any size."""

_COMMON = 5  # values of a distribution that are listed
_MOSTLY = 0.9  # of the shards alike: then the others are odd, and named
_OTHER_KINDS = ("shape", "dim", "dtype")
_NUMBERED = re.compile(r"(.*?)([0-9]+)(\.[^.]*)")


@dataclass(frozen=True)
class Tally:
    """A value, how many shards have it, and the paths of the first ten."""

    value: str
    n_shards: int
    first: tuple[str, ...]


@dataclass(frozen=True)
class Distribution:
    """How a number differs between shards: its quantiles, its most common values (of the least first), the odd shards.

    Where nine of ten shards have the same value the others are odd: `n_odd` of them, `odd` the first ten.
    """

    n_distinct: int
    least: int
    median: int
    most: int
    common: tuple[tuple[int, int], ...]
    odd: tuple[str, ...]
    n_odd: int


@dataclass(frozen=True)
class Gaps:
    """Numbers absent from shards that are numbered: how many, and the names that the first ten would have."""

    n_missing: int
    first: tuple[str, ...]


def distribution(shards: Sequence[Shard], number: Callable[[Shard], int]) -> Distribution:
    """The distribution of `number` over shards (at least one); `common` holds pairs (value, shards)."""
    values = [number(shard) for shard in shards]
    counts = Counter(values)
    usual, n_usual = counts.most_common(1)[0]
    odd = [s.path for s, value in zip(shards, values, strict=True) if value != usual]
    named = bool(odd) and n_usual >= _MOSTLY * len(values)
    return Distribution(
        n_distinct=len(counts), least=min(values), median=int(np.median(values)), most=max(values),
        common=tuple(counts.most_common(_COMMON)), odd=tuple(odd[:NAMED]) if named else (),
        n_odd=len(odd) if named else 0,
    )  # fmt: skip


def kinds(schema: Schema, shards: Sequence[Shard], problems: Iterable[Problem]) -> tuple[Tally, ...]:
    """Shapes and types of the samples: those that fit the schema, then what the shards hold that do not fit it."""
    usual = f"{schema.item_shape} {np.dtype(schema.dtype).name}"
    other: dict[str, list[str]] = defaultdict(list)
    for problem in problems:
        if problem.code in _OTHER_KINDS:
            other[problem.detail.partition(", most shards")[0]].append(problem.path)
    tallies = [Tally(usual, len(shards), tuple(shard.path for shard in shards[:NAMED]))]
    by_count = sorted(other.items(), key=lambda one: -len(one[1]))
    return (*tallies, *(Tally(what, len(paths), tuple(paths[:NAMED])) for what, paths in by_count))


def gaps(paths: Iterable[str]) -> Gaps:
    """What is missing where paths count: 0.h5, 1.h5, ... or train_0007.h5, ..., each folder and prefix by itself.

    Numbers of which more than half are absent do not count anything, and have no gaps.
    """
    runs: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    folders = set[str]()
    for path in paths:
        folder, _, name = path.rpartition("/")
        folders.add(folder)
        if found := _NUMBERED.fullmatch(name):
            prefix, digits, suffix = found.groups()
            runs[folder, prefix, suffix].append(digits)
    missing, n_missing = list[str](), 0
    for (folder, prefix, suffix), digits in runs.items():
        place = f"{folder}/" if folder and len(folders) > 1 else ""
        absent = _absent(digits)
        n_missing += len(absent)
        missing += [f"{place}{prefix}{number}{suffix}" for number in absent[:NAMED]]
    return Gaps(n_missing, tuple(missing[:NAMED]))


def _absent(digits: Sequence[str]) -> list[str]:
    """Numbers between the least and the largest that are not among `digits`, as those are written."""
    if max(map(len, digits)) > 18:  # a digest or a time, no count
        return []
    numbers = set(map(int, digits))
    low, high = min(numbers), max(numbers)
    if high - low + 1 > 2 * len(numbers):
        return []
    width = len(digits[0]) if len({len(d) for d in digits}) == 1 else 0
    return [f"{n:0{width}d}" for n in range(low, high) if n not in numbers]
