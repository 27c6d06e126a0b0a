"""What a source holds: its shards in order, the schema they share, and every problem. Changes nothing.

Invariant: each file that looks like a shard ends up in `shards` or in `problems`, never in neither.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tsclust_ooc.errors import BadInput
from tsclust_ooc.progress import Listener, silent
from tsclust_ooc.shards import layouts
from tsclust_ooc.shards.parsers import Parsers
from tsclust_ooc.shards.schema import Problem, Schema, Shard, ShardError, Structure, natural_key, split_of
from tsclust_ooc.shards.templates import Template, matchers
from tsclust_ooc.units import plural

SUFFIXES = (".h5", ".hdf5", ".he5")
_MAX_TEMPLATES, _TRIES_A_SIZE = 16, 3
_BATCH = 256


@dataclass(frozen=True)
class Survey:
    """The result of a survey. `source` is absolute; shards are grouped by split, in natural order inside each.

    `templates` prove shards equal to a parsed one; `notes` are for a person; `n_other` files are not shards.
    """

    source: str
    schema: Schema
    reason: str
    shards: tuple[Shard, ...]
    problems: tuple[Problem, ...]
    templates: tuple[Template, ...]
    notes: tuple[str, ...]
    n_other: int

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


@dataclass(frozen=True, slots=True)
class _Entry:
    path: str  # relative to the source
    size: int
    mtime_ns: int


def survey(
    source: Path,
    parsers: Parsers,
    *,
    layout: str | None = None,
    key: str | None = None,
    known_bad: Callable[[str, int, int], Problem | None] = lambda path, size, mtime_ns: None,
    n_threads: int = 4,
    listener: Listener = silent,
) -> Survey:
    """Look at every shard below `source` (a directory, or one HDF5 file).

    Parameters
    ----------
    layout, key
        Override the guess of how datasets map to samples, and of which dataset holds them.
    known_bad
        What an earlier read of the data found, by (path, size, mtime_ns); such shards are problems here.

    Raises
    ------
    BadInput
        `source` is not there, holds no shard, or none that can be read.
    """
    source = source.absolute()
    entries, problems, n_other = _list(source)
    if not entries and not problems:
        raise BadInput(f"{source} holds no HDF5 files ({', '.join(SUFFIXES)}); found {n_other:,} other files.")
    entries, found = _set_aside(entries, known_bad)
    problems += found
    root = source.parent if source.is_file() else source
    structures, templates, found = _structures(root, entries, parsers, n_threads, listener)
    problems += found
    if not structures:
        raise BadInput(_all_bad(source, problems))
    counts = Counter(structure for structure in structures if structure is not None)
    guess = layouts.guess(counts, layout, key)
    shards, found = _fit(guess.schema, entries, structures)
    problems += found
    if not shards:
        raise BadInput(_all_bad(source, problems))
    order = {"train": 0, "val": 1, "test": 2, "all": 3}
    shards.sort(key=lambda shard: order[shard.split])
    return Survey(
        source=str(root), schema=guess.schema, reason=guess.reason, shards=tuple(shards),
        problems=tuple(sorted(problems, key=lambda p: natural_key(p.path))), templates=templates,
        notes=_notes(shards, counts), n_other=n_other,
    )  # fmt: skip


def _list(source: Path) -> tuple[list[_Entry], list[Problem], int]:
    """Regular files that look like shards in natural order; problems; how many other files there are."""
    if source.is_file():
        found = source.stat()
        return [_Entry(source.name, found.st_size, found.st_mtime_ns)], [], 0
    if not source.is_dir():
        raise BadInput(f"{source} is not there. Give a folder of .h5 shards, or one HDF5 file.")
    problems: list[Problem] = []
    n_other, paths = 0, []
    for path in _walk(source, problems):
        if path.lower().endswith(SUFFIXES):
            paths.append(path)
        else:
            n_other += 1
    entries, seen = [], dict[tuple[int, int], str]()
    for path in sorted(paths, key=natural_key):
        try:
            entries.append(_stat(source, path, seen))
        except ShardError as error:
            problems.append(Problem(path, error.problem.code, error.problem.detail))
    return entries, problems, n_other


def _walk(source: Path, problems: list[Problem]) -> Iterator[str]:
    """Paths of all non-directories below `source`, links to directories followed once each; hidden names left out."""
    todo, visited = [""], set[tuple[int, int]]()
    while todo:
        folder = todo.pop()
        try:
            here = os.stat(source / folder)
            if (here.st_dev, here.st_ino) in visited:
                continue
            visited.add((here.st_dev, here.st_ino))
            with os.scandir(source / folder) as listing:
                for entry in listing:
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.name.startswith("."):
                        continue
                    if not _is_dir(entry):
                        yield path
                    elif entry.name.lower().endswith(SUFFIXES):
                        problems.append(Problem(path, "not-regular", "a directory"))
                    else:
                        todo.append(path)
        except OSError as error:
            problems.append(Problem(folder or ".", "unreadable", error.strerror or str(error)))


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a loop, or to where we may not look: its own problem, not its folder's
        return False


def _stat(source: Path, path: str, seen: dict[tuple[int, int], str]) -> _Entry:
    try:
        found = os.stat(os.path.join(source, path))
    except OSError as error:
        raise ShardError("unreadable", error.strerror or str(error)) from error
    if not stat.S_ISREG(found.st_mode):
        raise ShardError("not-regular", "not a regular file")
    first = seen.setdefault((found.st_dev, found.st_ino), path)
    if first != path:
        raise ShardError("duplicate", f"the same file as {ascii(first)[1:-1]}")
    return _Entry(path, found.st_size, found.st_mtime_ns)


def _set_aside(
    entries: list[_Entry], known_bad: Callable[[str, int, int], Problem | None]
) -> tuple[list[_Entry], list[Problem]]:
    good, bad = [], []
    for entry in entries:
        problem = known_bad(entry.path, entry.size, entry.mtime_ns)
        if problem is None:
            good.append(entry)
        else:
            bad.append(problem)
    return good, bad


def _structures(
    root: Path, entries: Sequence[_Entry], parsers: Parsers, n_threads: int, listener: Listener
) -> tuple[list[Structure | None], tuple[Template, ...], list[Problem]]:
    """The structure of each entry (None where there is a problem), by template where one fits, else by HDF5."""
    known = _learn(root, entries, parsers)
    templates = tuple(t for t, _ in known)
    structure_of = dict(known)
    by_size = matchers(templates)
    problems: list[Problem] = []

    def look(entry: _Entry) -> Structure | Problem | None:
        path = os.path.join(root, entry.path)
        try:
            for matcher in by_size.get(entry.size, ()):
                if matcher.metadata_equal(path):
                    return structure_of[matcher.template]
            return parsers.probe(path).structure
        except ShardError as error:
            return Problem(entry.path, error.problem.code, error.problem.detail)
        except OSError as error:
            return Problem(entry.path, "unreadable", error.strerror or str(error))

    structures: list[Structure | None] = []
    distinct: dict[Structure, Structure] = {}
    for found in _in_threads(look, entries, n_threads, listener):
        if isinstance(found, Problem):
            problems.append(found)
            structures.append(None)
        elif found is not None:
            structures.append(distinct.setdefault(found, found))
    return (structures if distinct else []), templates, problems


def _in_threads(
    look: Callable[[_Entry], Structure | Problem | None], entries: Sequence[_Entry], n_threads: int, listener: Listener
) -> Iterator[Structure | Problem | None]:
    """`look` at every entry from many threads, a few hundred entries a task, answers in order."""

    def look_at(batch: Sequence[_Entry]) -> list[Structure | Problem | None]:
        return [look(entry) for entry in batch]

    batches = [entries[i : i + _BATCH] for i in range(0, len(entries), _BATCH)]
    done = 0
    with ThreadPoolExecutor(n_threads, thread_name_prefix="survey") as pool:
        for answers in pool.map(look_at, batches):
            done += len(answers)
            listener.advance("survey", done, len(entries))
            yield from answers


def _learn(root: Path, entries: Sequence[_Entry], parsers: Parsers) -> list[tuple[Template, Structure]]:
    """Templates for the most common file sizes, each from the first file of that size that makes one."""
    sizes = Counter(entry.size for entry in entries)
    first: dict[int, list[_Entry]] = {size: [] for size, _ in sizes.most_common(_MAX_TEMPLATES)}
    for entry in entries:
        if entry.size in first and len(first[entry.size]) < _TRIES_A_SIZE:
            first[entry.size].append(entry)
    known = []
    for tries in first.values():
        for entry in tries:
            try:
                probed = parsers.probe(os.path.join(root, entry.path), learn=True)
            except ShardError:
                continue
            if probed.template is not None:
                known.append((probed.template, probed.structure))
            break
    return known


def _fit(
    schema: Schema, entries: Sequence[_Entry], structures: Sequence[Structure | None]
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
