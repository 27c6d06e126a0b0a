"""Which split a shard belongs to, told by its folders or by an expression that a user gives; and the order of splits.

Invariant: the name of a split is plain (letters, digits, - and _, at most 64), so it can name a group and a file; the
split of a shard depends on its relative path alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache, partial

from tsclust_ooc.errors import UsageError
from tsclust_ooc.shards.schema import ShardError

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
ALL = "all"
EXAMPLE = r"(?P<split>train|val|test)_\d+"

_FIRST = {"train": 0, "val": 1, "test": 2, ALL: 4}
_OTHERS = 3
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_IN_A_NAME = re.compile(r"(?:^|(?<=[^A-Za-z]))(train|validation|valid|val|test)(?=[^A-Za-z])", re.IGNORECASE)


def split_order(name: str) -> tuple[int, str]:
    """A key that sorts splits: train, val, test, then others by name, and 'all' last."""
    return _FIRST.get(name, _OTHERS), name


def split_of(path: str) -> str:
    """The split that the folders of `path` name (the innermost that does), or 'all'."""
    return _split_of_folder(path.rpartition("/")[0])


@lru_cache(maxsize=1024)
def _split_of_folder(folder: str) -> str:
    for part in reversed(folder.lower().split("/")):
        if part in SPLITS:
            return SPLITS[part]
    return ALL


def splitter(pattern: str | None) -> Callable[[str], str]:
    r"""What tells the split of a relative path: its folders, or what group `split` of a regular expression finds there.

    The expression is searched for in the whole path; what its group finds is a split of that name, where valid and
    validation are val. The function that is returned raises ShardError 'split' for a path that it does not match, or
    where the group finds no plain name.

    Raises UsageError for what is no expression with a group named split.

    >>> splitter(r"(?P<split>train|valid)_\d+")("run/valid_12.h5")
    'val'
    """
    if pattern is None:
        return split_of
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(
            f"--split-pattern {pattern} is no regular expression: {error}. Give one like '{EXAMPLE}'."
        ) from error
    if "split" not in compiled.groupindex:
        raise UsageError(f"--split-pattern {pattern} has no group named split. Give one like '{EXAMPLE}'.")
    return partial(_matched, compiled)


def _matched(pattern: re.Pattern[str], path: str) -> str:
    found = pattern.search(path)
    if found is None:
        raise ShardError("split", f"its path does not match --split-pattern {pattern.pattern}")
    name = found["split"]
    if name is None or not _PLAIN.fullmatch(name):
        told = "nothing" if name is None else ascii(name)
        raise ShardError(
            "split", f"--split-pattern {pattern.pattern} finds {told} for the split; wanted letters, digits, - and _"
        )
    return SPLITS.get(name.lower(), name)


def suggested_pattern(paths: Iterable[str]) -> str | None:
    """The expression that tells the splits of files named like train_12.h5; None where not all of them say one.

    Nor where all say the same one: then nothing is to be split.
    """
    words = Counter[str]()
    wanted = dict[str, str]()
    for path in paths:
        found = _IN_A_NAME.search(path.rpartition("/")[2])
        if found is None:
            return None
        words[found[1]] += 1
        wanted[path] = SPLITS[found[1].lower()]
    if len(set(wanted.values())) < 2:
        return None
    group = f"(?P<split>{'|'.join(sorted(words, key=lambda word: (split_order(SPLITS[word.lower()]), -len(word))))})"
    for pattern in (rf"{group}_\d+", f"{group}_", rf"\b{group}", rf"(?<![A-Za-z]){group}(?![A-Za-z])[^/]*$"):
        if _tells(pattern, wanted):
            return pattern
    return None


def _tells(pattern: str, wanted: dict[str, str]) -> bool:
    split = splitter(pattern)
    try:
        return all(split(path) == name for path, name in wanted.items())
    except ShardError:
        return False
