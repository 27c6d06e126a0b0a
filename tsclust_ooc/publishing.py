"""Copy a finished result to another place: checked while it is copied, and there under its name in one step.

Invariant: under its final name the copy is absent, what was there before, or whole and durable, with every file's
digest that of the manifest; the source is only read. A file in the work directory is whole and checked, so a copy that
was interrupted goes on. The directory is named after the manifest's digest: two processes that copy the same result
only ever write the same bytes.

    TO/.NAME.DIGEST.wip/result/   the copy so far; private
    TO/NAME                       the copy
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from tsclust_ooc import files, published, records
from tsclust_ooc.errors import BadInput, CannotWrite, TryAgain
from tsclust_ooc.files import FileEntry
from tsclust_ooc.progress import Listener, silent
from tsclust_ooc.units import format_bytes

MANIFEST = "manifest.json"
_PIECE_BYTES = 4 * 2**20

Mapper = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Listing:
    """What every manifest says of its result, whatever its kind: a digest of what matters in it, and its files."""

    digest: str
    files: dict[str, FileEntry]

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.n_bytes for entry in self.files.values())


@dataclass(frozen=True)
class Published:
    """One result and its copy. `reused`: it was there already, and nothing was copied.

    `n_copied` counts the files copied now, which is less than `n_files` when an earlier copy was interrupted.
    """

    source: str
    target: str
    n_files: int
    n_copied: int
    bytes: int
    digest: str
    reused: bool


def read_listing(result: Path) -> tuple[bytes, Listing]:
    """The manifest of the result at `result`, as it lies and as read; BadInput when there is none."""
    try:
        raw = (result / MANIFEST).read_bytes()
        body = json.loads(raw)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadInput(f"{result} is no finished result: it has no {MANIFEST}. Finish it first.") from error
    except ValueError as error:
        raise BadInput(f"{result / MANIFEST} is not readable JSON: {error}. It is damaged: make it again.") from error
    known = {name: body.get(name) for name in ("digest", "files")} if isinstance(body, dict) else body
    listing = records.from_plain(Listing, known, where=str(result / MANIFEST))
    for name in listing.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise BadInput(f"{result / MANIFEST} names {name!r}, outside of the result. It is damaged or not ours.")
    return raw, listing


def is_published(listing: Listing, target: Path, *, overwrite: bool) -> bool:
    """Whether the result is at `target` already; False when the name is free, or to be overwritten.

    Two results are the same when their digests are: then they hold the same, though made at another time. With
    `overwrite` every file has to be the same. Raises CannotWrite when something else is there; what is no result is
    never overwritten.
    """
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return False
    try:
        found = read_listing(target)[1]
    except (BadInput, OSError) as error:
        raise CannotWrite(
            f"{target} exists and is no result of this program. Move it away, or publish to another place."
        ) from error
    missing = [name for name, entry in found.files.items() if _size(target / name) != entry.n_bytes]
    if not missing and (found.files == listing.files if overwrite else found.digest == listing.digest):
        return True
    if overwrite:
        return False
    what = f"is damaged ({missing[0]} is missing or not of its size)" if missing else "holds another result"
    raise CannotWrite(f"{target} {what}. Set overwrite = true to replace it, or publish to another place.")


def publish(
    source: Path,
    target: Path,
    *,
    overwrite: bool = False,
    mapper: Mapper = map,
    listener: Listener = silent,
) -> Published:
    """Copy the result at `source` to the name `target`, on whatever filesystem. Interrupted? The same again goes on.

    Parameters
    ----------
    source, target
        Absolute paths of the result and of its copy.
    overwrite
        Replace another result at `target`, in one step, when the copy is complete.
    mapper
        Like builtin `map`; copies files side by side.

    Raises
    ------
    BadInput
        `source` is no result, or a file of it is not as its manifest says: it was changed or damaged.
    CannotWrite
        Something else lies at `target`, or it has no room.
    TryAgain
        Another process took the copy away while it was made.
    """
    raw, listing = read_listing(source)
    if is_published(listing, target, overwrite=overwrite):
        published.sweep(target)
        return _published(source, target, listing, n_copied=0, reused=True)
    root = published.work_root(target, listing.digest)
    copy = root / "result"
    _make_root(root)
    try:
        _prepare(copy, listing)
        n_copied = _copy_all(source, copy, listing, mapper, listener)
        _drop_others(copy, listing)
        files.fsync_tree(copy)
        files.write_atomic(copy / MANIFEST, raw)
        files.publish_dir(copy, target, replace=overwrite)
    except (FileNotFoundError, NotADirectoryError, CannotWrite) as error:
        # Two processes may publish the same: whoever comes second finds it done, or its work swept away.
        swept = not isinstance(error, CannotWrite) and not copy.is_dir()
        if not _there_now(listing, target):
            if not swept:
                raise
            raise TryAgain(f"another process took the copy for {target}. Run the same command again.") from error
        published.sweep(target)
        return _published(source, target, listing, n_copied=0, reused=True)
    published.sweep(target)
    return _published(source, target, listing, n_copied=n_copied, reused=False)


def _there_now(listing: Listing, target: Path) -> bool:
    with contextlib.suppress(CannotWrite):
        return is_published(listing, target, overwrite=False)
    return False


def _make_root(root: Path) -> None:
    """The private work directory."""
    place = files.existing_parent(root.parent)
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise CannotWrite(f"{root.parent}: {place} is not a directory we may write to. Publish to another place.")
    published.make_private(root)


def _prepare(copy: Path, listing: Listing) -> None:
    """All folders of the result; CannotWrite when the filesystem has no room for its files."""
    with files.naming_the_place(copy):
        for name in sorted({str(PurePosixPath(name).parent) for name in listing.files}):
            (copy / name).mkdir(parents=True, exist_ok=True)
    there = sum(entry.n_bytes for name, entry in listing.files.items() if _size(copy / name) == entry.n_bytes)
    need, free = listing.n_bytes - there, files.free_bytes(copy)
    if need > free:
        raise CannotWrite(
            f"{copy.parent.parent} has {format_bytes(free)} free, and the copy needs {format_bytes(need)}. "
            "Make room, or publish to another place."
        )


def _copy_all(source: Path, copy: Path, listing: Listing, mapper: Mapper, listener: Listener) -> int:
    """Copy the files that are not there yet; returns how many they were."""
    n_copied, task = 0, _Copy(source, copy)
    for done, copied in enumerate(mapper(task, list(listing.files.items())), start=1):
        n_copied += copied
        listener.advance("publish", done, len(listing.files))
    return n_copied


@dataclass(frozen=True)
class _Copy:
    """Copies one file, unless its copy is there; says whether it did."""

    source: Path
    copy: Path

    def __call__(self, item: tuple[str, FileEntry]) -> bool:
        name, entry = item
        path, target = self.source / name, self.copy / name
        if _size(target) == entry.n_bytes and files.checksum(target) == entry.digest:
            return False
        try:
            opened = path.open("rb", buffering=0)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _changed(self.source, name, "is missing") from error
        digest, n_bytes = xxhash.xxh3_128(), 0
        piece = memoryview(bytearray(min(_PIECE_BYTES, entry.n_bytes + 1)))  # one more: a longer file is seen
        with opened, files.atomic_file(target) as out:
            while n := opened.readinto(piece):
                out.write(piece[:n])
                digest.update(piece[:n])
                n_bytes += n
            if (n_bytes, digest.hexdigest()) != (entry.n_bytes, entry.digest):
                what = f"has {n_bytes:,} bytes and the digest {digest.hexdigest()}"
                raise _changed(
                    self.source, name, f"{what}, its manifest says {entry.n_bytes:,} bytes and {entry.digest}"
                )
        return True


def _changed(source: Path, name: str, what: str) -> BadInput:
    return BadInput(
        f"{source} is damaged or was changed while it was copied: {name} {what}. Nothing was published. "
        "Make it again with --overwrite, then publish it."
    )


def _drop_others(copy: Path, listing: Listing) -> None:
    """Remove what does not belong to the result: partial files of killed copies, and a result that was replaced."""
    for path in list(files.walk_files(copy)):
        if str(path.relative_to(copy)) not in listing.files:
            path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    """Size of a file, -1 when there is none."""
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return -1


def _published(source: Path, target: Path, listing: Listing, *, n_copied: int, reused: bool) -> Published:
    n_files = len(listing.files)
    return Published(str(source), str(target), n_files, n_copied, listing.n_bytes, listing.digest, reused)
