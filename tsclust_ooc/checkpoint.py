"""The progress of a fit on disk, so that a command which was killed is not begun again.

Invariant: what is read back is whole, of just this run and written by this version, or it is not used and the listener
hears why. Nothing is unpickled. A kill costs the pass under way, and at most `LEAST_SECONDS` of those before it.

    one line of JSON        version, key of the run, plain values, dtype and shape of each array
    the arrays' bytes       one after the other, in C order
    32 hexadecimal digits   xxh3-128 of all that

Kept are the sample that centers start from and the state of the fit after each pass; labels of the other splits are
not: they cost one pass each, after the last state.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash

from tsclust_ooc import __version__, files, records
from tsclust_ooc.cluster.lloyd import PassInfo, State
from tsclust_ooc.errors import BadInput, CannotWrite
from tsclust_ooc.progress import Listener, silent
from tsclust_ooc.results import HOPELESS, RunWork

CHECKPOINT_VERSION = 1
SAMPLE, FIT = "sample.checkpoint", "fit.checkpoint"
LEAST_SECONDS = 1.0
"""Work that took less is not written at once: an fsync costs milliseconds, and so may a pass."""

_DIGEST_BYTES = 32

R = TypeVar("R")
Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Drawn:
    """The sample that centers start from, (rows, columns), and what had been read when it was there."""

    x: np.ndarray[Any, Any]
    n_passes: int
    bytes_read: int


@dataclass(frozen=True)
class Progress:
    """A fit between two passes, and what had been read before its first one."""

    state: State
    passes_before: int
    bytes_before: int


class Keeper:
    """The checkpoints of one run while a command is at work on it.

    A context: left by an error that another try may survive, it writes the newest state if that is not written yet.
    """

    def __init__(self, work: RunWork, listener: Listener = silent) -> None:
        self._work, self._listener = work, listener
        self._unsaved: Progress | None = None
        self._saved_at = time.monotonic()
        self._warned = False

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and not isinstance(error, HOPELESS):
            with contextlib.suppress(OSError, CannotWrite):  # the command ends with what ended it
                self.flush()

    def drawn(self) -> Drawn | None:
        """The sample, when there is one to go on with."""
        return self._read(SAMPLE, _drawn)

    def progress(self) -> Progress | None:
        """The state of the fit, when there is one to go on with."""
        return self._read(FIT, _progress)

    def keep_sample(self, drawn: Drawn) -> None:
        """Take over the sample; it is written when it was long in coming."""
        if self._is_due():
            self._write(SAMPLE, _SampleRecord(drawn.n_passes, drawn.bytes_read), {"x": drawn.x})

    def keep(self, progress: Progress) -> None:
        """Take over a state; it is written when the last writing is `LEAST_SECONDS` ago.

        Until it is, or a newer one comes, its labels must stay as they are.
        """
        self._unsaved = progress
        if self._is_due():
            self.flush()

    def flush(self) -> None:
        """Write the newest state, if it is not written."""
        progress = self._unsaved
        if progress is not None:
            self._write(FIT, _fit_record(progress), _fit_arrays(progress.state))
            self._unsaved = None

    def _is_due(self) -> bool:
        return time.monotonic() - self._saved_at >= LEAST_SECONDS

    def _write(self, name: str, record: Any, arrays: Arrays) -> None:
        folder = self._work.prepare()
        try:
            save(folder / name, self._work.key, record, arrays)
        except CannotWrite as error:  # the result may find more room than the progress does
            if not self._warned:
                self._listener.say(f"progress is not kept: {error}")
            self._warned = True
        self._saved_at = time.monotonic()

    def _read(self, name: str, restore: Callable[[Path, str], R]) -> R | None:
        path = self._work.root / name
        try:
            return restore(path, self._work.key)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (BadInput, OSError) as error:
            self._listener.say(f"no going on with {path}: {error} Starting again.")
            return None


def save(path: Path, key: str, record: Any, arrays: Arrays) -> None:
    """Write a `record` of plain values and named arrays to `path`, durably and in one step.

    Raises CannotWrite (no room), FileNotFoundError (the directory was taken away).
    """
    shapes = {name: _Array(array.dtype.str, array.shape) for name, array in arrays.items()}
    header = _Header(CHECKPOINT_VERSION, __version__, key, record, shapes)
    digest = xxhash.xxh3_128()
    with files.atomic_file(path) as file:
        parts: list[bytes | memoryview] = [records.dumps(header).encode() + b"\n", *map(_bytes_of, arrays.values())]
        for part in parts:
            digest.update(part)
            file.write(part)
        file.write(digest.hexdigest().encode())
    files.fsync_dir(path.parent)


def load(path: Path, key: str, cls: type[R]) -> tuple[R, Arrays]:
    """The record, of type `cls`, and the arrays that `save` wrote to `path` for the run `key`.

    Raises FileNotFoundError, and BadInput when it is damaged, of another run, or written by another version.
    """
    data = path.read_bytes()
    body = memoryview(data)[:-_DIGEST_BYTES]
    if files.checksum_bytes(body).encode() != data[-_DIGEST_BYTES:]:
        raise BadInput("it is damaged: its digest is not that of its content.")
    end = data.index(b"\n") + 1
    header = records.from_plain(_Header, json.loads(data[:end]), where=path.name)
    if (header.format_version, header.tsclust_version) != (CHECKPOINT_VERSION, __version__):
        raise BadInput(f"it was written by version {header.tsclust_version}, and this is {__version__}.")
    if header.key != key:
        raise BadInput("it is of another dataset or of other options.")
    arrays: Arrays = {}
    for name, array in header.arrays.items():
        start, end = end, end + array.n_bytes
        # A copy, since an array that begins anywhere in the file is not aligned.
        arrays[name] = np.frombuffer(body[start:end], np.dtype(array.dtype)).reshape(array.shape).copy()
    return records.from_plain(cls, header.record, where=path.name), arrays


@dataclass(frozen=True)
class _Array:
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class _Header:
    format_version: int
    tsclust_version: str
    key: str
    record: Any
    arrays: dict[str, _Array]


@dataclass(frozen=True)
class _SampleRecord:
    n_passes: int
    bytes_read: int


@dataclass(frozen=True)
class _FitRecord:
    """A `Progress` without its arrays; the names are those of `State`."""

    n_iter: int
    settled: bool
    total_ss: float
    threshold: float
    n_passes: int
    bytes_read: int
    history: tuple[PassInfo, ...]
    passes_before: int
    bytes_before: int


_OF_STATE = tuple(f.name for f in fields(State) if f.name not in ("centers", "labels"))


def _drawn(path: Path, key: str) -> Drawn:
    record, arrays = load(path, key, _SampleRecord)
    return Drawn(arrays["x"], record.n_passes, record.bytes_read)


def _progress(path: Path, key: str) -> Progress:
    record, arrays = load(path, key, _FitRecord)
    plain = {name: getattr(record, name) for name in _OF_STATE}
    state = State(arrays["centers"], arrays["labels"].astype(np.int32), **plain)
    return Progress(state, record.passes_before, record.bytes_before)


def _fit_record(progress: Progress) -> _FitRecord:
    plain = {name: getattr(progress.state, name) for name in _OF_STATE}
    return _FitRecord(**plain, passes_before=progress.passes_before, bytes_before=progress.bytes_before)


def _fit_arrays(state: State) -> Arrays:
    """Centers as they are; labels in the smallest type that holds -1 to k - 1, mostly one byte a row."""
    return {"centers": state.centers, "labels": state.labels.astype(np.min_scalar_type(-len(state.centers)))}


def _bytes_of(array: np.ndarray[Any, Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
