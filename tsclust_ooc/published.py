"""What every published directory has in common: the look at its name before work, its private work, its end.

Invariant: what is not published lies in a directory of mode 0700, so that nobody else on the machine reads it; what is
published has the modes that the user's umask gives. A name is free, holds just what is wanted, or is taken; only what
a command publishes itself is ever replaced.

    NAME                          published, by renaming a directory that was made inside the work directory
    .NAME.<12 hex of what>.wip/   work, mode 0700, named after what decides the result and the user who makes it
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from tsclust_ooc import files, records
from tsclust_ooc.errors import BadInput, CannotWrite
from tsclust_ooc.files import FileEntry

M = TypeVar("M")


class NameTaken(CannotWrite):
    """Something else lies at the name of the result; working on does not help."""


@dataclass(frozen=True)
class Kind(Generic[M]):
    """A kind of published directory: what people call it, and how its commit record is read."""

    noun: str
    """'a run'"""
    other: str
    """Said when one of the kind is there, but another: 'is a run with other options or of another dataset'."""
    read_manifest: Callable[[Path], M | None]
    """The manifest, None when there is none; BadInput when it cannot be read."""


def existing(final: Path, kind: Kind[M], is_same: Callable[[M], bool], *, overwrite: bool) -> bool:
    """Whether just the wanted one is published at `final`; False when the name is free (or to be overwritten).

    Raises CannotWrite when nothing can be made there, NameTaken when something else lies there; --overwrite replaces
    what is of the kind, not whatever else a name hits.
    """
    place = files.existing_parent(final.parent)
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise CannotWrite(f"{final} cannot be made: {place} is not a directory we may write to. Choose another place.")
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return False
    manifest = None
    with contextlib.suppress(BadInput):
        manifest = kind.read_manifest(final)
    if manifest is None:
        raise NameTaken(f"{final} exists and is not {kind.noun} of this version. Move it away, or choose another name.")
    if overwrite:
        return False
    if is_same(manifest):
        return True
    raise NameTaken(f"{final} {kind.other}. Use --overwrite to replace it, or another name.")


def check_sizes(path: Path, entries: Mapping[str, FileEntry]) -> None:
    """BadInput when a file that the manifest of `path` names is missing or has another size."""
    for name, entry in entries.items():
        found = (path / name).stat().st_size if (path / name).exists() else -1
        if found != entry.n_bytes:
            what = "missing" if found < 0 else f"{found:,} bytes, wanted {entry.n_bytes:,}"
            raise BadInput(f"{path} is damaged: {name} is {what}. Make it again with --overwrite.")


def work_root(final: Path, what: str) -> Path:
    """The work directory of `what` (a digest) for `final`: beside it, on the same filesystem. Nothing is made.

    Of each user another: one cannot go on with what only the other may read.
    """
    return files.work_name(final, records.digest([what, os.geteuid()]))


def make_private(folder: Path) -> None:
    """Make a work directory (and its parents, as usual ones), or find it; nobody else may look into it."""
    with files.naming_the_place(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # swept meanwhile: whoever wants to write there will notice
                if stat.S_IMODE(folder.stat().st_mode) & 0o077:
                    folder.chmod(0o700)  # fails, and rightly, where it is not ours


def sweep(final: Path) -> None:
    """Remove work for `final` that is now published, and what killed commands left beside it; not that of others."""
    for root in files.work_of(final):
        if os.access(root, os.W_OK | os.X_OK):
            files.retire(root)
    files.sweep(final.parent, final.name)
