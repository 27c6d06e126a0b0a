"""run: a whole workflow from one TOML file: inspect, consolidate, distances and cluster, publish.

Invariant: everything in the file is checked before the first step starts; a step is the verb of its command with the
same options, so it goes on where it was interrupted, and a finished one is recognized. Only steps with a section run.

    [flow]         source, dataset; options of all steps      [[distances]]  out, options; a single one: [distances]
    [inspect]      options                                    [[cluster]]    run, k, options; a single one: [cluster]
    [consolidate]  options                                    [publish]      to, what, overwrite, workers
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsclust_ooc import files
from tsclust_ooc.errors import BadInput, TsclustError, UsageError
from tsclust_ooc.pipeline import settings
from tsclust_ooc.pipeline.consolidating import DryRun, consolidate
from tsclust_ooc.pipeline.options import ComputeOptions
from tsclust_ooc.pipeline.session import check_apart
from tsclust_ooc.pipeline.settings import Table, naming
from tsclust_ooc.pipeline.steps import (
    KINDS,
    ClusterStep,
    ConsolidateStep,
    DistancesStep,
    InspectStep,
    PublishStep,
    Step,
)
from tsclust_ooc.progress import Listener, silent
from tsclust_ooc.runtime import ClusterSpec
from tsclust_ooc.units import parse_bytes

ORDER: tuple[type[Any], ...] = (InspectStep, ConsolidateStep, DistancesStep, ClusterStep, PublishStep)
"""The steps as they run, whatever their order in the file."""

SECTIONS = ("flow", *(kind.name for kind in ORDER))
_PLACES = ("source", "dataset")
_NOT_FOR_ALL = ("overwrite",)  # after each interruption it would make everything again
_NO_DATASET = ("dry_run",)  # what consolidate does instead of making one
_NOT_FROM_OUTSIDE = ("run", "out", "to", "what")  # names of one section, which no variable can mean
_TOLD = ("layout", "key", "feature_axis", "ids", "also", "split_pattern")  # what consolidate is told of the source


@dataclass(frozen=True)
class Flow:
    """A checked workflow: its steps, in the order they run."""

    path: Path
    steps: tuple[Step, ...]

    def title(self, index: int) -> str:
        """Step `index` for a person: '3/4 cluster k6'."""
        step = self.steps[index]
        result = f" {step.results[0].name}" if isinstance(step, DistancesStep | ClusterStep) else ""
        return f"{index + 1}/{len(self.steps)} {step.name}{result}"


@dataclass(frozen=True)
class Flowed:
    """Result of run: for each step its name as `step` and its result; and the seconds of all."""

    steps: tuple[dict[str, Any], ...]
    seconds: float


@dataclass(frozen=True)
class Intent:
    """What a step would do.

    `command` does the same ('' for publish); `state` says of each result whether it is 'absent', 'unfinished' or
    'there'; `plan` is that of a consolidation.
    """

    step: str
    command: str
    state: dict[str, str]
    plan: DryRun | None


def read_flow(path: str | Path, changes: Iterable[str] = (), environ: Mapping[str, str] = os.environ) -> Flow:
    """The workflow in the TOML file `path`, checked as far as it can be before anything is made.

    Parameters
    ----------
    path
        The file; relative paths in it start in its folder.
    changes
        Words SECTION.KEY=VALUE that change a section of the file, or add a key to it.
    environ
        `TSCLUST_...` variables set options of all steps that know them; the others are expanded in paths.

    Raises
    ------
    UsageError
        A key or a value that cannot be meant; file, section and key are named.
    BadInput
        The source, or a table of known classes, is not there.
    """
    path = Path(path).expanduser().absolute()
    reading = _Reading(path, settings.read_toml(path, str(path)), settings.from_words(changes), environ)
    return Flow(path, reading.steps())


def run_flow(flow: Flow, listener: Listener = silent) -> Flowed:
    """Run every step; the error of a step names it. Interrupted? The same again goes on."""
    began, found = time.perf_counter(), []
    for i, step in enumerate(flow.steps):
        with naming_the_step(flow, i):
            found.append((step, step.work(listener)))
    return flowed(found, time.perf_counter() - began)


def flowed(found: Iterable[tuple[Step, Any]], seconds: float) -> Flowed:
    """The results of steps as one."""
    steps = ({"step": s.name, **{f.name: getattr(done, f.name) for f in dataclasses.fields(done)}} for s, done in found)
    return Flowed(tuple(steps), round(seconds, 3))


@contextlib.contextmanager
def naming_the_step(flow: Flow, index: int) -> Iterator[None]:
    """Errors of the block begin with the step they are of; their kind and exit code stay."""
    said = f"step {flow.title(index)}"
    try:
        yield
    except TsclustError as error:
        error.args = (f"{said}: {error}", *error.args[1:])
        raise
    except OSError as error:
        if error.filename is None:
            raise
        what = f"{error.filename}: {error.strerror}. Check the path, then run the same command again."
        raise TsclustError(f"{said}: {what}") from error


def intent(step: Step, listener: Listener = silent) -> Intent:
    """What a step would do; changes nothing. A consolidation is surveyed and planned for it."""
    plan = None
    if isinstance(step, ConsolidateStep):
        planned = consolidate(step.source, step.dataset, dataclasses.replace(step.options, dry_run=True), listener)
        plan = planned if isinstance(planned, DryRun) else None
    command = shlex.join(["tsclust", *step.words]) if step.words else ""
    return Intent(step.name, command, {str(path): _state(path) for path in step.results}, plan)


def _state(path: Path) -> str:
    if os.path.lexists(path):
        return "there"
    return "unfinished" if files.work_of(path) else "absent"


class _Reading:
    """A flow file on its way to the steps of a Flow."""

    def __init__(
        self, path: Path, sections: dict[str, Any], changes: dict[str, Table], environ: Mapping[str, str]
    ) -> None:
        self.path, self.sections, self.changes, self.environ = path, sections, changes, environ
        for name in sections:
            if name not in SECTIONS:
                raise UsageError(f"{path}: [{name}] is no section of a workflow. Use: {_bracketed(SECTIONS)}.")
        for name, table in changes.items():
            if name not in ("flow", *sections):
                has = _bracketed(["flow", *(n for n in sections if n != "flow")])
                raise UsageError(f"--set {name}.{next(iter(table))}: {path} has no [{name}], only {has}. Add it there.")
        self.common = settings.table_of(sections.get("flow", {}), self._place("flow"), path.parent)
        known = {*settings.names_of(ComputeOptions), *_PLACES} - {*_NOT_FOR_ALL}
        given = self.common | changes.get("flow", {})
        settings.check_known(given, known, "[flow]")
        settings.build(ComputeOptions, given, self._place("flow"), environ)

    def steps(self) -> tuple[Step, ...]:
        """All steps, each checked by itself and all against each other."""
        steps: list[Step] = []
        for kind in ORDER:
            for table, said in self._tables(kind.name):
                step = self._step(kind, table, said)
                with naming(said):
                    steps.append(self._publishing(step, steps) if isinstance(step, PublishStep) else step)
                    _check_options(step)
        if not steps:
            raise UsageError(f"{self.path} has no step. Add sections: {_bracketed(SECTIONS[1:])}.")
        with naming(str(self.path)):
            _check_places(steps)
        _check_there(steps)
        return tuple(map(self._stopping, steps))

    def _step(self, kind: type[Any], own: Table, said: str) -> Step:
        names = settings.names_of(kind)
        known = [name for name in names if name not in (*_PLACES, *_NO_DATASET)]
        given = own | self._changes(kind.name)
        settings.check_known(given, known, f"[{kind.name}]")
        from_outside = {*known, *_PLACES} - {*_NOT_FROM_OUTSIDE}
        table = self.common | self._told_to_consolidate(kind) | own
        table |= settings.from_environment(from_outside, self.environ)
        table |= self.changes.get("flow", {}) | self._changes(kind.name)
        for name in _PLACES:
            if name in names and name not in table:
                raise UsageError(f'{self.path}: [flow] has no {name}, and {said} needs it. Give one: {name} = "..."')
        step: Step = settings.build(kind, table, said, self.environ)
        return step

    def _told_to_consolidate(self, kind: type[Any]) -> Table:
        """What consolidate is told of the source: it holds for the look at it too."""
        if kind is not InspectStep or "consolidate" not in self.sections:
            return {}
        ((table, _),) = self._tables("consolidate")
        told = table | self._changes("consolidate")
        return {name: told[name] for name in _TOLD if name in told}

    def _tables(self, name: str) -> list[tuple[Table, str]]:
        """The tables of a section, and how messages name them."""
        found, place = self.sections.get(name), self._place(name)
        if isinstance(found, list) and name in (DistancesStep.name, ClusterStep.name):
            named = [(values, f"{self.path}: [[{name}]] {i}") for i, values in enumerate(found, start=1)]
        else:
            named = [] if found is None else [(found, place)]
        return [(self._section(name, values, said), said) for values, said in named]

    def _section(self, name: str, values: Any, said: str) -> Table:
        return _renamed(settings.table_of(values, said, self.path.parent), name)

    def _changes(self, name: str) -> Table:
        return _renamed(self.changes.get(name, {}), name)

    def _place(self, name: str) -> str:
        return f"{self.path}: [{name}]"

    def _publishing(self, step: PublishStep, steps: Sequence[Step]) -> PublishStep:
        """The step with what it copies."""
        found = {kind: [path for s in steps if s.name == name for path in s.results] for kind, name in zip(
            KINDS, (ConsolidateStep.name, DistancesStep.name, ClusterStep.name), strict=True
        )}  # fmt: skip
        for kind in step.what or ():
            if not found[kind]:
                raise UsageError(f"what has {kind!r}, and this workflow makes none. Leave it away.")
        made = tuple(itertools.chain.from_iterable(found[kind] for kind in step.what or KINDS))
        if not made:
            raise UsageError("this workflow makes nothing to publish. Add a step, or leave the section away.")
        return dataclasses.replace(step, made=made)

    def _stopping(self, step: Step) -> Step:
        """An inspection ends the workflow where the consolidation would refuse what it found."""
        if not isinstance(step, InspectStep) or "consolidate" not in self.sections:
            return step
        ((table, said),) = self._tables("consolidate")
        consolidation = self._step(ConsolidateStep, table, said)
        assert isinstance(consolidation, ConsolidateStep)
        return dataclasses.replace(step, stops=consolidation.options.on_bad == "fail")


def _renamed(table: Table, section: str) -> Table:
    """`clusters`, the long flag of -k, is `k` here."""
    if section != ClusterStep.name or "clusters" not in table:
        return table
    if "k" in table:
        raise UsageError(f"{table['clusters'].said} is the same as k, which is there too. Leave one.")
    return {"k" if name == "clusters" else name: given for name, given in table.items()}


def _check_options(step: Step) -> None:
    """What a step would find wrong with its options only when its turn has come."""
    options = getattr(step, "options", None)
    if isinstance(step, ConsolidateStep):
        step.options.plan_options()
    if memory := getattr(options, "memory", None):
        parse_bytes(memory)
    if isinstance(options, ComputeOptions):
        jobs, workers = options.jobs, options.workers
        parse_bytes(jobs.job_memory or "4GB")
        n_workers = max(1, jobs.min_workers or 1) if workers is None else workers
        ClusterSpec(options.scheduler, n_workers, 0, Path(), jobs)


def _check_places(steps: Sequence[Step]) -> None:
    """UsageError where a result would lie in another or in what it is made of, or two have one name."""
    made = [path for step in steps if not isinstance(step, PublishStep) for path in step.results]
    copies = [path for step in steps if isinstance(step, PublishStep) for path in step.results]
    for paths in (made, copies):
        for path in paths:
            if [p.resolve() for p in paths].count(path.resolve()) > 1:
                raise UsageError(f"{path} is the place of two results. Give each a name of its own.")
    given = {source for step in steps for source in _sources(step)}
    others = {*made, *(dataset for step in steps if (dataset := getattr(step, "dataset", None)))}
    for path in (*made, *copies):
        for place in (*given, *(other for other in others if other != path)):
            check_apart(path, place)


def _check_there(steps: Sequence[Step]) -> None:
    """BadInput when something that no step makes is not there."""
    for step in steps:
        truth = getattr(getattr(step, "options", None), "truth", None)
        for source in _sources(step):
            if not source.exists():
                raise BadInput(f"{source} is not there. Give a folder of .h5 shards, or one HDF5 file: [flow] source")
        if truth is not None and not truth.is_file():
            raise BadInput(f"truth = {truth} is not there. Give a parquet file with split, sample_id and class.")


def _sources(step: Step) -> tuple[Path, ...]:
    source = getattr(step, "source", None)
    return () if source is None else (source, *getattr(getattr(step, "options", None), "also", ()))


def _bracketed(names: Iterable[str]) -> str:
    return ", ".join(f"[{name}]" for name in names)
