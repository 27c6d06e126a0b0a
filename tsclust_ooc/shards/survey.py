"""What a source holds: its shards in order, the schema they share, and every problem. Changes nothing.

Invariant: each file that looks like a shard ends up in `shards` or in `problems`, never in neither. What a survey says
of a file is what HDF5 or the template proof says of it. Only one that was asked to presume takes the size of a file for
a promise, which whoever reads the file must see kept: it says so in `n_presumed`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tsclust_ooc.errors import BadInput, TsclustError
from tsclust_ooc.inflight import Pace
from tsclust_ooc.patience import Patience
from tsclust_ooc.progress import Listener, silent
from tsclust_ooc.shards import layouts
from tsclust_ooc.shards.listing import SUFFIXES, WANTED, Entry, Listing, list_shards
from tsclust_ooc.shards.parsers import Parsers
from tsclust_ooc.shards.schema import AS_GUESSED, Problem, Schema, Shard, ShardError, Structure, Wanted, natural_key
from tsclust_ooc.shards.splits import ALL, split_order, splitter
from tsclust_ooc.shards.templates import Template, holds_samples, matchers
from tsclust_ooc.units import plural

_MAX_TEMPLATES, _TRIES_A_SIZE = 16, 3
_BATCH = 256
_WORTH_PRESUMING = 16  # files of one size

KnownBad = Callable[[str, int, int], Problem | None]
Local = Callable[[str, tuple[int, int]], AbstractContextManager[str]]
_Known = list[tuple[Template, Structure]]
_Looks = tuple[list[Structure | None], list[Problem]]


def where_it_is(path: str, stamp: tuple[int, int]) -> AbstractContextManager[str]:  # noqa: ARG001 - of any stamp
    """A shard that is looked at where it lies."""
    return contextlib.nullcontext(path)


@dataclass(frozen=True)
class Survey:
    """The result of a survey. `source` is absolute; shards are grouped by split, in natural order inside each.

    `templates` prove shards equal to a parsed one; `notes` are for a person; `n_other` files are not shards. Of
    `n_presumed` good shards nothing but the size is known: each is what it seems if a template proves it when read.
    """

    source: str
    schema: Schema
    reason: str
    shards: tuple[Shard, ...]
    problems: tuple[Problem, ...]
    templates: tuple[Template, ...]
    notes: tuple[str, ...]
    n_other: int
    n_presumed: int = 0

    @property
    def n_samples(self) -> int:
        """Samples in all good shards."""
        return sum(shard.n_samples for shard in self.shards)

    @property
    def n_bytes(self) -> int:
        """Bytes of all good shards as files."""
        return sum(shard.size for shard in self.shards)

    def splits(self) -> dict[str, tuple[Shard, ...]]:
        """Shards of each split, in row order."""
        return {name: tuple(group) for name, group in itertools.groupby(self.shards, key=lambda s: s.split)}


@dataclass(frozen=True)
class _Asked:
    """How the files of a source become shards: with a guessed schema or a given one, each in the split it is told."""

    wanted: Wanted
    schema: Schema | None
    split: Callable[[str], str]

    def guess(self, counts: Counter[Structure]) -> layouts.Guess:
        """The schema, and the reason for it."""
        if self.schema is not None:
            return layouts.Guess(self.schema, "given")
        w = self.wanted
        return layouts.guess(counts, layout=w.layout, key=w.key, feature_axis=w.feature_axis, ids=w.ids)


def survey(
    source: Path | Sequence[Path] | Listing,
    parsers: Parsers,
    wanted: Wanted = AS_GUESSED,
    *,
    schema: Schema | None = None,
    known_bad: KnownBad = lambda path, size, mtime_ns: None,
    presume: bool = False,
    n_threads: int = 4,
    listener: Listener = silent,
    patience: Patience | None = None,
    local: Local = where_it_is,
) -> Survey:
    """Look at every shard below `source`: a directory, one HDF5 file, a list of paths, several of these, or a listing.

    Parameters
    ----------
    wanted
        What overrides the guess of how datasets map to samples, of which dataset holds them, of what names them; and
        what tells splits in place of folders.
    schema
        Take this one, do not guess. Then it is no error that there is not a single good shard.
    known_bad
        What an earlier read of the data found, by (path, size, mtime_ns); such shards are problems here.
    presume
        Do not open files of which many have the size of one that makes a template: presume that each is like it. Not
        done where such files would not all be good shards that a template can read.
    patience
        Tries again, and counts, what fails in passing. Default: that of the parsers.
    local
        Where to look at a shard of a path and stamp, inside a block; for a remote source that of its mirror.

    Raises
    ------
    BadInput
        `source` is not there, holds no shard, or none that can be read.
    UsageError
        `wanted` names a layout or an axis that is not known, or no expression with a group named split.
    """
    asked = _Asked(wanted, schema, splitter(wanted.split_pattern))
    patience = patience or parsers.patience
    here = _listed(source, known_bad, patience, may_be_empty=schema is not None)
    known = _learn(here, parsers, local)
    look = partial(_look, here, local, known, parsers, patience, n_threads, listener)
    if presume and (presumable := _presumable(here, known)):
        with contextlib.suppress(TsclustError):  # what seems wrong now may be what was presumed
            found = _judge(here, known, look(presumable), asked)
            if _readable_by_template(found, presumable, known):
                return replace(found, n_presumed=sum(shard.size in presumable for shard in found.shards))
    return _judge(here, known, look({}), asked)


def _listed(
    source: Path | Sequence[Path] | Listing, known_bad: KnownBad, patience: Patience, *, may_be_empty: bool
) -> Listing:
    """The files of a source, those known to be bad among its problems."""
    found = source if isinstance(source, Listing) else list_shards(source, patience)
    if not (found.entries or found.problems or may_be_empty):
        other = plural(found.n_other, "other file")
        raise BadInput(f"{found.said} holds no HDF5 files ({', '.join(SUFFIXES)}); found {other}. {WANTED}")
    entries, bad = _set_aside(found.entries, known_bad)
    return replace(found, entries=entries, problems=[*found.problems, *bad])


def _judge(here: Listing, known: _Known, looks: _Looks, asked: _Asked) -> Survey:
    """The survey of files whose structures are known."""
    structures, found = looks
    problems = here.problems + found
    counts = _counted(structures)
    if not counts and asked.schema is None:
        raise BadInput(_all_bad(here.said, problems))
    guessed = asked.guess(counts)
    shards, found = _fit(guessed.schema, asked.split, here.entries, structures)
    problems += found
    if not shards and asked.schema is None:
        raise BadInput(_all_bad(here.said, problems))
    shards.sort(key=_order_of({shard.split for shard in shards}))
    return Survey(
        source=here.root, schema=guessed.schema, reason=guessed.reason, shards=tuple(shards),
        problems=tuple(sorted(problems, key=lambda p: natural_key(p.path))), templates=tuple(t for t, _ in known),
        notes=(*here.notes, *_notes(shards, counts)), n_other=here.n_other,
    )  # fmt: skip


def _order_of(splits: Iterable[str]) -> Callable[[Shard], int]:
    order = {name: i for i, name in enumerate(sorted(splits, key=split_order))}
    return lambda shard: order[shard.split]


def _presumable(here: Listing, known: _Known) -> dict[int, Structure]:
    """The structure that files of a size are presumed to have, for sizes of many files that have a template."""
    sizes = Counter(entry.size for entry in here.entries)
    return {template.size: structure for template, structure in known if sizes[template.size] >= _WORTH_PRESUMING}


def _readable_by_template(found: Survey, presumable: dict[int, Structure], known: _Known) -> bool:
    """Whether each presumed file holds samples and will be read by its template: none is good or bad unseen."""
    for template, structure in known:
        if template.size in presumable:
            try:
                n_samples = layouts.n_samples(found.schema, structure)
            except ShardError:
                return False
            if not (n_samples and holds_samples(template, found.schema)):
                return False
    return True


def _set_aside(entries: list[Entry], known_bad: KnownBad) -> tuple[list[Entry], list[Problem]]:
    good, bad = [], []
    for entry in entries:
        problem = known_bad(entry.path, entry.size, entry.mtime_ns)
        if problem is None:
            good.append(entry)
        else:
            bad.append(problem)
    return good, bad


def _look(
    here: Listing, local: Local, known: _Known, parsers: Parsers, patience: Patience, n_threads: int,
    listener: Listener, presumed: dict[int, Structure],
) -> _Looks:  # fmt: skip
    """The structure of each entry: of its size where that is `presumed`, else by template where one fits, or by HDF5.

    Equal structures are one object; None where there is a problem.
    """
    distinct = {structure: structure for _, structure in reversed(known)}
    structure_of = {template: distinct[structure] for template, structure in known}
    by_size = matchers(tuple(structure_of))

    def look(entry: Entry) -> Structure | Problem:
        try:
            with local(os.path.join(here.root, entry.path), (entry.size, entry.mtime_ns)) as path:
                for matcher in by_size.get(entry.size, ()):
                    if patience.call(matcher.metadata_equal, path):
                        return structure_of[matcher.template]
                return parsers.probe(path).structure
        except ShardError as error:
            return Problem(entry.path, error.problem.code, error.problem.detail)
        except OSError as error:
            return Problem(entry.path, "unreadable", error.strerror or str(error))

    presumed = {size: distinct[structure] for size, structure in presumed.items()}
    structures: list[Structure | None] = [presumed.get(entry.size) for entry in here.entries]
    unseen = [i for i, structure in enumerate(structures) if structure is None]
    same = {id(structure): structure for structure in structure_of.values()}  # to hash one takes as long as to read one
    problems: list[Problem] = []
    for i, found in zip(unseen, _in_threads(look, [here.entries[i] for i in unseen], n_threads, listener), strict=True):
        if isinstance(found, Problem):
            problems.append(found)
        else:
            structures[i] = same.get(id(found)) or distinct.setdefault(found, found)
    listener.advance("survey", len(structures), len(structures))
    return structures, problems


def _counted(structures: Sequence[Structure | None]) -> Counter[Structure]:
    """How many files have each structure, in the order in which they come up; equal ones are one object."""
    by_id = {id(structure): structure for structure in structures}
    counts = Counter(map(id, structures))
    return Counter({s: counts[i] for i, s in by_id.items() if s is not None})


def _in_threads(
    look: Callable[[Entry], Structure | Problem], entries: Sequence[Entry], n_threads: int, listener: Listener
) -> Iterator[Structure | Problem]:
    """`look` at every entry from many threads, a few hundred entries a task, answers in order.

    Where the source is slow, each thread has many entries under way.
    """
    pace = Pace()
    batches = [entries[i : i + _BATCH] for i in range(0, len(entries), _BATCH)]
    done = 0
    with ThreadPoolExecutor(n_threads, thread_name_prefix="survey") as pool:
        for answers in pool.map(partial(pace.each, look), batches):
            done += len(answers)
            listener.advance("survey", done, len(entries))
            yield from answers


def _learn(here: Listing, parsers: Parsers, local: Local) -> _Known:
    """Templates for the most common file sizes, each from the first file of that size that makes one."""
    sizes = Counter(entry.size for entry in here.entries)
    first: dict[int, list[Entry]] = {size: [] for size, _ in sizes.most_common(_MAX_TEMPLATES)}
    for entry in here.entries:
        if entry.size in first and len(first[entry.size]) < _TRIES_A_SIZE:
            first[entry.size].append(entry)
    known = []
    for tries in first.values():
        for entry in tries:
            try:
                with local(os.path.join(here.root, entry.path), (entry.size, entry.mtime_ns)) as path:
                    probed = parsers.probe(path, learn=True)
            except (ShardError, OSError):
                continue
            if probed.template is not None:
                known.append((probed.template, probed.structure))
            break
    return known


def _fit(
    schema: Schema, split: Callable[[str], str], entries: Sequence[Entry], structures: Sequence[Structure | None]
) -> tuple[list[Shard], list[Problem]]:
    """Shards that fit the schema, and the problems of those that do not, or are in no split."""
    shards, problems = [], []
    counted: dict[int, int | Problem] = {id(None): 0}  # by identity: structures are distinct objects, and few
    for structure in structures:
        if id(structure) not in counted:
            assert structure is not None
            counted[id(structure)] = _samples_or_problem(schema, structure)
    for (path, size, mtime_ns), structure in zip(entries, structures, strict=True):
        if structure is None:
            continue
        n = counted[id(structure)]
        if isinstance(n, Problem):
            problems.append(Problem(path, n.code, n.detail))
            continue
        try:
            shards.append(Shard(path, split(path), size, mtime_ns, n))
        except ShardError as error:
            problems.append(Problem(path, error.problem.code, error.problem.detail))
    return shards, problems


def _samples_or_problem(schema: Schema, structure: Structure) -> int | Problem:
    try:
        return layouts.n_samples(schema, structure)
    except ShardError as error:
        return error.problem


def _notes(shards: Sequence[Shard], counts: Counter[Structure]) -> tuple[str, ...]:
    notes = []
    empty = sum(shard.n_samples == 0 for shard in shards)
    if empty:
        notes.append(f"{plural(empty, 'shard')} without samples")
    warned = Counter[str]()
    for structure, n in counts.items():
        warned.update(dict.fromkeys(structure.warnings, n))
    notes += [f"{plural(n, 'shard')}: {warning}" for warning, n in warned.items()]
    splits = {shard.split for shard in shards}
    if ALL in splits and len(splits) > 1:
        n = sum(shard.split == ALL for shard in shards)
        notes.append(f"{plural(n, 'shard')} outside the split folders, in split 'all'")
    return tuple(notes)


def _all_bad(source: str, problems: Sequence[Problem]) -> str:
    shown = "; ".join(f"{ascii(p.path)[1:-1]}: {p.code} ({p.detail})" for p in problems[:5])
    return f"{source}: none of its {len(problems):,} shards can be read. {shown}{'; ...' if len(problems) > 5 else ''}"
