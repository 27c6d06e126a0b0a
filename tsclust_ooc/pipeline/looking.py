"""inspect: what is in a source, what it would become, and which command comes next. Changes nothing.

    survey ── census      how shards differ, what is missing       estimating    time, disk and memory to come
           └─ examining   --deep: one read of all rows: copies, zeros, NaN, splits of different spaces

Invariant: what `inspect` guesses is what consolidate guesses of the same source; `next_command` holds what it needs.
"""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tsclust_ooc import budget, census
from tsclust_ooc.census import Distribution, Tally
from tsclust_ooc.pipeline.estimating import Estimate, estimate
from tsclust_ooc.pipeline.examining import Examination, examine
from tsclust_ooc.plan import Options, Plan, make_plan
from tsclust_ooc.progress import Listener, silent
from tsclust_ooc.reading import RowReader
from tsclust_ooc.shards.parsers import Parsers
from tsclust_ooc.shards.schema import Problem, Shard, natural_key, split_of
from tsclust_ooc.shards.survey import Survey, survey
from tsclust_ooc.staging import NO_STAGE


@dataclass(frozen=True)
class InspectOptions:
    """Options of inspect.

    Attributes
    ----------
    layout
        How datasets map to samples: item-per-file, rows-per-file or dataset-per-item. Default: guessed, and why.
    key
        Name of the dataset that holds the vectors. Default: guessed.
    feature_axis
        Which axis of a stored sample is the feature: last, or first for (feature, variable) samples. Default: guessed,
        the longer.
    ids
        Name of the dataset that names the samples of a shard, one string or integer each; '' for none. Default:
        guessed.
    deep
        Read all data once too: samples that are copies, zero or constant, NaN and infinities, splits that do not seem
        to lie in one space.
    """

    layout: str | None = None
    key: str | None = None
    feature_axis: str | None = None
    ids: str | None = None
    deep: bool = False


@dataclass(frozen=True)
class SplitSummary:
    """One split of a source. `first` and `last` are shard paths; `missing` numbers absent between them (first ten)."""

    n_shards: int
    n_samples: int
    n_bytes: int
    first: str
    last: str
    missing: tuple[str, ...]
    n_missing: int


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found; `dataset_bytes` is the disk a dataset will take, `memory_bytes` what this job may use.

    `kinds` are the shapes and types of samples, those that fit first; `sizes` the bytes of shards as files,
    `samples_a_shard` how many each holds. `deep` is there when all data were read.
    """

    source: str
    n_shards: int
    n_samples: int
    bytes: int
    key: str
    layout: str
    reason: str
    item_shape: tuple[int, ...]
    dtype: str
    feature_axis: str
    ids: str
    splits: dict[str, SplitSummary]
    kinds: tuple[Tally, ...]
    sizes: Distribution
    samples_a_shard: Distribution
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    n_other_files: int
    dataset_bytes: int
    n_chunks: int
    memory_bytes: int
    estimate: Estimate
    next_command: str
    deep: Examination | None


def inspect(source: str | Path, options: InspectOptions = InspectOptions(), listener: Listener = silent) -> Inspection:
    """Survey every shard of `source` and say what is there; with `options.deep`, read all of it once.

    Raises BadInput when `source` is not there, holds no shard, or none that can be read.
    """
    given = Path(source).expanduser()
    with Parsers(budget.available_cores()) as parsers:
        parsers.warm_up()
        found = survey(
            given, parsers, layout=options.layout, key=options.key, feature_axis=options.feature_axis, ids=options.ids,
            listener=listener,
        )  # fmt: skip
        plan = make_plan(found, Options())
        reader = RowReader(plan, parsers, NO_STAGE)
        expected = estimate(plan, reader)
        examined = examine(plan, reader, listener) if options.deep else None
    return _summarize(found, plan, given, options, expected, examined)


def _summarize(
    found: Survey, plan: Plan, given: Path, options: InspectOptions, expected: Estimate, examined: Examination | None
) -> Inspection:
    """All that was found of the source that the user gave as `given`."""
    problems = _together(found.problems, examined)
    return Inspection(
        source=found.source, n_shards=len(found.shards), n_samples=found.n_samples, bytes=found.n_bytes,
        key=found.schema.key, layout=found.schema.layout, reason=found.reason, item_shape=found.schema.item_shape,
        dtype=found.schema.dtype, feature_axis=found.schema.feature_axis, ids=found.schema.ids, splits=_splits(found),
        kinds=census.kinds(found.schema, found.shards, problems),
        sizes=census.distribution(found.shards, lambda shard: shard.size),
        samples_a_shard=census.distribution(found.shards, lambda shard: shard.n_samples), problems=problems,
        notes=found.notes, n_other_files=found.n_other, dataset_bytes=plan.disk_bytes, n_chunks=plan.n_chunks,
        memory_bytes=budget.memory_limit(), estimate=expected,
        next_command=_next_command(found, given, options, problems), deep=examined,
    )  # fmt: skip


def _together(surveyed: Sequence[Problem], examined: Examination | None) -> tuple[Problem, ...]:
    """Problems of the survey and of the read, in the order of a survey."""
    read = examined.problems if examined is not None else ()
    return tuple(sorted([*surveyed, *read], key=lambda problem: natural_key(problem.path)))


def _splits(found: Survey) -> dict[str, SplitSummary]:
    bad: dict[str, list[str]] = defaultdict(list)
    for problem in found.problems:  # they are there, only of no use
        bad[split_of(problem.path)].append(problem.path)
    return {name: _split(shards, bad[name]) for name, shards in found.splits().items()}


def _split(shards: Sequence[Shard], bad: Sequence[str]) -> SplitSummary:
    missing = census.gaps([*(shard.path for shard in shards), *bad])
    return SplitSummary(
        len(shards), sum(s.n_samples for s in shards), sum(s.size for s in shards), shards[0].path, shards[-1].path,
        missing.first, missing.n_missing,
    )  # fmt: skip


def _next_command(found: Survey, given: Path, options: InspectOptions, problems: Sequence[Problem]) -> str:
    words = ["tsclust", "consolidate", str(given), given.resolve().name or "dataset"]
    if words[-1] == str(given):
        words[-1] += "_dataset"
    words += _reading(found, options)
    words += ["--on-bad", "skip"] if problems else []
    return shlex.join(words)


def _reading(found: Survey, options: InspectOptions) -> list[str]:
    """How to read the source, where the user said so, or where the guess was in doubt: then its reason names the flag.

    Spelled out, it stays what it is when further shards come.
    """
    words = []
    for name in ("layout", "key", "feature_axis", "ids"):
        flag, told = f"--{name.replace('_', '-')}", getattr(options, name)
        if told is None and name in ("layout", "feature_axis") and f"{flag} " in found.reason:
            told = getattr(found.schema, name)
        words += [] if told is None else [flag, told]
    return words
