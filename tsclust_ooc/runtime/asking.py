"""What may be asked of a batch system: words that stay where they are put in a job script.

Invariant: what `check_jobs` lets pass is one word or one directive of its line, whatever shell or scheduler reads it.
"""

from __future__ import annotations

import re

from tsclust_ooc.errors import UsageError
from tsclust_ooc.runtime.spec import Jobs
from tsclust_ooc.units import parse_bytes

_MIB = 2**20
_WORD = re.compile(r"[A-Za-z0-9_.,:@+%][A-Za-z0-9_.,:@+%-]*")
_WALLTIME = re.compile(r"(?:(\d{1,3})-)?(\d{1,4}):([0-5]\d):([0-5]\d)", re.ASCII)
_DIRECTIVE = re.compile(r"-[ -~]+")


def check_jobs(jobs: Jobs) -> None:
    """Refuse what must not stand in a directive.

    Raises
    ------
    UsageError
        A queue, account, walltime, memory, number of cores or directive that is not of its form.
    """
    for option, value in (("queue", jobs.queue), ("account", jobs.account), ("interface", jobs.interface)):
        if value is not None and not _WORD.fullmatch(value):
            raise UsageError(f"--{option} {value!r} is no name of one. Use letters, digits and any of _ . , : @ + -")
    if jobs.walltime is not None:
        walltime_seconds(jobs.walltime)
    if jobs.job_memory is not None and parse_bytes(jobs.job_memory) < _MIB:
        raise UsageError(f"--job-memory {jobs.job_memory} is less than 1 MiB. Write it like 8GB.")
    if jobs.job_cores is not None and jobs.job_cores < 1:
        raise UsageError(f"--job-cores {jobs.job_cores} leaves nobody to work. Use 1 or more.")
    for line in jobs.directives:
        if not _DIRECTIVE.fullmatch(line):
            raise UsageError(
                f"--directives {line!r} is no directive: one line of printable ASCII that begins with a dash. "
                "Write it like --directives=--constraint=avx512"
            )


def walltime_seconds(text: str) -> int:
    """Seconds of a time limit written as HH:MM:SS or D-HH:MM:SS; UsageError when it is neither, or nothing."""
    match = _WALLTIME.fullmatch(text)
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0, 0)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise UsageError(f"--walltime {text!r} is no time limit. Write hours, minutes and seconds, like 04:00:00.")
    return total
