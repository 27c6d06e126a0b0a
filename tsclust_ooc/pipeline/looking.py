"""inspect: what is in a source, what it would become, and which command comes next. Changes nothing.

    survey ── census      how shards differ, what is missing       estimating    time, disk and memory to come
           └─ examining   --deep: one read of all rows: copies, zeros, NaN, splits of different spaces

Invariant: what `inspect` guesses is what consolidate guesses of the same source; `next_command` holds what it needs.
"""

from __future__ import annotations

import contextlib
import shlex
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tsclust_ooc import budget, census
from tsclust_ooc.census import Distribution, Tally
from tsclust_ooc.mirror import Mirror
from tsclust_ooc.pipeline import origins
from tsclust_ooc.pipeline.estimating import Estimate, estimate
from tsclust_ooc.pipeline.examining import Examination, examine
from tsclust_ooc.pipeline.origins import Origin
from tsclust_ooc.plan import Options, Plan, make_plan
from tsclust_ooc.progress import Listener, silent
from tsclust_ooc.reading import RowReader, Unproven
from tsclust_ooc.remote import Remote
from tsclust_ooc.shards.listing import is_list
from tsclust_ooc.shards.parsers import Parsers
from tsclust_ooc.shards.schema import Problem, Shard, ShardError, Wanted, natural_key
from tsclust_ooc.shards.splits import split_order, splitter, suggested_pattern
from tsclust_ooc.shards.survey import Survey, survey
from tsclust_ooc.staging import Stage
from tsclust_ooc.units import format_count, plural


@dataclass(frozen=True)
class InspectOptions:
    """Options of inspect.

    Attributes
    ----------
    also
        A further source, like the first one; give it once for each. Shards are then named relative to the folder that
        all lie in.
    split_pattern
        Regular expression with a group named split, searched for in the path of each shard: what the group finds is its
        split, like '(?P<split>train|val|test)_' for train_12.h5. Default: folders named train, val or test.
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

    also: tuple[Path, ...] = ()
    split_pattern: str | None = None
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


def inspect(
    source: str | Path | Sequence[str | Path], options: InspectOptions = InspectOptions(), listener: Listener = silent
) -> Inspection:
    """Survey every shard of `source` and say what is there; with `options.deep`, read all of it once.

    A source is a folder, one file, or a text file (.txt, .list) with a path a line; several are a sequence, or in
    `options.also`.

    Raises
    ------
    BadInput
        A source is not there, or all together hold no shard, or none that can be read.
    UsageError
        The options name a layout or an axis that is not known, or no expression with a group named split.
    """
    first, also = origins.gathered(source, options.also)
    with Parsers(budget.available_cores()) as parsers, origins.opened(first, parsers.patience) as stage:
        parsers.warm_up()
        look = partial(_look, first, also, options, listener, parsers, stage)
        try:
            found, plan, expected, examined = look(presume=isinstance(first, Remote))
        except Unproven:
            found, plan, expected, examined = look(presume=False)
    return _summarize(found, plan, (first, *also), options, expected, examined)


def _look(
    first: Origin, also: Sequence[Path], options: InspectOptions, listener: Listener, parsers: Parsers,
    stage: Stage | Mirror, *, presume: bool,
) -> tuple[Survey, Plan, Estimate, Examination | None]:  # fmt: skip
    told = Wanted(options.layout, options.key, options.feature_axis, options.ids, options.split_pattern)
    found = survey(
        origins.listed(first, also, parsers.patience), parsers, told, presume=presume, listener=listener,
        local=origins.local_in(stage),
    )  # fmt: skip
    plan = make_plan(found, Options())
    reader = RowReader(plan, parsers, stage, presumed=found.n_presumed > 0)
    return found, plan, estimate(plan, reader), examine(plan, reader, listener) if options.deep else None


def _summarize(
    found: Survey,
    plan: Plan,
    given: Sequence[Origin],
    options: InspectOptions,
    expected: Estimate,
    examined: Examination | None,
) -> Inspection:
    """All that was found of the sources that the user gave as `given`."""
    problems = _together(found.problems, examined)
    in_names = splits_in_names(found) if options.split_pattern is None else None
    return Inspection(
        source=found.source, n_shards=len(found.shards), n_samples=found.n_samples, bytes=found.n_bytes,
        key=found.schema.key, layout=found.schema.layout, reason=found.reason, item_shape=found.schema.item_shape,
        dtype=found.schema.dtype, feature_axis=found.schema.feature_axis, ids=found.schema.ids,
        splits=_splits(found, options.split_pattern),
        kinds=census.kinds(found.schema, found.shards, problems),
        sizes=census.distribution(found.shards, lambda shard: shard.size),
        samples_a_shard=census.distribution(found.shards, lambda shard: shard.n_samples), problems=problems,
        notes=(*found.notes, *_note_of(found, in_names), *_presumed(found)),
        n_other_files=found.n_other, dataset_bytes=plan.disk_bytes,
        n_chunks=plan.n_chunks,
        memory_bytes=budget.memory_limit(), estimate=expected,
        next_command=_next_command(found, given, replace(options, split_pattern=options.split_pattern or in_names),
        problems), deep=examined,
    )  # fmt: skip


def _together(surveyed: Sequence[Problem], examined: Examination | None) -> tuple[Problem, ...]:
    """Problems of the survey and of the read, in the order of a survey."""
    read = examined.problems if examined is not None else ()
    return tuple(sorted([*surveyed, *read], key=lambda problem: natural_key(problem.path)))


def splits_in_names(found: Survey) -> str | None:
    """The --split-pattern for shards of one split whose names tell several, like train_12.h5; else None."""
    return suggested_pattern(shard.path for shard in found.shards) if len(found.splits()) == 1 else None


def _note_of(found: Survey, in_names: str | None) -> list[str]:
    if in_names is None:
        return []
    split = splitter(in_names)
    counts = Counter(split(shard.path) for shard in found.shards)
    told = ", ".join(f"{name} {format_count(counts[name])}" for name in sorted(counts, key=split_order))
    return [f"names of files tell splits ({told}); --split-pattern takes them, without it all are one split"]


def _presumed(found: Survey) -> list[str]:
    n = found.n_presumed
    return [f"{plural(n, 'object')} not fetched: presumed to be like others of their size"] if n else []


def _splits(found: Survey, pattern: str | None) -> dict[str, SplitSummary]:
    bad: dict[str, list[str]] = defaultdict(list)
    split = splitter(pattern)
    for problem in found.problems:  # they are there, only of no use
        with contextlib.suppress(ShardError):
            bad[split(problem.path)].append(problem.path)
    return {name: _split(shards, bad[name]) for name, shards in found.splits().items()}


def _split(shards: Sequence[Shard], bad: Sequence[str]) -> SplitSummary:
    missing = census.gaps([*(shard.path for shard in shards), *bad])
    return SplitSummary(
        len(shards), sum(s.n_samples for s in shards), sum(s.size for s in shards), shards[0].path, shards[-1].path,
        missing.first, missing.n_missing,
    )  # fmt: skip


def _next_command(found: Survey, given: Sequence[Origin], options: InspectOptions, problems: Sequence[Problem]) -> str:
    first, *others = map(_as_word, given)
    words = ["tsclust", "consolidate", first, _place_for(found, given)]
    for other in others:
        words += ["--also", other]
    words += _reading(found, options)
    words += ["--on-bad", "skip"] if problems else []
    return shlex.join(words)


def _as_word(path: Origin) -> str:
    """A path as an argument: one that begins with - would be taken for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def _place_for(found: Survey, given: Sequence[Origin]) -> str:
    """A name for the dataset: that of the source, or of the folder that several have in common; never inside one."""
    if isinstance(given[0], Remote):
        return given[0].name.lstrip("-") or "dataset"
    paths = [one.resolve() for one in given if isinstance(one, Path)]
    named = Path(found.source) if len(paths) > 1 else paths[0]
    name = (named.stem if is_list(named) else named.name).lstrip("-") or "dataset"
    here, above = Path.cwd().resolve(), Path()
    for source in paths:
        if source.is_dir() and here.is_relative_to(source):
            above = max(above, Path(*[".."] * (1 + len(here.relative_to(source).parts))), key=lambda up: len(up.parts))
    return str(above / (f"{name}_dataset" if (above / name).exists() else name))


def _reading(found: Survey, options: InspectOptions) -> list[str]:
    """How to read the source, where the user said so, or where the guess was in doubt: then its reason names the flag.

    Spelled out, it stays what it is when further shards come.
    """
    words = []
    for name in ("split_pattern", "layout", "key", "feature_axis", "ids"):
        flag, told = f"--{name.replace('_', '-')}", getattr(options, name)
        if told is None and name in ("layout", "feature_axis") and f"{flag} " in found.reason:
            told = getattr(found.schema, name)
        words += [] if told is None else [flag, told]
    return words
