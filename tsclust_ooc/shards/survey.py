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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tsclust_ooc.errors import BadInput, TsclustError
from tsclust_ooc.progress import Listener, silent
from tsclust_ooc.shards import layouts
from tsclust_ooc.shards.listing import SUFFIXES, Entry, list_shards
from tsclust_ooc.shards.parsers import Parsers
from tsclust_ooc.shards.schema import Problem, Schema, Shard, ShardError, Structure, natural_key, split_of
from tsclust_ooc.shards.templates import Template, holds_samples, matchers
from tsclust_ooc.units import plural

_MAX_TEMPLATES, _TRIES_A_SIZE = 16, 3
_BATCH = 256
_WORTH_PRESUMING = 16  # files of one size

KnownBad = Callable[[str, int, int], Problem | None]
_Known = list[tuple[Template, Structure]]
_Looks = tuple[list[Structure | None], list[Problem]]


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
class _Listed:
    """A source whose files are listed, not looked at: those known to be bad are in `problems`."""

    given: Path
    root: str
    entries: list[Entry]
    problems: list[Problem]
    n_other: int


def survey(
    source: Path,
    parsers: Parsers,
    *,
    layout: str | None = None,
    key: str | None = None,
    feature_axis: str | None = None,
    ids: str | None = None,
    known_bad: KnownBad = lambda path, size, mtime_ns: None,
    presume: bool = False,
    n_threads: int = 4,
    listener: Listener = silent,
) -> Survey:
    """Look at every shard below `source` (a directory, or one HDF5 file).

    Parameters
    ----------
    layout, key, feature_axis, ids
        Override the guess of how datasets map to samples, of which dataset holds them, and of what names them.
    known_bad
        What an earlier read of the data found, by (path, size, mtime_ns); such shards are problems here.
    presume
        Do not open files of which many have the size of one that makes a template: presume that each is like it. Not
        done where such files would not all be good shards that a template can read.

    Raises
    ------
    BadInput
        `source` is not there, holds no shard, or none that can be read.
    """
    here = _listed(source.absolute(), known_bad)
    known = _learn(here, parsers)
    guess = partial(layouts.guess, layout=layout, key=key, feature_axis=feature_axis, ids=ids)
    look = partial(_look, here, known, parsers, n_threads, listener)
    if presume and (presumable := _presumable(here, known)):
        with contextlib.suppress(TsclustError):  # what seems wrong now may be what was presumed
            found = _judge(here, known, look(presumable), guess)
            if _readable_by_template(found, presumable, known):
                return replace(found, n_presumed=sum(shard.size in presumable for shard in found.shards))
    return _judge(here, known, look({}), guess)


def _listed(source: Path, known_bad: KnownBad) -> _Listed:
    found = list_shards(source)
    if not found.entries and not found.problems:
        raise BadInput(f"{source} holds no HDF5 files ({', '.join(SUFFIXES)}); found {found.n_other:,} other files.")
    entries, bad = _set_aside(found.entries, known_bad)
    root = source.parent if source.is_file() else source
    return _Listed(source, str(root), entries, [*found.problems, *bad], found.n_other)


def _judge(here: _Listed, known: _Known, looks: _Looks, guess: Callable[[Counter[Structure]], layouts.Guess]) -> Survey:
    """The survey of files whose structures are known."""
    structures, found = looks
    problems = here.problems + found
    counts = _counted(structures)
    if not counts:
        raise BadInput(_all_bad(here.given, problems))
    guessed = guess(counts)
    shards, found = _fit(guessed.schema, here.entries, structures)
    problems += found
    if not shards:
        raise BadInput(_all_bad(here.given, problems))
    order = {"train": 0, "val": 1, "test": 2, "all": 3}
    shards.sort(key=lambda shard: order[shard.split])
    return Survey(
        source=here.root, schema=guessed.schema, reason=guessed.reason, shards=tuple(shards),
        problems=tuple(sorted(problems, key=lambda p: natural_key(p.path))), templates=tuple(t for t, _ in known),
        notes=_notes(shards, counts), n_other=here.n_other,
    )  # fmt: skip


def _presumable(here: _Listed, known: _Known) -> dict[int, Structure]:
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
    here: _Listed, known: _Known, parsers: Parsers, n_threads: int, listener: Listener, presumed: dict[int, Structure]
) -> _Looks:
    """The structure of each entry: of its size where that is `presumed`, else by template where one fits, or by HDF5.

    Equal structures are one object; None where there is a problem.
    """
    distinct = {structure: structure for _, structure in reversed(known)}
    structure_of = {template: distinct[structure] for template, structure in known}
    by_size = matchers(tuple(structure_of))

    def look(entry: Entry) -> Structure | Problem:
        path = os.path.join(here.root, entry.path)
        try:
            for matcher in by_size.get(entry.size, ()):
                if matcher.metadata_equal(path):
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
    """`look` at every entry from many threads, a few hundred entries a task, answers in order."""

    def look_at(batch: Sequence[Entry]) -> list[Structure | Problem]:
        return [look(entry) for entry in batch]

    batches = [entries[i : i + _BATCH] for i in range(0, len(entries), _BATCH)]
    done = 0
    with ThreadPoolExecutor(n_threads, thread_name_prefix="survey") as pool:
        for answers in pool.map(look_at, batches):
            done += len(answers)
            listener.advance("survey", done, len(entries))
            yield from answers


def _learn(here: _Listed, parsers: Parsers) -> _Known:
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
                probed = parsers.probe(os.path.join(here.root, entry.path), learn=True)
            except ShardError:
                continue
            if probed.template is not None:
                known.append((probed.template, probed.structure))
            break
    return known


def _fit(
    schema: Schema, entries: Sequence[Entry], structures: Sequence[Structure | None]
) -> tuple[list[Shard], list[Problem]]:
    """Shards that fit the schema, and the problems of those that do not."""
    shards, problems = [], []
    counted: dict[int, int | Problem] = {}  # by identity: structures are distinct objects, and few
    for entry, structure in zip(entries, structures, strict=True):
        if structure is None:
            continue
        if id(structure) not in counted:
            try:
                counted[id(structure)] = layouts.n_samples(schema, structure)
            except ShardError as error:
                counted[id(structure)] = error.problem
        n = counted[id(structure)]
        if isinstance(n, Problem):
            problems.append(Problem(entry.path, n.code, n.detail))
        else:
            shards.append(Shard(entry.path, split_of(entry.path), entry.size, entry.mtime_ns, n))
    return shards, problems


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
    if "all" in splits and len(splits) > 1:
        n = sum(shard.split == "all" for shard in shards)
        notes.append(f"{plural(n, 'shard')} outside the split folders, in split 'all'")
    return tuple(notes)


def _all_bad(source: Path, problems: Sequence[Problem]) -> str:
    shown = "; ".join(f"{ascii(p.path)[1:-1]}: {p.code} ({p.detail})" for p in problems[:5])
    return f"{source}: none of its {len(problems):,} shards can be read. {shown}{'; ...' if len(problems) > 5 else ''}"
