"""consolidate: shards into a published dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tsclust_ooc import budget, locks, scratch
from tsclust_ooc import consolidate as work_on
from tsclust_ooc import work as work_dir
from tsclust_ooc.budget import Budget
from tsclust_ooc.dataset import Manifest, read_manifest, read_rejected
from tsclust_ooc.errors import BadInput, CannotWrite, UsageError
from tsclust_ooc.plan import DEFAULT_CHUNK_BYTES, Options, Plan, make_plan
from tsclust_ooc.progress import Listener, silent
from tsclust_ooc.provenance import Meter
from tsclust_ooc.reading import RowReader
from tsclust_ooc.runtime import ClusterSpec, open_runtime
from tsclust_ooc.shards.parsers import Parsers
from tsclust_ooc.shards.schema import Problem
from tsclust_ooc.shards.survey import Survey, survey
from tsclust_ooc.staging import MODES, Stage
from tsclust_ooc.units import format_count, parse_bytes, plural

_LOCK_SECONDS = 0.5
_SHOWN_PROBLEMS = 100
_READERS_A_CORE = 4  # reads wait for the disk or the network, and only one thread at a time runs Python


@dataclass(frozen=True)
class ConsolidateOptions:
    """Options of consolidate.

    Attributes
    ----------
    layout
        How datasets map to samples: item-per-file, rows-per-file or dataset-per-item. Default: guessed.
    key
        Name of the dataset that holds the vectors. Default: guessed.
    on_bad
        What to do about bad shards: 'fail' (do all the work, name them all, publish nothing, exit 65) or 'skip'
        (publish without them, recorded in rejected.json).
    overwrite
        Replace the dataset that is already there, in one step, when the new one is complete.
    dry_run
        Survey and plan only: partitions, memory and disk needed.
    stage
        Copy shards to node-local scratch before reading: 'auto' (large ones on a network filesystem), 'always'
        or 'never'.
    compress
        Codec for chunks: zstd or blosc-lz4. Default: none (embeddings shrink 7 % and read at half the speed).
    chunk_bytes
        Bytes of one chunk, like 16MiB. Default: 16MiB.
    memory
        Memory of the whole process tree, like 4GB. Default: half of what this job may use.
    workers
        Threads that read shards and write chunks. Default: from cores and memory.
    scratch
        Directory on a disk of this node. Default: the first node-local one found.
    """

    layout: str | None = None
    key: str | None = None
    on_bad: str = "fail"
    overwrite: bool = False
    dry_run: bool = False
    stage: str = "auto"
    compress: str | None = None
    chunk_bytes: str | None = None
    memory: str | None = None
    workers: int | None = None
    scratch: Path | None = None

    def __post_init__(self) -> None:
        if self.on_bad not in ("fail", "skip"):
            raise UsageError(f"--on-bad {self.on_bad} is not known. Use fail or skip.")
        if self.stage not in MODES:
            raise UsageError(f"--stage {self.stage} is not known. Use one of: {', '.join(MODES)}.")

    def plan_options(self) -> Options:
        """The options that change the bytes of the dataset."""
        size = DEFAULT_CHUNK_BYTES if self.chunk_bytes is None else parse_bytes(self.chunk_bytes)
        return Options(size, self.compress or "")


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
    digest: str
    reused: bool


@dataclass(frozen=True)
class DryRun:
    """What consolidate would do: partitions, chunks, bytes of disk and of memory, with how many workers."""

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
    options: ConsolidateOptions = ConsolidateOptions(),
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
    given, final = Path(source).expanduser(), Path(dataset).expanduser().absolute()
    _check_places(given, final, options)
    limits = budget.resolve(options.memory, options.workers)
    if options.dry_run:
        with Parsers(budget.available_cores()) as parsers:
            return _dry_run(_survey(given, final, parsers, options, listener), final, options, limits)
    with _Session(given, final, options, limits, listener) as session:
        return session.run()


class _Session:
    """One consolidate command: the lock, the parsers, the stage and the meter it holds while it works."""

    def __init__(
        self, source: Path, final: Path, options: ConsolidateOptions, limits: Budget, listener: Listener
    ) -> None:
        self.source, self.final, self.options, self.limits, self.listener = source, final, options, limits, listener
        self.scratch = scratch.scratch_dir(options.scratch)
        self.meter = Meter()

    def __enter__(self) -> _Session:
        busy = f"{self.final} is being consolidated by another process. Run the same command again when it is done."
        lock = locks.name_for(self.scratch, "consolidate", self.final)
        self._lock = locks.hold(lock, wait_seconds=_LOCK_SECONDS, busy=busy, listener=self.listener)
        self._lock.__enter__()
        self.parsers = Parsers(budget.available_cores())
        self.stage = Stage(self.scratch / "stage", self.options.stage, on_network=scratch.is_network(self.source))
        self.meter.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.meter.__exit__()
        self.parsers.__exit__()
        self.stage.close()
        self._lock.__exit__(None, None, None)

    def run(self) -> Consolidated:
        """Survey, write, publish; again without the shards that turned out bad, where those are to be skipped."""
        while True:
            found = _survey(self.source, self.final, self.parsers, self.options, self.listener)
            plan = make_plan(found, self.options.plan_options())
            if not self.options.overwrite:
                manifest = work_on.published(self.final, plan)
                if manifest is not None and self._fails(found.problems):
                    raise _bad_shards(self.source, plan, found.problems)
                if manifest is not None and _same_shards(read_rejected(self.final), found.problems):
                    work_on.sweep(self.final)
                    return self._result(manifest, reused=True)
                if manifest is None and work_on.published(self.final, plan) is not None:
                    continue  # another process published it between two looks
                _check_free(self.final)
            bad = self._write(plan, found.problems)
            lasting = not any(b.problem.code in work_dir.PASSING for b in bad)
            if bad and self.options.on_bad == "skip" and lasting:
                self.listener.say(f"{plural(len(bad), 'shard')} found bad while reading; planning again without them")
                continue
            problems = [*found.problems, *(b.problem for b in bad)]
            if bad or self._fails(problems):
                raise _bad_shards(self.source, plan, problems)
            return self._publish(plan)

    def _fails(self, problems: Sequence[Problem]) -> bool:
        return bool(problems) and self.options.on_bad == "fail"

    def _write(self, plan: Plan, problems: Sequence[Problem]) -> list[work_dir.BadShard]:
        n_workers = _workers(plan, self.options, self.limits)
        self.work = work_dir.Work(self.final, work_dir.work_root(self.final, plan), plan)
        try:
            self.work = work_on.init(self.final, plan, problems)
            return self._write_partitions(n_workers)
        except work_dir.Superseded:
            work_on.join_or_fail(self.final, plan)
            return []

    def _write_partitions(self, n_workers: int) -> list[work_dir.BadShard]:
        plan = self.work.plan
        reader = RowReader(self.work.plan, self.parsers, self.stage)
        total = sum(split.n_shards for split in plan.splits)
        done_rows = plan.n_rows - sum(p.stop - p.start for p in work_dir.pending(self.work))

        def on_done(done: work_on.Done) -> None:
            nonlocal done_rows
            done_rows += done.partition.stop - done.partition.start
            self.listener.advance("write", done_rows * total // max(plan.n_rows, 1), total)

        spec = ClusterSpec("threads", n_workers, self.limits.memory_bytes, self.scratch)
        with open_runtime(spec, self.listener) as runtime:
            return work_on.run(self.work, reader, runtime.mapper, on_done)

    def _publish(self, plan: Plan) -> Consolidated:
        try:
            manifest = work_on.finalize(
                self.work, replace_existing=self.options.overwrite, seconds=round(self.meter.elapsed(), 3)
            )
        except work_dir.Superseded:
            return self._result(work_on.join_or_fail(self.final, plan), reused=True)
        return self._result(manifest, reused=False)

    def _result(self, manifest: Manifest, *, reused: bool) -> Consolidated:
        return Consolidated(
            dataset=str(self.final), n_shards=sum(s.n_shards for s in manifest.splits.values()),
            n_samples=sum(s.shape[0] for s in manifest.splits.values()), n_rejected=manifest.n_rejected,
            bytes=sum(entry.n_bytes for entry in manifest.files.values()),
            n_chunks=sum("/c/" in name for name in manifest.files), item_shape=manifest.schema.item_shape,
            dtype=manifest.schema.dtype, splits={name: s.shape[0] for name, s in manifest.splits.items()},
            seconds=round(self.meter.elapsed(), 3), peak_bytes=self.meter.peak_bytes, digest=manifest.digest,
            reused=reused,
        )  # fmt: skip


def _survey(given: Path, final: Path, parsers: Parsers, options: ConsolidateOptions, listener: Listener) -> Survey:
    parsers.warm_up()
    return survey(
        given, parsers, layout=options.layout, key=options.key, known_bad=work_dir.known_bad(final), listener=listener
    )


def _check_places(source: Path, final: Path, options: ConsolidateOptions) -> None:
    if not source.exists():
        raise BadInput(f"{source} is not there. Give a folder of .h5 shards, or one HDF5 file.")
    if final.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{final} lies inside the source {source}; inputs are never written to. Choose another place.")
    if not options.overwrite or options.dry_run:
        return
    _check_ours(final)


def _check_ours(final: Path) -> None:
    """--overwrite replaces datasets, not whatever else a mistyped name hits."""
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    try:
        read_manifest(final)
    except (FileNotFoundError, NotADirectoryError, BadInput) as error:
        raise CannotWrite(
            f"{final} is not a dataset of this version, so --overwrite leaves it alone. "
            "Move it away, or choose another name."
        ) from error


def _same_shards(a: Sequence[Problem], b: Sequence[Problem]) -> bool:
    return {problem.path for problem in a} == {problem.path for problem in b}


def _check_free(final: Path) -> None:
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    raise CannotWrite(
        f"{final} already exists and was not made from these shards and options. "
        "Use --overwrite to replace it, or choose another name."
    )


def _workers(plan: Plan, options: ConsolidateOptions, limits: Budget) -> int:
    """Reader threads: what was asked for, else a few a core, as many as the memory holds chunk buffers for."""
    n = options.workers or _READERS_A_CORE * budget.available_cores()
    wanted = Budget(limits.memory_bytes, min(n, max(1, len(plan.partitions))))
    return wanted.workers_that_fit(work_on.array_bytes(plan), "consolidation")


def _dry_run(found: Survey, final: Path, options: ConsolidateOptions, limits: Budget) -> DryRun:
    plan = make_plan(found, options.plan_options())
    n_workers = _workers(plan, options, limits)
    return DryRun(
        dataset=str(final), n_shards=len(plan.shards), n_samples=plan.n_rows, n_rejected=len(found.problems),
        n_partitions=len(plan.partitions), n_chunks=plan.n_chunks,
        disk_bytes=plan.disk_bytes,
        memory_bytes=budget.BASE_BYTES + n_workers * work_on.array_bytes(plan), n_workers=n_workers,
    )  # fmt: skip


def _bad_shards(source: Path, plan: Plan, problems: Sequence[Problem]) -> BadShards:
    lines = [f"  {ascii(p.path)[1:-1]}   {p.code}   {p.detail}" for p in islice(problems, _SHOWN_PROBLEMS)]
    if len(problems) > _SHOWN_PROBLEMS:
        lines.append(f"  ... and {len(problems) - _SHOWN_PROBLEMS:,} more: tsclust inspect {source} --json")
    return BadShards(
        f"{plural(len(problems), 'bad shard')} in {source}; nothing was published, the work on the other "
        f"{format_count(len(plan.shards))} is kept.\n" + "\n".join(lines) + "\n"
        "Mend them and run the same command again, or leave them out: --on-bad skip",
        problems,
    )
