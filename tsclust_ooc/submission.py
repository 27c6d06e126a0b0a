"""Jobs for a batch system: their scripts, and the calls that submit and cancel them.

Invariant: of what a user gives, a script holds the paths of the program and of the job folder, quoted, and in its
directives words that were checked against a closed alphabet. Whatever a path is called, a script is printable ASCII, so
no part of a name can begin a line of its own.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import string
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from tsclust_ooc.errors import TsclustError, UsageError
from tsclust_ooc.runtime import Jobs
from tsclust_ooc.runtime.asking import walltime_seconds
from tsclust_ooc.units import parse_bytes

_MIB = 2**20
_NOTICE_SECONDS = 300  # before the time limit; tsclust saves its progress within 10
_PLAIN = frozenset(string.printable) - frozenset(string.whitespace + "'\\") | {" "}


@dataclass(frozen=True)
class Batch:
    """A batch system: its programs, and how they are spoken to.

    `notices` are signals besides SIGTERM that announce the end of a job, as words behind those of `trap`.
    """

    name: str
    submit: tuple[str, ...]
    after: tuple[str, ...]  # {id} is the job that must have ended
    job_id: re.Pattern[str]
    watch: tuple[str, ...]
    cancel: tuple[str, ...]
    separator: str  # between the ids of `watch`
    reads_stdin: bool = False
    notices: str = ""

    def submit_words(self, script: str, after: str | None = None) -> list[str]:
        """The command line that submits `script`, to start when job `after` has ended, however it ended.

        However: tasks that met bad shards end with an error, and finalize is what lists them all. It publishes
        nothing where a partition is missing, so it may run after anything.
        """
        condition = [] if after is None else [word.format(id=after) for word in self.after]
        return [*self.submit, *condition, *([] if self.reads_stdin else [script])]

    def watch_words(self, ids: Sequence[str]) -> list[str]:
        """The command line that shows the state of jobs."""
        return [*self.watch, *(ids if self.separator == " " else [self.separator.join(ids)])]

    def cancel_words(self, ids: Sequence[str]) -> list[str]:
        """The command line that cancels jobs."""
        return [*self.cancel, *ids]


BATCHES = {
    batch.name: batch
    for batch in (
        Batch(
            "slurm", ("sbatch", "--parsable"), ("--dependency=afterany:{id}",), re.compile(r"([0-9]+)(?:;[\w.-]+)?"),
            ("squeue", "-j"), ("scancel",), ",",
        ),
        Batch(
            "pbs", ("qsub",), ("-W", "depend=afterany:{id}"), re.compile(r"([0-9]+(?:\[\])?(?:\.[A-Za-z0-9_.-]+)?)"),
            ("qstat", "-t"), ("qdel",), " ",
        ),
        # -hold_jid waits for every task of an array. -notify sends USR2 before KILL and USR1 before STOP.
        Batch(
            "sge", ("qsub", "-terse"), ("-hold_jid", "{id}"), re.compile(r"([0-9]+)(?:\.[0-9]+-[0-9]+:[0-9]+)?"),
            ("qstat", "-j"), ("qdel",), ",", notices=" USR1 USR2",
        ),
        Batch(
            "lsf", ("bsub",), ("-w", "ended({id})"), re.compile(r"Job <([0-9]+)> is submitted to .*"),
            ("bjobs",), ("bkill",), " ", reads_stdin=True,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class JobScript:
    """What one job script is made from.

    Attributes
    ----------
    batch
        The batch system.
    role
        What the job does: 'partitions' or 'finalize' of a consolidation, or a command of its own.
    folder
        Absolute directory of the arguments file; the job works and logs there.
    arguments
        Name of the arguments file in it.
    program
        Words that start tsclust, the first an absolute path.
    jobs
        What the user asks the batch system for, checked by `runtime.asking.check_jobs`.
    n_partitions, n_tasks
        Of 'partitions': how many there are, and by how many tasks of an array they are written.
    """

    batch: Batch
    role: str
    folder: str
    arguments: str
    program: tuple[str, ...]
    jobs: Jobs
    n_partitions: int = 0
    n_tasks: int = 1

    @property
    def name(self) -> str:
        """Name of the job in the queue; nothing of the user's."""
        return f"tsclust-{self.role}"

    @property
    def is_array(self) -> bool:
        """Whether there are several tasks: PBS knows no array of one."""
        return self.n_tasks > 1

    @property
    def folder_is_pattern(self) -> bool:
        """Whether Slurm would take part of the folder's name for a pattern; it reads output files' whole paths so."""
        return not {"%", "\\"}.isdisjoint(self.folder)

    @property
    def queue(self) -> str | None:
        """Queue, or partition in Slurm's words."""
        return self.jobs.queue

    @property
    def account(self) -> str | None:
        """Account or project."""
        return self.jobs.account

    @property
    def directives(self) -> tuple[str, ...]:
        """Further directives."""
        return self.jobs.directives

    @property
    def cores(self) -> int | None:
        """Cores of a task; finalize counts and renames, for which one will do."""
        return self.jobs.job_cores and (1 if self.role == "finalize" else self.jobs.job_cores)

    @property
    def memory_mib(self) -> int | None:
        """Memory of a task in MiB, the unit all four batch systems have."""
        return None if self.jobs.job_memory is None else -(-parse_bytes(self.jobs.job_memory) // _MIB)

    @property
    def memory_mib_a_core(self) -> int:
        """The same for each core, as SGE counts."""
        return -(-(self.memory_mib or 0) // (self.cores or 1))

    @property
    def seconds(self) -> int | None:
        """Time limit in seconds."""
        return None if self.jobs.walltime is None else walltime_seconds(self.jobs.walltime)

    @property
    def walltime(self) -> str | None:
        """Time limit as HH:MM:SS."""
        if self.seconds is None:
            return None
        return f"{self.seconds // 3600:02d}:{self.seconds // 60 % 60:02d}:{self.seconds % 60:02d}"

    @property
    def walltime_minutes(self) -> str:
        """Time limit as LSF wants it, hours:minutes, rounded up."""
        minutes = -(-(self.seconds or 0) // 60)
        return f"{minutes // 60}:{minutes % 60:02d}"

    @property
    def notice_seconds(self) -> int:
        """How long before its time limit the job wants to know; of a short one, a quarter of its time."""
        return _NOTICE_SECONDS if self.seconds is None else min(_NOTICE_SECONDS, max(1, self.seconds // 4))

    @property
    def stop_after(self) -> int | None:
        """Seconds after which the script itself stops the work: PBS leaves it 10 seconds, SGE none."""
        if self.seconds is None or self.batch.name not in ("pbs", "sge"):
            return None
        return self.seconds - self.notice_seconds


def check_batch(name: str | None) -> Batch:
    """The batch system called `name`; UsageError for another."""
    if name is None or name not in BATCHES:
        found = "was not given" if name is None else f"{name} is no batch system"
        raise UsageError(
            f"--scheduler {found}. Use one of: {', '.join(BATCHES)}. What the job itself runs its work on, threads or "
            "a dask cluster, is --inner-scheduler."
        )
    return BATCHES[name]


def quote(text: str) -> str:
    r"""`text` as one word of bash, in printable ASCII on one line.

    Control characters and bytes beyond ASCII are written as `$'\xHH'`: a newline in a folder's name would otherwise
    begin a line, and batch systems look for directives at the beginning of lines.
    """
    if all(c in _PLAIN or c in "'\\" for c in text):
        return shlex.quote(text)
    body = (chr(b) if chr(b) in _PLAIN else f"\\x{b:02x}" for b in os.fsencode(text))
    return f"$'{''.join(body)}'"


_scripts = Environment(
    loader=PackageLoader("tsclust_ooc"), autoescape=False, undefined=StrictUndefined, trim_blocks=True,
    lstrip_blocks=True, keep_trailing_newline=True,
)  # fmt: skip
_scripts.filters["shell"] = quote


def render(job: JobScript) -> str:
    """The script of a job; the same `JobScript` gives the same text."""
    return _scripts.get_template(f"job_{job.batch.name}.sh.j2").render(job=job)


def check_present(batch: Batch) -> None:
    """Raise TsclustError where the batch system's submit program is not on the PATH."""
    if shutil.which(batch.submit[0]) is None:
        raise TsclustError(
            f"{batch.submit[0]} is not on the PATH, so nothing can be submitted to {batch.name} from this machine. "
            "Go to a login node and run the same command there, or look at the scripts with --print."
        )


def submit_script(batch: Batch, folder: Path, script: str, after: str | None = None) -> str:
    """Submit the script called `script` in `folder`, without a shell; returns the job's id.

    Raises
    ------
    TsclustError
        The batch system refuses it, or answers with what is no job id.
    """
    words = batch.submit_words(script, after)
    # In the folder: output files are named relative to it, so that its path stands in no directive.
    with (folder / script).open("rb") as text:
        done = subprocess.run(
            words, cwd=folder, stdin=text if batch.reads_stdin else subprocess.DEVNULL, capture_output=True,
            text=True, errors="backslashreplace", check=False,
        )  # fmt: skip
    if done.returncode != 0:
        raise TsclustError(
            f"{batch.submit[0]} refused {script} with exit code {done.returncode}: {_said(done)}. "
            "Change what it names, or look at the script with --print."
        )
    match = batch.job_id.fullmatch(done.stdout.strip().rpartition("\n")[2].strip())
    if match is None:
        raise TsclustError(
            f"{shlex.join(words)} answered {done.stdout.strip()!r}, which names no job. It may have been submitted: "
            f"look into the queue of {batch.name} for jobs called tsclust-..."
        )
    return match[1]


def cancel(batch: Batch, ids: Sequence[str]) -> str:
    """Cancel jobs; returns what became of it, for the message of an error that is under way."""
    words = batch.cancel_words(ids)
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{', '.join(ids)} could not be cancelled ({error.strerror}): {shlex.join(words)}"
    if done.returncode != 0:
        return f"{', '.join(ids)} could not be cancelled ({_said(done)}): {shlex.join(words)}"
    return f"{', '.join(ids)} was cancelled again"


def _said(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip() or done.stdout.strip() or "no message").rstrip(".")
