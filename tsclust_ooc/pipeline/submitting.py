"""submit: a command into jobs of a batch system."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tsclust_ooc import files, interruption, records, submission
from tsclust_ooc.arguments import FORMAT_VERSION, save_words
from tsclust_ooc.errors import BadInput, CannotWrite, TryAgain, TsclustError, UsageError
from tsclust_ooc.runtime import Jobs
from tsclust_ooc.runtime.asking import check_jobs
from tsclust_ooc.submission import Batch, JobScript

COMMANDS = ("consolidate", "cluster", "distances")
PROGRAM = (sys.executable, "-m", "tsclust_ooc")
_OWN_FLAGS = ("--init", "--partition", "--one-based", "--finalize", "--dry-run")
_ERRORS = {kind.exit_code: kind for kind in (UsageError, BadInput, CannotWrite, TryAgain)}


@dataclass(frozen=True)
class SubmitOptions:
    """Options of submit.

    Attributes
    ----------
    scheduler
        The batch system: slurm, pbs, sge or lsf.
    inner_scheduler
        The --scheduler of the command inside its job (threads, local, slurm or tls://...). Default: threads.
    tasks
        Most tasks of the array that writes the partitions of a consolidation; each writes several where there are more.
    print
        Print the scripts and the commands that submit them; write and submit nothing.
    """

    scheduler: str | None = None
    inner_scheduler: str | None = None
    tasks: int = 100
    print: bool = False

    def __post_init__(self) -> None:
        if self.tasks < 1:
            raise UsageError(f"--tasks {self.tasks} leaves nobody to work. Use 1 or more.")


DEFAULTS = SubmitOptions()


@dataclass(frozen=True)
class Task:
    """The command to submit: its words as they are run, with absolute paths, and the directory it publishes."""

    words: tuple[str, ...]
    result: Path

    @property
    def command(self) -> str:
        """The first word."""
        return self.words[0]


@dataclass(frozen=True)
class SubmittedJob:
    """One job. `id` is '' where nothing was submitted; `submit` are the words that submit it, `logs` a pattern."""

    role: str
    id: str
    script: str
    submit: str
    logs: str


@dataclass(frozen=True)
class Submitted:
    """Result of submit: the job folder, its jobs in order, and the commands that show and cancel them.

    `texts` has the files by name where they were only printed; `n_partitions` is 0 but for a consolidation. There are
    no jobs where the dataset is there already, made from these shards.
    """

    command: str
    scheduler: str
    folder: str
    arguments: str
    jobs: tuple[SubmittedJob, ...]
    n_partitions: int
    n_tasks: int
    watch: str
    cancel: str
    texts: dict[str, str]


def submit(task: Task, options: SubmitOptions, jobs: Jobs, program: Sequence[str] = PROGRAM) -> Submitted:
    """Submit `task` as jobs of a batch system, or with `options.print` say what would be submitted.

    A consolidation is planned here and now (`--init`, or `--dry-run` where it is only printed), then becomes an array
    of jobs that write its partitions and one that publishes. Any other command is one job. `program` starts tsclust.

    Raises
    ------
    UsageError
        An option that cannot be meant; nothing was written.
    TsclustError
        There is no such batch system here, it refused a job (those before it are cancelled), or planning failed:
        then of the kind that has the exit code of the plan.
    """
    batch = submission.check_batch(options.scheduler)
    check_jobs(jobs)
    _check_words(task)
    if not options.print:
        submission.check_present(batch)
    n_partitions = 0
    if task.command == "consolidate":
        n_partitions = _plan(task, "--dry-run" if options.print else "--init", program)
        if n_partitions == 0:
            return Submitted(task.command, batch.name, "", "", (), 0, 0, "", "", {})
    folder = task.result.with_name(f".{task.result.name}.jobs")
    scripts = _scripts_of(task, batch, options, jobs, folder, n_partitions, tuple(program))
    if options.print:
        return _result(task, batch, folder, scripts, [], texts=True)
    _make_private(folder)
    save_words(folder / scripts[0].arguments, task.words)
    for job in scripts:
        files.write_atomic(folder / _file_name(job), submission.render(job).encode("ascii"))
    return _result(task, batch, folder, scripts, _submit_all(batch, folder, scripts), texts=False)


def _check_words(task: Task) -> None:
    if task.command not in COMMANDS:
        raise UsageError(f"{task.command} is nothing to submit. Use one of: {', '.join(COMMANDS)}.")
    if task.command != "consolidate":
        return
    for word in task.words:
        if word.partition("=")[0] in _OWN_FLAGS:
            raise UsageError(f"{word} is what submit gives to its jobs by itself. Leave it away.")


def _plan(task: Task, flag: str, program: Sequence[str]) -> int:
    """Number of partitions, as the command itself says with `flag`; its messages go to our stderr."""
    words = [*program, *task.words, flag, "--json"]
    settled = {name: value for name, value in os.environ.items() if not name.startswith("TSCLUST_")}
    # In / because `python -m` looks for modules where it is started, and all paths are absolute.
    done = subprocess.run(words, cwd="/", env=settled, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        raise _ERRORS.get(done.returncode, TsclustError)(
            f"nothing was submitted: tsclust consolidate {flag} ended with exit code {done.returncode}. "
            "Mend what it says above, then run the same command again."
        )
    try:
        found = json.loads(done.stdout.splitlines()[-1])["n_partitions"]
    except (ValueError, LookupError, TypeError) as error:
        raise TsclustError(
            f"nothing was submitted: tsclust consolidate {flag} --json printed {done.stdout[-200:]!r}, which says no "
            f"n_partitions. Is {shlex.join(program)} this version of tsclust?"
        ) from error
    if not isinstance(found, int) or found < 0:
        raise TsclustError(f"nothing was submitted: {found!r} partitions were planned. Look at tsclust inspect.")
    return found


def _scripts_of(
    task: Task, batch: Batch, options: SubmitOptions, jobs: Jobs, folder: Path, n_partitions: int,
    program: tuple[str, ...],
) -> list[JobScript]:  # fmt: skip
    """The scripts of a task, in the order they run.

    Their files are named after all they depend on: a job that waits in the queue must not find the arguments of a
    later submission under its own name.
    """
    asked = {name: value for name, value in asdict(jobs).items() if value}
    tag = records.digest([task.words, batch.name, options.tasks, asked, n_partitions, program])[:12]
    base = JobScript(batch, task.command, str(folder), f"args-{tag}.json", program, jobs)
    if task.command != "consolidate":
        return [base]
    n_tasks = min(n_partitions, options.tasks)
    return [
        replace(base, role="partitions", n_partitions=n_partitions, n_tasks=n_tasks),
        replace(base, role="finalize"),
    ]


def _file_name(job: JobScript) -> str:
    return job.arguments.replace("args-", f"{job.role}-").replace(".json", ".sh")


def _make_private(folder: Path) -> None:
    """Make the job folder, or see that the one that is there is ours alone: jobs do what its files say."""
    with files.naming_the_place(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o077
    if not private:
        raise CannotWrite(f"{folder} is there and not a directory of yours alone (mode 0700). Move it away.")


def _submit_all(batch: Batch, folder: Path, scripts: Sequence[JobScript]) -> list[str]:
    """Submit each after the one before it; where one fails, those before it are cancelled. Returns the ids."""
    ids: list[str] = []
    try:
        for job in scripts:
            with interruption.postponed():  # a job whose id nobody noted cannot be cancelled
                ids.append(submission.submit_script(batch, folder, _file_name(job), ids[-1] if ids else None))
    except TsclustError as error:
        if not ids:
            raise
        raise type(error)(f"{error}\nOf the same work, {submission.cancel(batch, ids)}.") from error
    except BaseException:
        if ids:
            submission.cancel(batch, ids)
        raise
    return ids


def _result(
    task: Task, batch: Batch, folder: Path, scripts: Sequence[JobScript], ids: Sequence[str], *, texts: bool
) -> Submitted:
    shown = ids or [f"JOB{i + 1}" for i in range(len(scripts))]
    found = {scripts[0].arguments: arguments_text(task)} | {_file_name(job): submission.render(job) for job in scripts}
    return Submitted(
        command=task.command, scheduler=batch.name, folder=str(folder), arguments=scripts[0].arguments,
        jobs=tuple(
            SubmittedJob(
                job.role, ids[i] if ids else "", _file_name(job),
                _submit_line(batch, _file_name(job), shown[i - 1] if i else None), _logs(job, ids[i] if ids else "*"),
            )
            for i, job in enumerate(scripts)
        ),
        n_partitions=scripts[0].n_partitions, n_tasks=scripts[0].n_tasks,
        watch=shlex.join(batch.watch_words(shown)), cancel=shlex.join(batch.cancel_words(shown)),
        texts=found if texts else {},
    )  # fmt: skip


def arguments_text(task: Task) -> str:
    """The arguments file of a task, on one line."""
    return records.dumps({"format_version": FORMAT_VERSION, "words": task.words}) + "\n"


def _submit_line(batch: Batch, script: str, after: str | None) -> str:
    line = shlex.join(batch.submit_words(script, after))
    return f"{line} < {script}" if batch.reads_stdin else line


def _logs(job: JobScript, job_id: str) -> str:
    """The logs of a job as a pattern of names in its folder."""
    number = job_id.partition("[")[0].partition(".")[0]
    return f"{job.role}-{number}{'-*' if job.is_array else ''}.log"


def enter(folder: str) -> str:
    """The shell command that goes to the job folder."""
    return f"cd -- {submission.quote(folder)}"
