"""The files of a source that look like shards, in natural order, each with its stamp. Changes nothing, opens no shard.

A source is a folder, one file, a list of paths (a text file), or several of these. Invariant: every file in it that
looks like a shard, and every path of a list, is an entry or a problem; two names of one file are one entry (the first
in order). What comes of the same files does not depend on the order in which folders and paths are given.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from tsclust_ooc.errors import BadInput, UsageError
from tsclust_ooc.patience import Patience
from tsclust_ooc.shards.schema import Problem
from tsclust_ooc.units import plural

SUFFIXES = (".h5", ".hdf5", ".he5", ".npy")
LISTS = (".txt", ".list")
WANTED = "Give a folder of .h5 shards, one HDF5 file, or a text file (.txt) with a path a line."

_BESIDE = ".npy"  # shards where there are no others
_DIGITS = re.compile(r"[0-9]+")
_DIGIT = "0123456789"
_BOM = b"\xef\xbb\xbf"


class Entry(NamedTuple):
    """One file: its path relative to the source, and its stamp. A tuple, for there may be millions."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Listing:
    """What `list_shards` found below `root`, the common parent of all that was given.

    Paths are relative to `root`. `n_other` files do not look like shards. `folders` were searched with all that is in
    them; `said` is the source in messages, `notes` are for a person.
    """

    root: str
    entries: list[Entry]
    problems: list[Problem]
    n_other: int = 0
    folders: tuple[str, ...] = ()
    said: str = ""
    notes: tuple[str, ...] = ()


_Row = tuple[str, str, int, int, int, int, bool]
"""One file while it is sorted: key, path, size, mtime_ns, inode, device, whether it was found in a folder.

A plain tuple, as those are made and compared several times faster than named ones.
"""


@dataclass(frozen=True)
class _Named:
    """Absolute paths that a source names; of those of a list nobody knows yet what lies there."""

    folders: list[str]
    files: list[str]
    listed: list[str]


def list_shards(sources: Path | Sequence[Path], patience: Patience | None = None) -> Listing:
    """Regular files that look like shards, below folders, or named by a list or on their own.

    A list is a text file, .txt or .list, with a path a line, relative to the list's own folder; empty lines and those
    that begin with # mean nothing. `patience` tries again what fails in passing.

    Raises BadInput when a source is not there, or a list cannot be read or names nothing, UsageError for no source.
    """
    given = [sources] if isinstance(sources, Path) else list(sources)
    if not given:
        raise UsageError(f"no source is given. {WANTED}")
    named = _named(given)
    root = _root(given, named)
    found = _Found(root, patience or Patience())
    below = len(os.path.join(root, ""))
    listed = [path[below:] for path in named.listed]
    found.walk([path[below:] for path in named.folders])
    found.add([path[below:] for path in named.files], any_name=True)
    found.walk(found.add(dict.fromkeys(listed)))
    twice = len(listed) - len(set(listed))
    entries = _entries(found)
    return Listing(
        root, entries, list(dict.fromkeys(found.problems)), found.n_other, tuple(found.given),
        ", ".join(map(str, given)), (f"{plural(twice, 'repeated line')} in the list, taken once",) if twice else (),
    )  # fmt: skip


def rebased(listing: Listing, root: str) -> Listing:
    """The same files named relative to `root`, a folder above the listing's (or the same)."""
    way = os.path.relpath(listing.root, root)
    if way == ".":
        return replace(listing, root=root)
    return replace(
        listing, root=root, entries=[Entry(f"{way}/{e.path}", e.size, e.mtime_ns) for e in listing.entries],
        problems=[Problem(os.path.normpath(f"{way}/{p.path}"), p.code, p.detail) for p in listing.problems],
    )  # fmt: skip


def is_list(source: Path) -> bool:
    """Whether a source is a text file that names shards."""
    return source.suffix.lower() in LISTS and source.is_file()


def is_root_of(root: str, sources: Sequence[Path]) -> bool:
    """Whether the listing of `sources` may have this root. Cheap: lists are not read, they may name anything."""
    wanted = os.path.realpath(root)
    folders = [os.path.realpath(s if s.is_dir() else s.parent) for s in sources if not is_list(s)]
    if len(sources) == 1:
        linked = os.path.dirname(os.path.realpath(sources[0]))  # of a file by another name
        return not folders or wanted in (folders[0], *([linked] if sources[0].is_file() else []))
    spelled = [_clean(str(s.absolute())) for s in sources if not is_list(s)]
    return all(_is_below(f, wanted) or _is_below(s, root) for f, s in zip(folders, spelled, strict=True))


def _is_below(path: str, root: str) -> bool:
    return os.path.commonpath([path, root]) == root


def _named(given: Iterable[Path]) -> _Named:
    named = _Named([], [], [])
    for source in given:
        if source.is_dir():
            named.folders.append(str(source.absolute()))
        elif is_list(source):
            named.listed.extend(_lines(source))
        elif source.is_file():
            named.files.append(str(source.absolute()))
        else:
            raise BadInput(f"{source} is not there. {WANTED}")
    return named


def _lines(source: Path) -> Iterator[str]:
    """The absolute paths that a list names, as bytes of any encoding."""
    try:
        raw = source.read_bytes().removeprefix(_BOM)
    except OSError as error:
        raise BadInput(f"{source}: {error.strerror}. Give a list that can be read, a path a line.") from error
    here = str(source.absolute().parent)
    lines = [os.fsdecode(line.rstrip(b"\r")) for line in raw.split(b"\n")]
    kept = [line for line in lines if line and not line.isspace() and line[0] != "#"]
    if not kept:
        raise BadInput(f"{source} names no shard. Write one path a line, of .h5 files or folders of them.")
    return (_clean(os.path.join(here, line)) for line in kept)


def _clean(path: str) -> str:
    """An absolute path without . and .. and doubled separators; a link before .. is followed."""
    if "/." in path:
        folder, _, name = path.rpartition("/")
        if name in (".", ".."):
            return os.path.realpath(path)
        return os.path.join(_real(folder) if "/.." in folder else _normal(folder), name)
    return os.path.normpath(path) if "//" in path or path.endswith("/") else path


@lru_cache(maxsize=1024)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


@lru_cache(maxsize=1024)
def _normal(folder: str) -> str:
    return os.path.normpath(folder)


def _root(given: Sequence[Path], named: _Named) -> str:
    """The folder that all lie in, told by what was given alone, not by what is there."""
    if len(given) == 1 and not named.listed:
        return (named.folders or [os.path.dirname(path) for path in named.files])[0]
    for paths in (named.folders, named.files):
        paths[:] = map(_clean, paths)
    files = {os.path.dirname(path) if path.lower().endswith(SUFFIXES) else path for path in named.listed}
    return os.path.commonpath([*named.folders, *map(os.path.dirname, named.files), *files])


class _Found:
    """What was found below `root` so far; each folder is searched once."""

    def __init__(self, root: str, patience: Patience) -> None:
        self.root, self._patience = root, patience
        self.rows: list[_Row] = []
        self.problems: list[Problem] = []
        self.given: list[str] = []
        self.n_other = 0
        self._visited: set[tuple[int, int]] = set()

    def walk(self, folders: Iterable[str]) -> None:
        """Add all files in `folders` and below that look like shards; hidden names are left out.

        Links to folders are followed, after all that are none, so that a folder goes by its own name if it has one.
        """
        todo = sorted(folders, key=sort_key, reverse=True)
        self.given += [os.path.join(self.root, folder) for folder in todo[::-1]]
        links: list[str] = []
        while todo or links:
            if not todo:
                links.sort(key=sort_key, reverse=True)
            folder = (todo or links).pop()
            try:
                here = self._patience.call(os.stat, os.path.join(self.root, folder))
                if (here.st_dev, here.st_ino) not in self._visited:
                    self._visited.add((here.st_dev, here.st_ino))
                    self._scan(folder, todo, links)
            except OSError as error:
                self._refused(folder or ".", error)

    def _scan(self, folder: str, todo: list[str], links: list[str]) -> None:
        """Add the shards of one folder; its sub-folders go to `todo`, those that are links to `links`."""
        prefix = f"{folder}/" if folder else ""
        key = sort_key(folder) if folder else ""
        for entry in self._patience.call(_entries_of, os.path.join(self.root, folder)):
            name = entry.name
            if name[0] == ".":
                continue
            shard = name.endswith(SUFFIXES) or name.lower().endswith(SUFFIXES)
            if _is_dir(entry):
                if shard:
                    self.problems.append(Problem(prefix + name, "not-regular", "a directory"))
                else:
                    (links if entry.is_symlink() else todo).append(prefix + name)
            elif not shard:
                self.n_other += 1
            else:
                try:
                    found = self._patience.call(entry.stat)
                except OSError as error:
                    self._refused(prefix + name, error)
                else:
                    self._note(key + name_key(name), prefix + name, found, walked=True)

    def add(self, paths: Iterable[str], *, any_name: bool = False) -> list[str]:
        """Add files that were named one by one; returns those that are folders."""
        folders = []
        for path in paths:
            try:
                found = self._patience.call(os.stat, os.path.join(self.root, path))
            except OSError as error:
                self._refused(path, error)
            except ValueError:  # a NUL in it
                self.problems.append(Problem(path, "unreadable", "no file can have this name"))
            else:
                if stat.S_ISDIR(found.st_mode):
                    folders.append(path)
                elif any_name or path.lower().endswith(SUFFIXES):
                    self._note(sort_key(path), path, found, walked=False)
                else:
                    self.problems.append(Problem(path, "not-hdf5", f"its name ends in none of {', '.join(SUFFIXES)}"))
        return folders

    def _note(self, key: str, path: str, found: os.stat_result, *, walked: bool) -> None:
        if stat.S_ISREG(found.st_mode):
            self.rows.append((key, path, found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev, walked))
        else:
            self.problems.append(Problem(path, "not-regular", "not a regular file"))

    def _refused(self, path: str, error: OSError) -> None:
        self.problems.append(Problem(path, "unreadable", error.strerror or str(error)))


def _entries(found: _Found) -> list[Entry]:
    """The entries of all that was found, in order; further names of a file become problems."""
    rows = found.rows
    if not all(row[1].lower().endswith(_BESIDE) for row in rows):
        # Beside HDF5 shards they are labels, indices, scalers; but not where somebody named them.
        rows = [row for row in rows if row[1][-4:].lower() != _BESIDE or not row[-1]]
        found.n_other += len(found.rows) - len(rows)
    rows.sort()
    if len({row[4] for row in rows}) == len(rows):  # no inode twice
        return [Entry(row[1], row[2], row[3]) for row in rows]
    entries, seen = [], dict[tuple[int, int], str]()
    for _, path, size, mtime_ns, inode, device, _ in rows:
        first = seen.get((device, inode))
        if first is None:
            seen[device, inode] = path
            entries.append(Entry(path, size, mtime_ns))
        elif first != path:  # else it was named, and is in a folder that was given
            found.problems.append(Problem(path, "duplicate", f"the same file as {ascii(first)[1:-1]}"))
    return entries


def sort_key(path: str) -> str:
    """A key that sorts paths as `natural_key` does, as one string: those are compared many times faster than lists.

    Texts and numbers end in NUL, which no file name holds; a number begins with its length, beyond the 1 that ends a
    folder's name.
    """
    return _spelled(path).replace("/", "\0\1") + "\0\1"


def name_key(name: str) -> str:
    """`sort_key` of a name without folders, fast where names differ by the number before their suffix."""
    stem, dot, suffix = name.rpartition(".")
    head = stem.rstrip(_DIGIT)
    digits = stem[len(head) :]
    if not digits:
        return sort_key(name)
    number = digits.lstrip("0")
    return f"{_often(head)}\0{chr(2 + len(number))}{number} {digits}\0{_often(dot + suffix)}\0\1"


def _spelled(text: str) -> str:
    return _DIGITS.sub(_number, text)


_often = lru_cache(maxsize=256)(_spelled)


def _number(found: re.Match[str]) -> str:
    number = found[0].lstrip("0")
    return f"\0{chr(2 + len(number))}{number} {found[0]}\0"


def _entries_of(folder: str) -> list[os.DirEntry[str]]:
    """All of a folder, or an error: half of it, tried again, would come twice."""
    with os.scandir(folder) as listing:
        return list(listing)


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a loop, or to where we may not look: its own problem, not its folder's
        return False
