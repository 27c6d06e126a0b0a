"""inspect: what is in a source, what it would become, and which command comes next. Changes nothing."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from tsclust_ooc import budget
from tsclust_ooc.plan import Options, make_plan
from tsclust_ooc.progress import Listener, silent
from tsclust_ooc.shards.parsers import Parsers
from tsclust_ooc.shards.schema import Problem
from tsclust_ooc.shards.survey import Survey, survey


@dataclass(frozen=True)
class InspectOptions:
    """Options of inspect.

    Attributes
    ----------
    layout
        How datasets map to samples: item-per-file, rows-per-file or dataset-per-item. Default: guessed, and why.
    key
        Name of the dataset that holds the vectors. Default: guessed.
    """

    layout: str | None = None
    key: str | None = None


@dataclass(frozen=True)
class SplitSummary:
    """One split of a source. `first` and `last` are shard paths; `missing` numbers absent between them (first few)."""

    n_shards: int
    n_samples: int
    n_bytes: int
    first: str
    last: str
    missing: tuple[str, ...]
    n_missing: int


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found; `dataset_bytes` is the disk a dataset will take, `memory_bytes` what this job may use."""

    source: str
    n_shards: int
    n_samples: int
    bytes: int
    key: str
    layout: str
    reason: str
    item_shape: tuple[int, ...]
    dtype: str
    splits: dict[str, SplitSummary]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    n_other_files: int
    dataset_bytes: int
    n_chunks: int
    memory_bytes: int
    next_command: str


def inspect(source: str | Path, options: InspectOptions = InspectOptions(), listener: Listener = silent) -> Inspection:
    """Survey every shard of `source` and say what is there."""
    given = Path(source).expanduser()
    with Parsers(budget.available_cores()) as parsers:
        parsers.warm_up()
        found = survey(given, parsers, layout=options.layout, key=options.key, listener=listener)
    return summarize(found, given, options)


def summarize(found: Survey, given: Path, options: InspectOptions) -> Inspection:
    """An Inspection of a survey of the source that the user gave as `given`."""
    plan = make_plan(found, Options())
    return Inspection(
        source=found.source, n_shards=len(found.shards), n_samples=found.n_samples, bytes=found.n_bytes,
        key=found.schema.key, layout=found.schema.layout, reason=found.reason, item_shape=found.schema.item_shape,
        dtype=found.schema.dtype, splits=_splits(found), problems=found.problems, notes=found.notes,
        n_other_files=found.n_other, dataset_bytes=plan.disk_bytes, n_chunks=plan.n_chunks,
        memory_bytes=budget.memory_limit(), next_command=_next_command(found, given, options),
    )  # fmt: skip


def _splits(found: Survey) -> dict[str, SplitSummary]:
    summaries = {}
    for name, shards in found.splits().items():
        missing = _missing([shard.path for shard in shards])
        summaries[name] = SplitSummary(
            len(shards), sum(s.n_samples for s in shards), sum(s.size for s in shards),
            shards[0].path, shards[-1].path, tuple(missing[:5]), len(missing),
        )  # fmt: skip
    return summaries


def _missing(paths: list[str]) -> list[str]:
    """Names absent from a run 0.h5, 1.h5, ..., when the paths are such a run with few gaps; else nothing."""
    numbers, suffix = set[int](), ""
    for path in paths:
        stem, _, suffix = path.rpartition("/")[2].rpartition(".")
        if not stem.isdecimal():
            return []
        numbers.add(int(stem))
    span = max(numbers) - min(numbers) + 1
    if span > 2 * len(numbers):
        return []
    return [f"{n}.{suffix}" for n in range(min(numbers), max(numbers)) if n not in numbers]


def _next_command(found: Survey, given: Path, options: InspectOptions) -> str:
    words = ["tsclust", "consolidate", str(given), given.resolve().name or "dataset"]
    if words[-1] == str(given):
        words[-1] += "_dataset"
    words += ["--layout", options.layout] if options.layout else []
    words += ["--key", options.key] if options.key else []
    words += ["--on-bad", "skip"] if found.problems else []
    return shlex.join(words)
