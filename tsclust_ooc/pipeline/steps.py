"""The steps of a workflow: each the verb of a command, with what it works on.

Invariant: a step gives what its command gives for the same paths and options; `words` is that command.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from tsclust_ooc import budget, publishing
from tsclust_ooc.cluster import starts
from tsclust_ooc.errors import UsageError
from tsclust_ooc.pipeline.clustering import Clustered, cluster
from tsclust_ooc.pipeline.consolidating import Consolidated, ConsolidateOptions, DryRun, consolidate
from tsclust_ooc.pipeline.distancing import Distanced, DistancesOptions, distances
from tsclust_ooc.pipeline.looking import Inspection, InspectOptions, inspect
from tsclust_ooc.pipeline.options import ClusterOptions
from tsclust_ooc.pipeline.problems import BadShards
from tsclust_ooc.pipeline.settings import COMPUTED
from tsclust_ooc.progress import Listener
from tsclust_ooc.publishing import Published
from tsclust_ooc.runtime import ClusterSpec, open_runtime
from tsclust_ooc.units import plural

KINDS = ("dataset", "distances", "runs")
"""What may be published."""

_SHOWN_PROBLEMS = 20


class Step(Protocol):
    """One step. Its fields are the keys of its section."""

    name: ClassVar[str]

    @property
    def results(self) -> tuple[Path, ...]:
        """Directories it makes."""

    @property
    def words(self) -> list[str]:
        """The command that does the same, [] where there is none."""

    def work(self, listener: Listener) -> Any:
        """Do it; returns the result of its verb, a dataclass."""


@dataclass(frozen=True)
class InspectStep:
    """Look at the source; with `stops`, BadShards when it has problems."""

    name: ClassVar[str] = "inspect"
    results: ClassVar[tuple[Path, ...]] = ()
    source: Path
    options: InspectOptions
    stops: bool = field(default=False, metadata=COMPUTED)

    @property
    def words(self) -> list[str]:
        """The command that does the same."""
        return [self.name, str(self.source), *_flags(self.options)]

    def work(self, listener: Listener) -> Inspection:
        """Survey every shard."""
        found = inspect(self.source, self.options, listener)
        if not (found.problems and self.stops):
            return found
        lines = [f"  {ascii(p.path)[1:-1]}   {p.code}   {p.detail}" for p in found.problems[:_SHOWN_PROBLEMS]]
        if more := len(found.problems) - len(lines):
            lines.append(f"  ... and {more:,} more: tsclust inspect {self.source} --json")
        raise BadShards(
            f"{plural(len(found.problems), 'bad shard')} in {self.source}; nothing was made of it.\n"
            + "\n".join(lines)
            + '\nMend them and run the same command again, or leave them out: on_bad = "skip" in [consolidate].',
            found.problems,
        )


@dataclass(frozen=True)
class ConsolidateStep:
    """Make the dataset."""

    name: ClassVar[str] = "consolidate"
    source: Path
    dataset: Path
    options: ConsolidateOptions

    @property
    def results(self) -> tuple[Path, ...]:
        """The dataset."""
        return (self.dataset,)

    @property
    def words(self) -> list[str]:
        """The command that does the same."""
        return [self.name, str(self.source), str(self.dataset), *_flags(self.options)]

    def work(self, listener: Listener) -> Consolidated | DryRun:
        """Survey, write, publish."""
        return consolidate(self.source, self.dataset, self.options, listener)


@dataclass(frozen=True)
class DistancesStep:
    """Make one matrix of distances."""

    name: ClassVar[str] = "distances"
    dataset: Path
    out: Path
    options: DistancesOptions

    @property
    def results(self) -> tuple[Path, ...]:
        """The matrix."""
        return (self.out,)

    @property
    def words(self) -> list[str]:
        """The command that does the same."""
        return [self.name, str(self.dataset), str(self.out), *_flags(self.options)]

    def work(self, listener: Listener) -> Distanced:
        """Compute and publish the distances."""
        return distances(self.dataset, self.out, self.options, listener)


@dataclass(frozen=True)
class ClusterStep:
    """Make one run."""

    name: ClassVar[str] = "cluster"
    dataset: Path
    run: Path
    k: int
    options: ClusterOptions

    def __post_init__(self) -> None:
        starts.check_k(self.k, self.k)

    @property
    def results(self) -> tuple[Path, ...]:
        """The run."""
        return (self.run,)

    @property
    def words(self) -> list[str]:
        """The command that does the same."""
        return [self.name, str(self.dataset), str(self.run), "-k", str(self.k), *_flags(self.options)]

    def work(self, listener: Listener) -> Clustered:
        """Fit, label, publish."""
        return cluster(self.dataset, self.run, self.k, self.options, listener)


@dataclass(frozen=True)
class AllPublished:
    """Result of the step publish: one entry a result; `bytes` are those of the copies that were not there already."""

    to: str
    published: tuple[Published, ...]
    bytes: int
    reused: bool


@dataclass(frozen=True)
class PublishStep:
    """Copy results to the directory `to`, each under its own name; what was made stays where it is.

    Attributes
    ----------
    to
        Directory that gets the copies; made if need be.
    what
        Kinds of results to copy: 'dataset', 'distances', 'runs'. Default: all that the workflow makes.
    overwrite
        Replace other results that lie there under these names.
    workers
        Files that are copied side by side. Default: as many as there are cores.
    made
        Directories to copy.
    """

    name: ClassVar[str] = "publish"
    to: Path
    what: tuple[str, ...] | None = None
    overwrite: bool = False
    workers: int | None = None
    made: tuple[Path, ...] = field(default=(), metadata=COMPUTED)
    words: ClassVar[list[str]] = []

    def __post_init__(self) -> None:
        for what in self.what or ():
            if what not in KINDS:
                raise UsageError(f"what = {what!r} is not known. Use some of: {', '.join(KINDS)}.")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"workers = {self.workers} leaves nobody to work. Use 1 or more.")

    @property
    def results(self) -> tuple[Path, ...]:
        """The copies."""
        return tuple(self.to / path.name for path in self.made)

    def work(self, listener: Listener) -> AllPublished:
        """Copy each result, check it, give it its name."""
        limits = budget.resolve(None, self.workers)
        spec = ClusterSpec("threads", limits.n_workers, limits.memory_bytes, Path())
        with open_runtime(spec, listener) as runtime:
            done = tuple(
                publishing.publish(made, copy, overwrite=self.overwrite, mapper=runtime.mapper, listener=listener)
                for made, copy in zip(self.made, self.results, strict=True)
            )
        copied = sum(one.bytes for one in done if not one.reused)
        return AllPublished(str(self.to), done, copied, all(one.reused for one in done))


def _flags(options: Any) -> Iterator[str]:
    """Words for every option that is not at its default."""
    for one in dataclasses.fields(options):
        value = getattr(options, one.name)
        flag = f"--{one.name.replace('_', '-')}"
        if dataclasses.is_dataclass(value):
            yield from _flags(value)
        elif isinstance(value, bool):
            if value != one.default:
                yield flag if value else f"--no-{flag[2:]}"
        elif value != one.default:
            yield from (f"{flag}={v}" for v in (value if isinstance(value, tuple) else (value,)))
