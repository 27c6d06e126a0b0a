"""consolidate: shards into a published dataset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

from tsclust_ooc import budget
from tsclust_ooc import consolidate as work_on
from tsclust_ooc import work as work_dir
from tsclust_ooc.budget import Budget
from tsclust_ooc.dataset import Manifest, read_manifest, read_rejected, work_folders
from tsclust_ooc.errors import BadInput, CannotWrite, UsageError
from tsclust_ooc.pipeline.options import ComputeOptions
from tsclust_ooc.pipeline.session import Session, check_apart, session
from tsclust_ooc.plan import DEFAULT_CHUNK_BYTES, Options, Partition, Plan, make_plan
from tsclust_ooc.progress import Listener, silent
from tsclust_ooc.provenance import Meter
from tsclust_ooc.reading import RowReader, Unproven
from tsclust_ooc.runtime import LEAST_WORKER_BYTES
from tsclust_ooc.shards.parsers import Parsers
from tsclust_ooc.shards.schema import Problem, natural_key
from tsclust_ooc.shards.survey import KnownBad, Survey, survey
from tsclust_ooc.staging import MODES, Stage, Staging
from tsclust_ooc.tasks import write_task
from tsclust_ooc.units import format_count, parse_bytes, plural

_SHOWN_PROBLEMS = 100
_READERS_A_CORE = 4  # reads wait for the disk or the network, and only one thread at a time runs Python
_MEND = "Mend them and run the same command again, or leave them out: --on-bad skip"


@dataclass(frozen=True)
class ConsolidateOptions(ComputeOptions):
    """Options of consolidate.

    Attributes
    ----------
    layout
        How datasets map to samples: item-per-file, rows-per-file or dataset-per-item. Default: guessed.
    key
        Name of the dataset that holds the vectors. Default: guessed.
    feature_axis
        Which axis of a stored sample is the feature: last, or first for (feature, variable) samples, which are turned
        while they are written. Default: guessed, the longer.
    ids
        Name of the dataset that names the samples of a shard, one string or integer each; '' for none. Default:
        guessed.
    stride
        Keep each N-th sample of a split: neighbouring windows overlap. Default: 1, all of them.
    on_bad
        What to do about bad shards: 'fail' (do all the work, name them all, publish nothing, exit 65) or 'skip'
        (publish without them, recorded in rejected.json).
    dry_run
        Survey and plan only: partitions, memory and disk needed.
    stage
        Copy shards to node-local scratch before reading: 'auto' (large ones on a network filesystem), 'always'
        or 'never'.
    compress
        Codec for chunks: zstd or blosc-lz4. Default: none (embeddings shrink 7 % and read at half the speed).
    chunk_bytes
        Bytes of one chunk, like 16MiB. Default: 16MiB.
    """

    layout: str | None = None
    key: str | None = None
    feature_axis: str | None = None
    ids: str | None = None
    stride: int | None = None
    on_bad: str = "fail"
    dry_run: bool = False
    stage: str = "auto"
    compress: str | None = None
    chunk_bytes: str | None = None

    def __post_init__(self) -> None:
        if self.on_bad not in ("fail", "skip"):
            raise UsageError(f"--on-bad {self.on_bad} is not known. Use fail or skip.")
        if self.stage not in MODES:
            raise UsageError(f"--stage {self.stage} is not known. Use one of: {', '.join(MODES)}.")

    def plan_options(self) -> Options:
        """The options that change the bytes of the dataset."""
        size = DEFAULT_CHUNK_BYTES if self.chunk_bytes is None else parse_bytes(self.chunk_bytes)
        return Options(size, self.compress or "", 1 if self.stride is None else self.stride)


DEFAULTS = ConsolidateOptions()


@dataclass(frozen=True)
class Consolidated:
    """Result of consolidate. `reused`: the dataset was there already, made from these very shards and options."""

    dataset: str
    n_shards: int
    n_samples: int
    n_rejected: int
    bytes: int
    n_chunks: int
    item_shape: tuple[int, ...]
    dtype: str
    splits: dict[str, int]
    seconds: float
    peak_bytes: int
    dashboard: str
    digest: str
    reused: bool


@dataclass(frozen=True)
class DryRun:
    """What consolidate would do: partitions, chunks, bytes of disk and of memory here, with how many workers."""

    dataset: str
    n_shards: int
    n_samples: int
    n_rejected: int
    n_partitions: int
    n_chunks: int
    disk_bytes: int
    memory_bytes: int
    n_workers: int


class BadShards(BadInput):
    """Shards that cannot be used; `problems` has them all."""

    def __init__(self, message: str, problems: Sequence[Problem]) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


def consolidate(
    source: str | Path,
    dataset: str | Path,
    options: ConsolidateOptions = DEFAULTS,
    listener: Listener = silent,
) -> Consolidated | DryRun:
    """Make the dataset from the shards of `source`: survey, plan, write every partition, publish.

    Running it again after any interruption goes on where it stopped and gives the same bytes.

    Raises
    ------
    BadShards
        There are bad shards and `on_bad` is 'fail'; all good partitions are kept for the next run.
    CannotWrite
        Something else lies at `dataset`, or the disk or the memory budget is too small.
    TryAgain
        Another process is consolidating to `dataset`.
    """
    given, final = places(source, dataset)
    check_places(given, final, options)
    if options.dry_run:
        limits = budget.resolve(options.memory, options.workers)
        held = Session(final, options, limits, Path(), Meter(), listener)  # nothing is held, and nothing written
        with Parsers(budget.available_cores()) as parsers:
            return _dry_run(survey_for(held, given, parsers), held)
    parsers = Parsers(budget.available_cores())
    with session(final, "consolidate", "consolidated", options, listener) as held, parsers:
        return Consolidation(held, given, parsers).run()


class Consolidation:
    """A consolidation at work: what a command holds meanwhile, its source, its parsers."""

    def __init__(self, held: Session, source: Path, parsers: Parsers) -> None:
        assert isinstance(held.options, ConsolidateOptions)
        self.held, self.source, self.parsers, self.options = held, source, parsers, held.options
        self.final, self.listener = held.final, held.listener
        self.dashboard = ""
        self.presumed = False
        self.known_bad = work_dir.known_bad(held.final)  # from before: a second survey knows no more than the first

    def run(self) -> Consolidated:
        """Survey, write, publish."""
        try:
            return self._run(presume=self._may_presume())
        except Unproven as error:
            path = ascii(str(error))[1:-1]
            self.listener.say(f"{path} is not like the others of its size; looking at every shard before going on")
            return self._run(presume=False)

    def _run(self, *, presume: bool) -> Consolidated:
        plan, problems, manifest = self.look(presume=presume)
        return self.finish(plan, problems) if manifest is None else self.there_already(manifest)

    def _may_presume(self) -> bool:
        """Whether each shard of the plan will be read now, so that what is presumed of it will be proven."""
        all_of_them = self.options.plan_options().stride == 1
        return all_of_them and _is_free(self.final) and not work_folders(self.final)

    def look(self, *, presume: bool = False) -> tuple[Plan, tuple[Problem, ...], Manifest | None]:
        """The plan, the shards it leaves out, and the dataset if it is there already, made by just this plan.

        With `presume`, shards of which many have the size of a proven one are not opened before they are read.

        Raises BadShards when it is, and is not what `on_bad` asks for; CannotWrite when something else is there.
        """
        while True:
            found = survey_for(self.held, self.source, self.parsers, self.known_bad, presume=presume)
            self.presumed = found.n_presumed > 0
            plan = make_plan(found, self.options.plan_options())
            if self.options.overwrite:
                return plan, found.problems, None
            manifest = work_on.published(self.final, plan)
            if manifest is None and not _is_free(self.final) and work_on.published(self.final, plan) is not None:
                continue  # another process published it between two looks
            if manifest is not None and self._fails(found.problems):
                raise bad_shards(self.source, plan, found.problems)
            if manifest is None or not _same_shards(read_rejected(self.final), found.problems):
                self.check_free()
            return plan, found.problems, manifest

    def finish(self, plan: Plan, problems: Sequence[Problem]) -> Consolidated:
        """Write what is missing of a plan, and publish; without the shards that turn out bad, where those are skipped.

        `problems` are those of the shards that the plan leaves out.
        """
        bad = self._write(plan, problems)
        while bad and self.options.on_bad == "skip" and not any(b.problem.code in work_dir.PASSING for b in bad):
            self.listener.say(f"{plural(len(bad), 'shard')} found bad while reading; planning again without them")
            plan, problems = leave_out(self.source, plan, problems, [b.problem for b in bad])
            bad = self._write(plan, problems)
        everything = [*problems, *(b.problem for b in bad)]
        if bad or self._fails(everything):
            raise bad_shards(self.source, plan, everything)
        return self.publish(work_dir.Work(self.final, work_dir.work_root(self.final, plan), plan))

    def publish(self, work: work_dir.Work) -> Consolidated:
        """Give written work its final name."""
        try:
            seconds = round(self.held.meter.elapsed(), 3)
            manifest = work_on.finalize(work, replace_existing=self.options.overwrite, seconds=seconds)
        except work_dir.Superseded:
            return self.there_already(work_on.join_or_fail(self.final, work.plan))
        return result(manifest, self.final, self.held.meter, dashboard=self.dashboard, reused=False)

    def there_already(self, manifest: Manifest) -> Consolidated:
        """The dataset that somebody published before."""
        work_on.sweep(self.final)
        return result(manifest, self.final, self.held.meter, dashboard=self.dashboard, reused=True)

    def check_free(self, plan: Plan | None = None) -> None:
        """CannotWrite when there is something at the final name that is not to be replaced, nor made by `plan`."""
        ours = plan is not None and work_on.published(self.final, plan) is not None
        if not (ours or self.options.overwrite or _is_free(self.final)):
            raise CannotWrite(
                f"{self.final} already exists and was not made from these shards and options. "
                "Use --overwrite to replace it, or choose another name."
            )

    def _fails(self, problems: Sequence[Problem]) -> bool:
        return bool(problems) and self.options.on_bad == "fail"

    def _write(self, plan: Plan, problems: Sequence[Problem]) -> list[work_dir.BadShard]:
        n_workers = _workers(self.held, plan)
        try:
            work = work_on.init(self.final, plan, problems)
            return self._write_partitions(work, n_workers) if work_dir.pending(work) else []
        except work_dir.Superseded:
            work_on.join_or_fail(self.final, plan)
            return []

    def _write_partitions(self, work: work_dir.Work, n_workers: int) -> list[work_dir.BadShard]:
        here = Staging(self.options.stage, self.held.scratch)
        # The stage is closed last: that sweeps what worker processes left which were killed.
        with here.open(self.source) as stage, self.held.runtime(n_workers) as runtime:
            self.dashboard = runtime.dashboard
            return work_on.run(work, self._writer(work, here, stage), runtime.mapper, self._counting(work))

    def _writer(self, work: work_dir.Work, here: Staging, stage: Stage) -> Callable[[Partition], work_on.Done]:
        """What writes a partition: with the parsers and the stage here, or in another process with its own."""
        scheduler = self.options.scheduler
        if scheduler == "threads":
            return partial(
                work_on.write_partition, work, RowReader(work.plan, self.parsers, stage, presumed=self.presumed)
            )
        there = here if scheduler == "local" else Staging(here.mode, asked=self.options.scratch)
        return write_task(work, there, presumed=self.presumed)

    def _counting(self, work: work_dir.Work) -> Callable[[work_on.Done], None]:
        """Tells the listener how many shards are written; to be called with each partition that is done."""
        plan = work.plan
        total = sum(split.n_shards for split in plan.splits)
        done_rows = plan.n_rows - sum(p.stop - p.start for p in work_dir.pending(work))

        def on_done(done: work_on.Done) -> None:
            nonlocal done_rows
            done_rows += done.partition.stop - done.partition.start
            self.listener.advance("write", done_rows * total // max(plan.n_rows, 1), total)

        return on_done


def places(source: str | Path, dataset: str | Path) -> tuple[Path, Path]:
    """Where a source and a dataset lie, ~ understood; the dataset's path absolute."""
    return Path(source).expanduser(), Path(dataset).expanduser().absolute()


def check_places(source: Path, final: Path, options: ConsolidateOptions) -> None:
    """BadInput, UsageError or CannotWrite for places that cannot be meant."""
    if not source.exists():
        raise BadInput(f"{source} is not there. Give a folder of .h5 shards, or one HDF5 file.")
    check_apart(final, source)
    if options.overwrite and not options.dry_run:
        check_ours(final)


def check_ours(final: Path) -> None:
    """--overwrite replaces datasets, not whatever else a mistyped name hits."""
    if _is_free(final):
        return
    try:
        read_manifest(final)
    except (FileNotFoundError, NotADirectoryError, BadInput) as error:
        raise CannotWrite(
            f"{final} is not a dataset of this version, so --overwrite leaves it alone. "
            "Move it away, or choose another name."
        ) from error


def leave_out(
    source: Path, plan: Plan, problems: Sequence[Problem], bad: Sequence[Problem]
) -> tuple[Plan, list[Problem]]:
    """The plan without the shards that were found `bad`, and all that are left out, in the order of a survey."""
    together = sorted([*problems, *bad], key=lambda problem: natural_key(problem.path))
    smaller = work_on.without(plan, bad)
    if not smaller.shards:
        raise bad_shards(source, plan, together)
    return smaller, together


def result(manifest: Manifest, final: Path, meter: Meter, *, dashboard: str, reused: bool) -> Consolidated:
    """What a command says of the dataset it published or found."""
    return Consolidated(
        dataset=str(final), n_shards=sum(s.n_shards for s in manifest.splits.values()),
        n_samples=sum(s.shape[0] for s in manifest.splits.values()), n_rejected=manifest.n_rejected,
        bytes=sum(entry.n_bytes for entry in manifest.files.values()),
        n_chunks=sum("/c/" in name for name in manifest.files), item_shape=manifest.schema.item_shape,
        dtype=manifest.schema.dtype, splits={name: s.shape[0] for name, s in manifest.splits.items()},
        seconds=round(meter.elapsed(), 3), peak_bytes=meter.peak_bytes, dashboard=dashboard,
        digest=manifest.digest, reused=reused,
    )  # fmt: skip


def bad_shards(source: Path, plan: Plan, problems: Sequence[Problem], next_step: str = _MEND) -> BadShards:
    """The error that names bad shards, and says what to do when they are mended."""
    return BadShards(
        f"{plural(len(problems), 'bad shard')} in {source}; nothing was published, the work on the other "
        f"{format_count(len(plan.shards))} is kept.\n" + "\n".join(problem_lines(source, problems)) + f"\n{next_step}",
        problems,
    )


def problem_lines(source: Path, problems: Sequence[Problem]) -> list[str]:
    """A line a bad shard, of the first hundred."""
    lines = [f"  {ascii(p.path)[1:-1]}   {p.code}   {p.detail}" for p in islice(problems, _SHOWN_PROBLEMS)]
    if len(problems) > _SHOWN_PROBLEMS:
        lines.append(f"  ... and {len(problems) - _SHOWN_PROBLEMS:,} more: tsclust inspect {source} --json")
    return lines


def survey_for(
    held: Session, given: Path, parsers: Parsers, known_bad: KnownBad | None = None, *, presume: bool = False
) -> Survey:
    """The survey that a consolidation begins with: shards that an earlier one found bad are problems here."""
    options = held.options
    assert isinstance(options, ConsolidateOptions)
    parsers.warm_up()
    return survey(
        given, parsers, layout=options.layout, key=options.key, feature_axis=options.feature_axis, ids=options.ids,
        known_bad=known_bad or work_dir.known_bad(held.final), presume=presume, listener=held.listener,
    )  # fmt: skip


def _is_free(final: Path) -> bool:
    return not final.exists() or (final.is_dir() and not any(final.iterdir()))


def _same_shards(a: Sequence[Problem], b: Sequence[Problem]) -> bool:
    return {problem.path for problem in a} == {problem.path for problem in b}


def _workers(held: Session, plan: Plan) -> int:
    """Workers: what was asked for, else a few threads a core or a process a core, as many as the memory holds."""
    each = work_on.array_bytes(plan) + _process_bytes(held, plan)
    if held.options.scheduler == "threads" and held.options.workers is None:
        held = replace(held, limits=Budget(held.limits.memory_bytes, _READERS_A_CORE * budget.available_cores()))
    fit = held.workers_that_fit(each, "consolidation")
    here = held.options.scheduler in ("threads", "local")
    return min(fit, max(1, len(plan.partitions))) if here else fit


def _process_bytes(held: Session, plan: Plan) -> int:
    """Bytes that a worker holds besides its arrays; nothing for a thread."""
    if held.options.scheduler == "threads":
        return 0
    return work_on.plan_bytes(plan) + (LEAST_WORKER_BYTES if held.options.scheduler == "local" else 0)


def _dry_run(found: Survey, held: Session) -> DryRun:
    assert isinstance(held.options, ConsolidateOptions)
    plan = make_plan(found, held.options.plan_options())
    n_workers = _workers(held, plan)
    here = n_workers if held.options.scheduler in ("threads", "local") else 0
    return DryRun(
        dataset=str(held.final), n_shards=len(plan.shards), n_samples=plan.n_rows, n_rejected=len(found.problems),
        n_partitions=len(plan.partitions), n_chunks=plan.n_chunks, disk_bytes=plan.disk_bytes,
        memory_bytes=budget.BASE_BYTES + here * (work_on.array_bytes(plan) + _process_bytes(held, plan)),
        n_workers=n_workers,
    )  # fmt: skip
