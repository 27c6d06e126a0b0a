"""Results on an object store: made on scratch, sent when they are complete, gone from scratch when they are there.

    SCRATCH/tsclust-UID/sent/<digest of the URL>/NAME   the result while it is made and sent; work lies beside it

Invariant: what is below the URL is told by `uploading`; what lies on scratch is only ever ours, and the same command
goes on with it, whatever killed the one before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tsclust_ooc import files, locks, records, scratch, uploading
from tsclust_ooc.dataset import DATA, MANIFEST, MANIFEST_VERSION, REJECTED, Manifest
from tsclust_ooc.errors import BadInput, CannotWrite, TryAgain, TsclustError, UsageError
from tsclust_ooc.pipeline.consolidate_options import ConsolidateOptions
from tsclust_ooc.pipeline.outcomes import Consolidated, DryRun
from tsclust_ooc.progress import Listener
from tsclust_ooc.provenance import Meter
from tsclust_ooc.remote import Remote
from tsclust_ooc.units import format_bytes, format_count, plural
from tsclust_ooc.uploading import There

FOLDER = "sent"
_LOCK_SECONDS = 0.5

Make = Callable[[Path, ConsolidateOptions, Listener], Consolidated | DryRun]
MakeHere = Callable[[Path, Listener], Consolidated]


def consolidate_to(url: str, options: ConsolidateOptions, listener: Listener, make: Make) -> Consolidated | DryRun:
    """Have `make` consolidate to a directory on scratch, and send that to `url`.

    `make` is given the directory, and options by which it replaces nothing there.

    Raises
    ------
    UsageError
        It is an append, or the workers would be on other nodes, which do not see this one's scratch.
    CannotWrite
        Something else lies at the URL, or scratch has no room for the whole dataset.
    TryAgain
        Another process is at it.
    """
    remote = Remote(url)
    _refuse(remote, options)
    place = scratch.scratch_dir(options.scratch)
    final = place / FOLDER / _digest(remote) / (remote.name or "dataset")
    make_here = partial(_made, make, replace(options, overwrite=False))
    if options.dry_run:
        with _speaking_of(remote, final):
            return replace(make(final, options, listener), dataset=str(remote))
    lock = locks.name_for(place, "send", final)
    busy = f"a dataset is being made for {remote} by another process. Run the same command again when it is done."
    with locks.hold(lock, wait_seconds=_LOCK_SECONDS, busy=busy, listener=listener), _speaking_of(remote, final):
        there = uploading.look(remote)
        final.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        sending = _Sending(remote, final, there, _Saying(listener, final, remote))
        with Meter() as meter:
            done = sending.run(make_here, overwrite=options.overwrite)
            return replace(done, seconds=round(meter.elapsed(), 3), peak_bytes=max(done.peak_bytes, meter.peak_bytes))


def _refuse(remote: Remote, options: ConsolidateOptions) -> None:
    if options.append:
        raise UsageError(
            f"--append: {remote} is a URL, and only a dataset in a directory can be appended to. Append to one, or "
            "make the dataset again with --overwrite."
        )
    if options.scheduler not in ("threads", "local"):
        raise UsageError(
            f"--scheduler {options.scheduler}: a dataset for {remote} is made on scratch of this node, which workers "
            "on others do not see. Use --scheduler threads or local, or consolidate to a shared directory."
        )


def _made(make: Make, options: ConsolidateOptions, final: Path, listener: Listener) -> Consolidated:
    done = make(final, options, listener)
    assert isinstance(done, Consolidated)  # it was no dry run
    return done


@dataclass(frozen=True)
class _Sending:
    """One result on its way to a URL."""

    remote: Remote
    final: Path
    there: There
    listener: Listener

    def run(self, make: MakeHere, *, overwrite: bool) -> Consolidated:
        if not (self.final / DATA).is_dir():  # what a killed command left of `_pretend`
            files.retire(self.final)
        if self.there.listing is not None and not overwrite:
            return self._there_already(make)
        done = self._make(make)
        self.listener.say(f"sending {format_bytes(done.bytes)} to {self.remote}")
        uploading.upload(self.final, self.remote, overwrite=overwrite, listener=self.listener)
        self._clear()
        return replace(done, dataset=str(self.remote), reused=False)

    def _make(self, make: MakeHere) -> Consolidated:
        """The result on scratch; one that is there from before and is another was meant for an earlier command."""
        try:
            return make(self.final, self.listener)
        except CannotWrite:
            if not (self.final / MANIFEST).is_file():
                raise
        files.retire(self.final)
        return make(self.final, self.listener)

    def _there_already(self, make: MakeHere) -> Consolidated:
        """What there is, if it is complete and made from these shards and options; else CannotWrite says it is not."""
        found = self.there.listing
        if found is not None and not uploading.is_complete(self.there, found):
            raise CannotWrite(f"{self.remote} is damaged: files of it are missing. Use --overwrite to make it again.")
        files.retire(self.final)
        self._pretend()
        try:
            return replace(make(self.final, self.listener), dataset=str(self.remote))
        finally:
            files.retire(self.final)
            self._clear()

    def _pretend(self) -> None:
        """The records of what is there, where a dataset is looked for: they tell whether it is the same."""
        self.final.mkdir(mode=0o700)
        for name in (REJECTED, MANIFEST):
            (self.final / name).write_bytes(self.remote.read(name))

    def _clear(self) -> None:
        files.retire(self.final)
        with contextlib.suppress(OSError):  # work of another plan is still there: an interrupted command may go on
            self.final.parent.rmdir()


@dataclass(frozen=True)
class _Saying:
    """A listener that hears of the URL where work speaks of the place on scratch."""

    listener: Listener
    final: Path
    remote: Remote

    def advance(self, stage: str, done: int, total: int) -> None:
        """Pass it on."""
        self.listener.advance(stage, done, total)

    def say(self, message: str) -> None:
        """Pass it on, about the URL."""
        self.listener.say(message.replace(str(self.final), str(self.remote)))


@contextlib.contextmanager
def _speaking_of(remote: Remote, final: Path) -> Iterator[None]:
    """Errors about the directory on scratch speak of the URL, which is what was asked for."""
    try:
        yield
    except TsclustError as error:
        error.args = tuple(a.replace(str(final), str(remote)) if isinstance(a, str) else a for a in error.args)
        raise
    except PermissionError as error:
        raise CannotWrite(f"{error.filename}: {error.strerror}. Check the keys and their rights.") from error


def read_manifest(remote: Remote) -> Manifest:
    """The manifest of the dataset at a URL.

    Raises BadInput when what is there is none, TryAgain when an upload of it is unfinished.
    """
    try:
        body = json.loads(remote.read(MANIFEST))
    except FileNotFoundError:
        raise _no_dataset(remote) from None
    except ValueError as error:
        raise BadInput(f"{remote}/{MANIFEST} is not readable JSON: {error}. Make the dataset again.") from error
    version = body.pop("format_version", None) if isinstance(body, dict) else None
    if version != MANIFEST_VERSION:
        raise BadInput(
            f"{remote}/{MANIFEST} has format_version {version!r}; this version of tsclust reads {MANIFEST_VERSION}. "
            "Open it with the version that wrote it, or make it again."
        )
    return records.from_plain(Manifest, body, f"{remote}/{MANIFEST}")


def _no_dataset(remote: Remote) -> TsclustError:
    names = [found.path for found in remote.objects()]
    if uploading.MARKER in names:
        return TryAgain(
            f"{remote} is not a dataset yet: it has no {MANIFEST}. Found: {format_count(len(names) - 1)} objects of an "
            "unfinished upload. Run the same consolidate command again to finish it."
        )
    what = f"{plural(len(names), 'object')}, but no {MANIFEST}" if names else "nothing there"
    return BadInput(f"{remote} is not a dataset: {what}. Make one: tsclust consolidate SRC {remote}")


def _digest(remote: Remote) -> str:
    return hashlib.sha256(str(remote).encode()).hexdigest()[:24]
