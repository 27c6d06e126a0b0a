"""consolidate: shards into a published dataset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tsclust_ooc import budget
from tsclust_ooc import consolidate as work_on
from tsclust_ooc import work as work_dir
from tsclust_ooc.dataset import Manifest, read_manifest, read_rejected, work_folders
from tsclust_ooc.errors import BadInput, CannotWrite, UsageError
from tsclust_ooc.mirror import Mirror
from tsclust_ooc.pipeline import extending, origins, sending
from tsclust_ooc.pipeline.consolidate_options import DEFAULTS as DEFAULTS
from tsclust_ooc.pipeline.consolidate_options import ConsolidateOptions as ConsolidateOptions
from tsclust_ooc.pipeline.consolidate_options import gathered as gathered
from tsclust_ooc.pipeline.consolidate_options import wanted
from tsclust_ooc.pipeline.extending import Addition
from tsclust_ooc.pipeline.fitting import process_bytes, workers_for
from tsclust_ooc.pipeline.origins import Origin
from tsclust_ooc.pipeline.outcomes import Consolidated as Consolidated
from tsclust_ooc.pipeline.outcomes import DryRun as DryRun
from tsclust_ooc.pipeline.outcomes import new_in, result
from tsclust_ooc.pipeline.problems import BadShards as BadShards
from tsclust_ooc.pipeline.problems import bad_shards, leave_out
from tsclust_ooc.pipeline.session import Session, check_apart, session
from tsclust_ooc.plan import Partition, Plan, make_plan
from tsclust_ooc.progress import Listener, silent
from tsclust_ooc.provenance import Meter
from tsclust_ooc.reading import RowReader, Unproven
from tsclust_ooc.remote import Remote, is_url, plain_path, shown
from tsclust_ooc.shards.listing import Listing
from tsclust_ooc.shards.parsers import Parsers
from tsclust_ooc.shards.schema import Problem, Schema
from tsclust_ooc.shards.splits import splitter
from tsclust_ooc.shards.survey import KnownBad, Survey, survey
from tsclust_ooc.staging import Stage, Staging
from tsclust_ooc.tasks import write_task
from tsclust_ooc.units import plural


def consolidate(
    source: str | Path | Sequence[str | Path],
    dataset: str | Path,
    options: ConsolidateOptions = DEFAULTS,
    listener: Listener = silent,
) -> Consolidated | DryRun:
    """Make the dataset from the shards of `source`: survey, plan, write every partition, publish.

    A source is a folder, one file, or a text file (.txt, .list) with a path a line; several are a sequence.
    Running it again after any interruption goes on where it stopped and gives the same bytes.

    Raises
    ------
    BadShards
        There are bad shards and `on_bad` is 'fail'; all good partitions are kept for the next run.
    CannotWrite
        Something else lies at `dataset`, or the disk or the memory budget is too small.
    TryAgain
        Another process is consolidating to `dataset`, or has replaced it while shards were being appended.
    """
    given, options = gathered(source, options)
    if is_url(there := plain_path(str(dataset))):
        return sending.consolidate_to(there, options, listener, partial(_consolidate, given))
    return _consolidate(given, Path(there).expanduser().absolute(), options, listener)


def _consolidate(given: Origin, final: Path, options: ConsolidateOptions, listener: Listener) -> Consolidated | DryRun:
    check_places(given, final, options)
    if options.dry_run:
        limits = budget.resolve(options.memory, options.workers)
        held = Session(final, options, limits, Path(), Meter(), listener)  # nothing is held, and nothing written
        with Parsers(budget.available_cores()) as parsers, held.closing:
            if options.append and not _is_free(final):
                found = addition_for(held, given, parsers)
                planned = _dry_run(found.plan, len(found.problems), held)
                if not found.n_new_shards:
                    planned = replace(planned, n_partitions=0, n_new_partitions=0)
                return replace(planned, n_changed=len(found.changed), n_vanished=len(found.vanished))
            surveyed = survey_for(held, given, parsers, presume=isinstance(given, Remote))
            return _dry_run(make_plan(surveyed, options.plan_options()), len(surveyed.problems), held)
    parsers = Parsers(budget.available_cores())
    with session(final, "consolidate", "consolidated", options, listener) as held, parsers:
        return Consolidation(held, given, parsers).run()


class Consolidation:
    """A consolidation at work: what a command holds meanwhile, its source, its parsers."""

    def __init__(self, held: Session, source: Origin, parsers: Parsers) -> None:
        assert isinstance(held.options, ConsolidateOptions)
        self.held, self.source, self.parsers, self.options = held, source, parsers, held.options
        self.final, self.listener = held.final, held.listener
        self.dashboard = ""
        self.presumed = False
        self.addition: Addition | None = None
        self.patience = parsers.patience
        work_on.recover(held.final)
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
        return all_of_them and (self.options.append or _is_free(self.final)) and not work_folders(self.final)

    def look(self, *, presume: bool = False) -> tuple[Plan, tuple[Problem, ...], Manifest | None]:
        """The plan, the shards it leaves out, and the dataset if it is there already, made by just this plan.

        With `presume`, shards of which many have the size of a proven one are not opened before they are read.

        Raises BadShards when it is, and is not what `on_bad` asks for; CannotWrite when something else is there.
        """
        if self.options.append and not _is_free(self.final):
            return self._look_for_new(presume=presume)
        if self.options.append:
            self.listener.say(f"there is no {self.final} yet to append to: consolidating all of {self.source}")
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

    def _look_for_new(self, *, presume: bool) -> tuple[Plan, tuple[Problem, ...], Manifest | None]:
        """What `look` says of an append: the dataset, where there is nothing to append to it."""
        self.addition = found = addition_for(self.held, self.source, self.parsers, self.known_bad, presume=presume)
        self.presumed = found.n_presumed > 0
        fails = found.changed and self.options.on_bad == "fail"
        for line in extending.told(self.source, replace(found, changed=()) if fails else found):
            self.listener.say(line)
        if fails:
            raise extending.changed_shards(self.final, self.source, found)
        if found.n_new_shards:
            return found.plan, found.problems, None
        if self._fails(found.new_problems):
            raise bad_shards(self.source, found.plan, found.new_problems)
        return found.plan, found.problems, found.base.manifest

    def finish(self, plan: Plan, problems: Sequence[Problem]) -> Consolidated:
        """Write what is missing of a plan, and publish; without the shards that turn out bad, where those are skipped.

        `problems` are those of the shards that the plan leaves out.
        """
        bad = self._write(plan, problems)
        while bad and self.options.on_bad == "skip" and not any(b.problem.code in work_dir.PASSING for b in bad):
            self.listener.say(f"{plural(len(bad), 'shard')} found bad while reading; planning again without them")
            plan, problems = leave_out(self.source, plan, problems, [b.problem for b in bad])
            there = work_on.published(self.final, plan) if plan.base is not None else None
            if there is not None:  # of what was new nothing is good
                return self.there_already(there)
            bad = self._write(plan, problems)
        everything = self.blamed(plan, [*problems, *(b.problem for b in bad)])
        if bad or self._fails(everything):
            raise bad_shards(self.source, plan, everything)
        return self.publish(work_dir.Work(self.final, work_dir.work_root(self.final, plan), plan))

    def publish(self, work: work_dir.Work) -> Consolidated:
        """Give written work its final name."""
        if replaced := origins.changed(self.source, work.plan.shards, self.patience):
            raise bad_shards(self.source, work.plan, replaced)
        try:
            seconds = round(self.held.meter.elapsed(), 3)
            manifest = work_on.finalize(work, replace_existing=self.options.overwrite, seconds=seconds)
        except work_dir.Superseded:
            return self.there_already(work_on.join_or_fail(self.final, work.plan))
        return self._told(result(manifest, self.final, self.held.meter, dashboard=self.dashboard, plan=work.plan))

    def there_already(self, manifest: Manifest) -> Consolidated:
        """The dataset that somebody published before."""
        work_on.sweep(self.final)
        return self._told(result(manifest, self.final, self.held.meter, dashboard=self.dashboard))

    def _told(self, done: Consolidated) -> Consolidated:
        """The result with what only this command knows."""
        n_retries, found = self.patience.n_retries, self.addition
        if n_retries:
            self.listener.say(f"{plural(n_retries, 'read')} had to be tried again")
        if found is None:
            return replace(done, n_retries=n_retries)
        return replace(done, n_retries=n_retries, n_changed=len(found.changed), n_vanished=len(found.vanished))

    def check_free(self, plan: Plan | None = None) -> None:
        """CannotWrite when there is something at the final name that is not to be replaced, nor made by `plan`."""
        if plan is not None and plan.base is not None:
            return  # what takes its place looks at what lies there
        ours = plan is not None and work_on.published(self.final, plan) is not None
        if not (ours or self.options.overwrite or _is_free(self.final)):
            raise CannotWrite(
                f"{self.final} already exists and was not made from these shards and options. "
                "Use --overwrite to replace it, or choose another name."
            )

    def blamed(self, plan: Plan, problems: Sequence[Problem]) -> list[Problem]:
        """The problems that `on_bad` is about: of an append, not what the dataset left out before."""
        if plan.base is None:
            return list(problems)
        known = {(problem.path, problem.code) for problem in read_rejected(self.final)}
        return [problem for problem in problems if (problem.path, problem.code) not in known]

    def _fails(self, problems: Sequence[Problem]) -> bool:
        return bool(problems) and self.options.on_bad == "fail"

    def _write(self, plan: Plan, problems: Sequence[Problem]) -> list[work_dir.BadShard]:
        n_workers = workers_for(self.held, plan)
        try:
            work = work_on.init(self.final, plan, problems)
            return self._write_partitions(work, n_workers) if work_dir.pending(work) else []
        except work_dir.Superseded:
            work_on.join_or_fail(self.final, plan)
            return []

    def _write_partitions(self, work: work_dir.Work, n_workers: int) -> list[work_dir.BadShard]:
        here = origins.staging_for(self.source, self.options.stage, self.held.scratch)
        # The stage is closed last: that sweeps what worker processes left which were killed.
        stage_here = self.held.stage_for(self.source, here, work.plan.source, self.patience)
        with stage_here as stage, self.held.runtime(n_workers) as runtime:
            self.dashboard = runtime.dashboard
            return work_on.run(work, self._writer(work, here, stage), runtime.mapper, self._counting(work))

    def _writer(self, work: work_dir.Work, here: Staging, stage: Stage | Mirror) -> Callable[[Partition], work_on.Done]:
        """What writes a partition: with the parsers and the stage here, or in another process with its own."""
        scheduler = self.options.scheduler
        if scheduler == "threads":
            return partial(
                work_on.write_partition, work, RowReader(work.plan, self.parsers, stage, presumed=self.presumed)
            )
        there = here if scheduler == "local" else replace(here, here=None, asked=self.options.scratch)
        return write_task(work, there, presumed=self.presumed)

    def _counting(self, work: work_dir.Work) -> Callable[[work_on.Done], None]:
        """Tells the listener how many shards are written; to be called with each partition that is done."""
        plan = work.plan
        total = sum(split.n_shards for split in plan.splits)
        done_rows = plan.n_rows - sum(p.stop - p.start for p in work_dir.pending(work))

        def on_done(done: work_on.Done) -> None:
            nonlocal done_rows
            done_rows += done.partition.stop - done.partition.start
            self.patience.add(done.n_retries)
            self.listener.advance("write", done_rows * total // max(plan.n_rows, 1), total)

        return on_done


def place_of(dataset: str | Path, steps: str) -> Path:
    """The absolute path of a dataset that `steps` make, ~ understood; UsageError when it is a URL."""
    there = plain_path(str(dataset))
    if is_url(there):
        raise UsageError(
            f"{steps}: {shown(there)} is a URL, and steps share a directory. Give a shared one, or consolidate to the "
            "URL by one command."
        )
    return Path(there).expanduser().absolute()


def check_places(source: Origin, final: Path, options: ConsolidateOptions) -> None:
    """BadInput, UsageError or CannotWrite for places that cannot be meant."""
    for one in (source, *options.also):
        origins.check_there(one)
        if isinstance(one, Path):
            check_apart(final, one)
    splitter(options.split_pattern)
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


def survey_for(
    held: Session, given: Origin, parsers: Parsers, known_bad: KnownBad | None = None, *, presume: bool = False
) -> Survey:
    """The survey that a consolidation begins with: shards that an earlier one found bad are problems here."""
    options = held.options
    assert isinstance(options, ConsolidateOptions)
    parsers.warm_up()
    return survey(
        _listed(held, given, parsers), parsers, wanted(options), presume=presume, listener=held.listener,
        known_bad=known_bad or work_dir.known_bad(held.final), local=held.local_for(given, parsers.patience),
    )  # fmt: skip


def _listed(held: Session, given: Origin, parsers: Parsers) -> Listing:
    assert isinstance(held.options, ConsolidateOptions)
    listing = origins.listed(given, held.options.also, parsers.patience)
    for folder in () if isinstance(given, Remote) else listing.folders:  # also those that a list names
        check_apart(held.final, Path(folder))
    return listing


def addition_for(
    held: Session, given: Origin, parsers: Parsers, known_bad: KnownBad | None = None, *, presume: bool = False
) -> Addition:
    """What an append begins with, as `survey_for` for all other consolidations."""
    options, final = held.options, held.final
    assert isinstance(options, ConsolidateOptions)
    manifest = read_manifest(final)
    if (other := options.differing(manifest.schema, manifest.options)) is not None:
        flag, now, then = other
        raise UsageError(f"--{flag} {now}: {final} was made with {then}, and stays so. Leave --{flag} away to append.")
    parsers.warm_up()

    def look(listing: Listing, schema: Schema) -> Survey:
        return survey(
            listing, parsers, wanted(options), schema=schema, known_bad=known_bad or work_dir.known_bad(final),
            presume=presume, listener=held.listener, local=held.local_for(given, parsers.patience),
        )  # fmt: skip

    return extending.look_for_new(final, _listed(held, given, parsers), options.split_pattern, look)


def _is_free(final: Path) -> bool:
    return not final.exists() or (final.is_dir() and not any(final.iterdir()))


def _same_shards(a: Sequence[Problem], b: Sequence[Problem]) -> bool:
    return {problem.path for problem in a} == {problem.path for problem in b}


def _dry_run(plan: Plan, n_problems: int, held: Session) -> DryRun:
    n_workers = workers_for(held, plan)
    here = n_workers if held.options.scheduler in ("threads", "local") else 0
    return DryRun(
        dataset=str(held.final), n_shards=len(plan.shards), n_samples=plan.n_rows, n_rejected=n_problems,
        n_partitions=len(plan.partitions), n_chunks=plan.n_chunks, disk_bytes=plan.new_bytes,
        memory_bytes=budget.BASE_BYTES + work_on.plan_bytes(plan)
        + here * (work_on.array_bytes(plan) + process_bytes(held, plan)),
        n_workers=n_workers, n_new_partitions=len(plan.partitions) - len(plan.committed),
        n_appended=new_in(plan)[0], n_appended_shards=new_in(plan)[1],
    )  # fmt: skip
