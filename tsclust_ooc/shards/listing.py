"""The files of a source that look like shards, in natural order, each with its stamp. Changes nothing, opens nothing.

Invariant: every such file is an entry or a problem, and two names of one file are one entry (the first in order).
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tsclust_ooc.errors import BadInput
from tsclust_ooc.shards.schema import Problem

SUFFIXES = (".h5", ".hdf5", ".he5", ".npy")

_BESIDE = ".npy"  # shards where there are no others
_DIGITS = re.compile(r"[0-9]+")


class Entry(NamedTuple):
    """One file: its path relative to the source, and its stamp. A tuple, for there may be millions."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Listing:
    """What `list_shards` found; `n_other` files do not look like shards."""

    entries: list[Entry]
    problems: list[Problem]
    n_other: int


def list_shards(source: Path) -> Listing:
    """Regular files below `source` (or `source` itself) that look like shards; BadInput when it is not there."""
    if source.is_file():
        alone = source.stat()
        return Listing([Entry(source.name, alone.st_size, alone.st_mtime_ns)], [], 0)
    if not source.is_dir():
        raise BadInput(f"{source} is not there. Give a folder of .h5 shards, or one HDF5 file.")
    problems: list[Problem] = []
    stats: dict[str, os.stat_result | OSError] = {}
    n_other = _walk(source, stats, problems)
    if not all(path.lower().endswith(_BESIDE) for path in stats):
        # Beside HDF5 shards they are labels, indices, scalers.
        shards = {path: found for path, found in stats.items() if not path.lower().endswith(_BESIDE)}
        n_other, stats = n_other + len(stats) - len(shards), shards
    entries, seen = [], dict[tuple[int, int], str]()
    for path in sorted(stats, key=sort_key):
        found = stats[path]
        if isinstance(found, OSError):
            problems.append(Problem(path, "unreadable", found.strerror or str(found)))
        elif not stat.S_ISREG(found.st_mode):
            problems.append(Problem(path, "not-regular", "not a regular file"))
        elif (first := seen.setdefault((found.st_dev, found.st_ino), path)) != path:
            problems.append(Problem(path, "duplicate", f"the same file as {ascii(first)[1:-1]}"))
        else:
            entries.append(Entry(path, found.st_size, found.st_mtime_ns))
    return Listing(entries, problems, n_other)


def sort_key(path: str) -> str:
    """A key that sorts paths as `natural_key` does, as one string: those are compared many times faster than lists.

    Texts and numbers end in NUL, which no file name holds; a number begins with its length, beyond the 1 that ends a
    folder's name.
    """
    return _DIGITS.sub(_number, path).replace("/", "\0\1") + "\0\1"


def _number(found: re.Match[str]) -> str:
    number = found[0].lstrip("0")
    return f"\0{chr(2 + len(number))}{number} {found[0]}\0"


def _walk(source: Path, stats: dict[str, os.stat_result | OSError], problems: list[Problem]) -> int:
    """Note the `stats` of all files below `source` that look like shards; returns how many others there are.

    Links to directories are followed once each; hidden names are left out.
    """
    todo, visited, n_other = [""], set[tuple[int, int]](), 0
    while todo:
        folder = todo.pop()
        prefix = f"{folder}/" if folder else ""
        try:
            here = os.stat(source / folder)
            if (here.st_dev, here.st_ino) in visited:
                continue
            visited.add((here.st_dev, here.st_ino))
            with os.scandir(source / folder) as listing:
                for entry in listing:
                    name = entry.name
                    if name.startswith("."):
                        continue
                    shard = name.endswith(SUFFIXES) or name.lower().endswith(SUFFIXES)
                    if _is_dir(entry):
                        if shard:
                            problems.append(Problem(prefix + name, "not-regular", "a directory"))
                        else:
                            todo.append(prefix + name)
                    elif shard:
                        stats[prefix + name] = _stat(entry)
                    else:
                        n_other += 1
        except OSError as error:
            problems.append(Problem(folder or ".", "unreadable", error.strerror or str(error)))
    return n_other


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a loop, or to where we may not look: its own problem, not its folder's
        return False


def _stat(entry: os.DirEntry[str]) -> os.stat_result | OSError:
    try:
        return entry.stat()
    except OSError as error:
        return error
