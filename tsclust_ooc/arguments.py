"""A command line kept in a file: what a batch job does, without a word of it in the job's script.

Invariant: `load_words(path)` gives back exactly what `save_words(path, words)` was given: spaces, quotes, newlines and
bytes that are no UTF-8 included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tsclust_ooc import records
from tsclust_ooc.errors import BadInput, UsageError

FORMAT_VERSION = 1
OPTION = "--args-file"


@dataclass(frozen=True)
class Arguments:
    """The words of one command line, the name of the program left out."""

    words: tuple[str, ...]


def save_words(path: Path, words: Sequence[str]) -> None:
    """Write `words` to `path` as JSON, durably and in one step: `{"format_version": 1, "words": [...]}`."""
    records.save(path, Arguments(tuple(words)), FORMAT_VERSION)


def load_words(path: Path) -> list[str]:
    """The words that `save_words` wrote to `path`.

    Raises
    ------
    BadInput
        The file cannot be read, is no such record, or holds no word.
    """
    try:
        words = list(records.load(path, Arguments, FORMAT_VERSION).words)
    except OSError as error:
        raise BadInput(f"{OPTION} {path}: {error.strerror}. Submit the work again to have it written.") from error
    if not words:
        raise BadInput(f"{OPTION} {path} holds no words; the first must be a command. Submit the work again.")
    return words


def with_file_read(words: Sequence[str]) -> list[str]:
    """The command line `words`; where it begins with `--args-file FILE`, the words in FILE stand in their place."""
    if not words or words[0] != OPTION:
        return list(words)
    if len(words) == 1:
        raise UsageError(f"{OPTION} needs a file. Give one: {OPTION} FILE.json")
    return [*load_words(Path(words[1])), *words[2:]]
