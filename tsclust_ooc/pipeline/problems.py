"""Bad shards as a person reads them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from tsclust_ooc import consolidate as work_on
from tsclust_ooc.errors import BadInput
from tsclust_ooc.plan import Plan
from tsclust_ooc.remote import Remote
from tsclust_ooc.shards.schema import Problem, natural_key
from tsclust_ooc.units import format_count, plural

_SHOWN_PROBLEMS = 100
MEND = "Mend them and run the same command again, or leave them out: --on-bad skip"


class BadShards(BadInput):
    """Shards that cannot be used; `problems` has them all."""

    def __init__(self, message: str, problems: Sequence[Problem]) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


def bad_shards(source: Path | Remote, plan: Plan, problems: Sequence[Problem], next_step: str = MEND) -> BadShards:
    """The error that names bad shards, and says what to do when they are mended."""
    return BadShards(
        f"{plural(len(problems), 'bad shard')} in {source}; nothing was published, the work on the other "
        f"{format_count(len(plan.shards))} is kept.\n" + "\n".join(problem_lines(source, problems)) + f"\n{next_step}",
        problems,
    )


def problem_lines(source: Path | Remote, problems: Sequence[Problem]) -> list[str]:
    """A line a bad shard, of the first hundred."""
    lines = [f"  {ascii(p.path)[1:-1]}   {p.code}   {p.detail}" for p in islice(problems, _SHOWN_PROBLEMS)]
    if len(problems) > _SHOWN_PROBLEMS:
        lines.append(f"  ... and {len(problems) - _SHOWN_PROBLEMS:,} more: tsclust inspect {source} --json")
    return lines


def leave_out(
    source: Path | Remote, plan: Plan, problems: Sequence[Problem], bad: Sequence[Problem]
) -> tuple[Plan, list[Problem]]:
    """The plan without the shards that were found `bad`, and all that are left out, in the order of a survey."""
    together = sorted([*problems, *bad], key=lambda problem: natural_key(problem.path))
    smaller = work_on.without(plan, bad)
    if not smaller.shards:
        raise bad_shards(source, plan, together)
    return smaller, together
