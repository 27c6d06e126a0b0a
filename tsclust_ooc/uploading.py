"""Send a finished result to an object store: every file, then the manifest, which is the commit.

Invariant: below its URL a result is complete, or has no manifest. Nothing is replaced or removed there but what this
program put there: a store that holds other things is refused. An upload that was killed goes on: what is there with the
right content is not sent again.

    URL/.tsclust-upload.json   while an upload is unfinished: of which result, and every name that may be ours
    URL/manifest.json          put last; taken away first, when another result is replaced

Where a store gives no tag of an object's content (only S3 does, as it is known here), size is all that is compared, and
only for an upload of the same result.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tsclust_ooc import records
from tsclust_ooc.errors import BadInput, CannotWrite, TryAgain
from tsclust_ooc.progress import Listener, silent
from tsclust_ooc.publishing import MANIFEST, Listing, Published, read_listing
from tsclust_ooc.remote import PART_BYTES, Found, Remote, at_once, gives_tags, part_bytes, tag_of
from tsclust_ooc.units import format_count, plural

MARKER = ".tsclust-upload.json"
MARKER_VERSION = 1
_BYTES_AT_ONCE = 128 * 2**20  # of bodies in memory
_MOST_AT_ONCE = 16


@dataclass(frozen=True)
class Marker:
    """What an unfinished upload says of itself: the digest of its result, and the names that are ours to remove."""

    digest: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class There:
    """What lies below a URL: its objects by name, the listing of the result that is complete there, and the marker."""

    objects: dict[str, Found]
    listing: Listing | None
    marker: Marker | None

    @property
    def ours(self) -> set[str]:
        """The names that belong to a result here, complete or not, besides its manifest and marker."""
        listed = set(self.listing.files) if self.listing is not None else set[str]()
        return listed | set(self.marker.names if self.marker is not None else ())


def look(remote: Remote) -> There:
    """What lies below a URL.

    Raises CannotWrite when that is neither a result, nor an unfinished upload, nor nothing.
    """
    objects = {found.path: found for found in remote.objects()}
    there = There(objects, read_remote(remote) if MANIFEST in objects else None, _marker(remote, objects))
    if objects and there.listing is None and there.marker is None:
        first = min(objects) or remote.name
        raise CannotWrite(
            f"{remote} holds {plural(len(objects), 'object')} ({first!a} is the first) and no {MANIFEST}: it is no "
            "result of this program and is left alone. Choose another URL."
        )
    return there


def read_remote(remote: Remote) -> Listing:
    """The manifest of the result at a URL, as far as every kind has it; FileNotFoundError when there is none."""
    where = f"{remote}/{MANIFEST}"
    try:
        body = json.loads(remote.read(MANIFEST))
    except ValueError as error:
        raise CannotWrite(f"{where} is not readable JSON: {error}. Choose another URL, or remove it.") from error
    known = {name: body.get(name) for name in ("digest", "files")} if isinstance(body, dict) else body
    try:
        return records.from_plain(Listing, known, where)
    except BadInput as error:
        raise CannotWrite(f"{remote} holds no result of this program: {error} Choose another URL.") from error


def is_complete(there: There, listing: Listing) -> bool:
    """Whether just the result of `listing` is there, complete by the sizes of its files."""
    found = there.listing
    return found is not None and found.digest == listing.digest and not _wrong(there.objects, found)


def upload(source: Path, remote: Remote, *, overwrite: bool = False, listener: Listener = silent) -> Published:
    """Send the finished result at `source` to `remote`. Interrupted? The same again goes on.

    Parameters
    ----------
    overwrite
        Replace another result at the URL. There is none while the new one is sent.

    Raises
    ------
    BadInput
        `source` is no finished result.
    CannotWrite
        Something else lies at the URL, or the store does not let us write.
    TryAgain
        Another process wrote there meanwhile.
    """
    raw, listing = read_listing(source)
    there = look(remote)
    if is_complete(there, listing) and (not overwrite or there.listing == listing):
        _clean_up(remote, there, listing)
        return _published(source, remote, listing, n_sent=0, reused=True)
    if there.listing is not None and not overwrite and there.listing.digest != listing.digest:
        raise CannotWrite(f"{remote} holds another result. Use --overwrite to replace it, or choose another URL.")
    try:
        _mark(remote, there, listing)
        remote.remove([MANIFEST] if MANIFEST in there.objects else [])
        n_sent, sent = _send_all(source, remote, there, listing, listener)
        _check(remote, listing, sent)
        remote.write(MANIFEST, raw)
        after = _check(remote, listing, sent)
    except PermissionError as error:
        raise CannotWrite(
            f"cannot write {error.filename}: {error.strerror}. Check the keys and their rights, or choose another URL."
        ) from error
    _clean_up(remote, There(after, listing, Marker(listing.digest, tuple(there.ours))), listing)
    return _published(source, remote, listing, n_sent=n_sent, reused=False)


def _mark(remote: Remote, there: There, listing: Listing) -> None:
    names = tuple(sorted(there.ours | set(listing.files)))
    if there.marker != Marker(listing.digest, names):
        body = {"format_version": MARKER_VERSION, "digest": listing.digest, "names": names}
        remote.write(MARKER, json.dumps(body).encode())


def _marker(remote: Remote, objects: dict[str, Found]) -> Marker | None:
    if MARKER not in objects:
        return None
    with contextlib.suppress(ValueError, BadInput):
        body = json.loads(remote.read(MARKER))
        if isinstance(body, dict) and body.pop("format_version", None) == MARKER_VERSION:
            return records.from_plain(Marker, body, f"{remote}/{MARKER}")
    raise CannotWrite(f"{remote}/{MARKER} was not written by this version. Remove it, or choose another URL.")


def _send_all(
    source: Path, remote: Remote, there: There, listing: Listing, listener: Listener
) -> tuple[int, dict[str, Found]]:
    """Send what is not there yet; returns how many files that were, and all as they are now."""
    same = there.marker is not None and there.marker.digest == listing.digest
    send = partial(_send, source, remote, there.objects, listing, same_upload=same)
    largest = max((entry.n_bytes for entry in listing.files.values()), default=0)
    # A piece of each file in flight is in memory: all of it, below two parts.
    piece = min(largest, 2 * PART_BYTES, 2 * part_bytes(largest))
    n_at_once = max(1, min(_MOST_AT_ONCE, _BYTES_AT_ONCE // max(piece, 1)))
    now, n_sent = dict[str, Found](), 0
    for done, (found, is_sent) in enumerate(at_once(send, sorted(listing.files), n_at_once), start=1):
        now[found.path] = found
        n_sent += is_sent
        listener.advance("upload", done, len(listing.files))
    return n_sent, now


def _send(
    source: Path, remote: Remote, objects: dict[str, Found], listing: Listing, name: str, *, same_upload: bool
) -> tuple[Found, bool]:
    """Send one file, unless it is there; how it is there now, and whether it was sent."""
    there, entry = objects.get(name), listing.files[name]
    path = source / name
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise BadInput(f"{source} is damaged: {name} is missing. Make it again, then publish it.") from error
    if size != entry.n_bytes:
        raise BadInput(f"{source} is damaged: {name} has {size:,} bytes, its manifest says {entry.n_bytes:,}.")
    if there is not None and there.size == size:
        same = there.tag == tag_of(path) if gives_tags(remote.url) else same_upload
        if same:
            return there, False
    return remote.send(path, name), True


def _check(remote: Remote, listing: Listing, sent: dict[str, Found]) -> dict[str, Found]:
    """What is there, by one listing; TryAgain when that is not what was sent."""
    objects = {found.path: found for found in remote.objects()}
    wrong = [name for name, found in sent.items() if _content(objects.get(name)) != _content(found)]
    if wrong or _wrong(objects, listing):
        name = (wrong or _wrong(objects, listing))[0]
        what = "is gone" if name not in objects else "is not what was sent"
        raise TryAgain(
            f"{remote}/{name} {what}: another process writes there ({format_count(len(wrong))} of "
            f"{plural(len(sent), 'object')}). Run the same command again."
        )
    return objects


def _content(found: Found | None) -> tuple[int, str] | None:
    return None if found is None else (found.size, found.tag)


def _wrong(objects: dict[str, Found], listing: Listing) -> Sequence[str]:
    """Files of a result that are not there with their sizes."""
    sizes = {name: found.size for name, found in objects.items()}
    return [name for name, entry in listing.files.items() if sizes.get(name) != entry.n_bytes]


def _clean_up(remote: Remote, there: There, listing: Listing) -> None:
    """Remove what earlier uploads put there and this result has not; then the marker, which names it."""
    stale = there.ours - set(listing.files) - {MANIFEST, MARKER}
    remote.remove(sorted(stale & set(there.objects)))
    if MARKER in there.objects:
        remote.remove([MARKER])


def _published(source: Path, remote: Remote, listing: Listing, *, n_sent: int, reused: bool) -> Published:
    n_files = len(listing.files)
    return Published(str(source), str(remote), n_files, n_sent, listing.n_bytes, listing.digest, reused)
