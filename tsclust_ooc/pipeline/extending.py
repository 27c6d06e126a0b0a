"""What an append finds: the dataset that is there, and what of its source is new, changed or gone.

Invariant: committed shards are compared by name and stamp, and never opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tsclust_ooc import appending
from tsclust_ooc.appending import Comparison, Standing
from tsclust_ooc.errors import UsageError
from tsclust_ooc.pipeline.outcomes import new_in
from tsclust_ooc.pipeline.problems import BadShards, problem_lines
from tsclust_ooc.plan import Plan
from tsclust_ooc.remote import Remote
from tsclust_ooc.shards.listing import Listing
from tsclust_ooc.shards.schema import Problem, Schema, Shard, ShardError
from tsclust_ooc.shards.splits import splitter
from tsclust_ooc.shards.survey import Survey
from tsclust_ooc.units import plural

_NAMED = 5
_ASKED_SHARDS = 1000


@dataclass(frozen=True)
class Addition:
    """What an append would do: the dataset there is, the plan of the longer one, and the shards that it leaves out.

    `changed` are committed shards that are listed with another stamp, `vanished` those that are not there any more:
    their rows stay. Of `n_presumed` new shards nothing but the size is known.
    """

    base: Standing
    plan: Plan
    problems: tuple[Problem, ...]
    changed: tuple[Problem, ...]
    vanished: tuple[str, ...]
    n_new_shards: int
    n_presumed: int

    @property
    def new_problems(self) -> tuple[Problem, ...]:
        """The bad shards that the dataset does not know yet."""
        known = {(problem.path, problem.code) for problem in self.base.rejected}
        return tuple(problem for problem in self.problems if (problem.path, problem.code) not in known)


def look_for_new(
    final: Path, listing: Listing, split_pattern: str | None, survey: Callable[[Listing, Schema], Survey]
) -> Addition:
    """Survey what is listed and the dataset at `final` does not have.

    Raises
    ------
    UsageError
        What is listed is not of the source of the dataset; or it belongs to other splits now.
    BadInput
        There is no dataset that can be appended to.
    TryAgain
        It was replaced meanwhile.
    """
    base = appending.standing(final)
    manifest = base.manifest
    here = appending.below(listing, manifest.source)
    if here is None:
        raise UsageError(
            f"{final} was made from {manifest.source}, and {listing.root} is not that folder, nor one below it. "
            "Append from the same source, or make another dataset."
        )
    _check_splits(final, base.shards, split_pattern)
    found = appending.compare(base.shards, here)
    new = _surveyed(found, base, survey)
    plan = appending.extended(base, new)
    return Addition(
        base, plan, appending.left_out(base, new), found.changed, found.vanished, len(new.shards), new.n_presumed
    )


def _surveyed(found: Comparison, base: Standing, survey: Callable[[Listing, Schema], Survey]) -> Survey:
    manifest, new = base.manifest, found.new
    if new.entries:
        return survey(new, manifest.schema)
    return Survey(manifest.source, manifest.schema, manifest.reason, (), tuple(new.problems), (), (), new.n_other)


def _check_splits(final: Path, shards: Sequence[Shard], split_pattern: str | None) -> None:
    """UsageError where new shards would go to other splits than their like did: the pattern is not kept anywhere."""
    split = splitter(split_pattern)
    for shard in shards[:: max(1, len(shards) // _ASKED_SHARDS)]:
        try:
            now = split(shard.path)
        except ShardError:
            now = "none"
        if now != shard.split:
            asked = "without --split-pattern" if split_pattern is None else f"with --split-pattern {split_pattern}"
            raise UsageError(
                f"{final}: {ascii(shard.path)[1:-1]} was committed to split {shard.split}; {asked} its split is {now}. "
                "Append with the --split-pattern that the dataset was made with."
            )


def changed_shards(final: Path, source: Path | Remote, found: Addition) -> BadShards:
    """The error for committed shards that changed, together with the new ones that are bad."""
    problems = (*found.changed, *found.new_problems)
    return BadShards(
        f"{plural(len(found.changed), 'committed shard')} of {final} changed in {source}; nothing was published, and "
        "what changed was not read again.\n"
        + "\n".join(problem_lines(source, problems))
        + "\nTo append the new shards and keep the rows as they were committed: --on-bad skip. "
        "To read all shards again: --overwrite in place of --append",
        problems,
    )


def told(source: Path | Remote, found: Addition) -> Iterator[str]:
    """What a person should know of an append before it is done."""
    if found.vanished:
        n = len(found.vanished)
        names = ", ".join(ascii(path)[1:-1] for path in found.vanished[:_NAMED]) + (", ..." if n > _NAMED else "")
        yield f"{plural(n, 'committed shard')} not there any more: {names}. Their rows stay."
    if found.changed:
        yield (
            f"{plural(len(found.changed), 'committed shard')} changed since; their rows stay as they were committed:\n"
            + "\n".join(problem_lines(source, found.changed))
        )
    if found.new_problems and not found.n_new_shards:
        yield (
            f"nothing to append but {plural(len(found.new_problems), 'bad shard')}, which will be recorded when there "
            "is:\n" + "\n".join(problem_lines(source, found.new_problems))
        )
    if found.n_new_shards:
        n_samples, n_shards = new_in(found.plan)
        yield f"appending {plural(n_samples, 'sample')} of {plural(n_shards, 'new shard')}"
