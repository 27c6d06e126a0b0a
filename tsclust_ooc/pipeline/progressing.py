"""status: what lies at a name: a published result, work for it and how far that is, or nothing.

What is known without a lock, from any node: a receipt says that a partition or block is done, a fresh file without one
that it is being written, the times of the receipts how fast it goes; a checkpoint says which pass a run is at. A
partition that is still read leaves no trace and counts as missing.

Invariant: nothing is written, and files that vanish meanwhile are no error: then it is looked at again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tsclust_ooc import checkpoint, files, matrix, records, results
from tsclust_ooc import dataset as published_dataset
from tsclust_ooc import work as work_dir
from tsclust_ooc.dataset import ARRAY, DATA, MANIFEST_VERSION, REJECTED, Rejected
from tsclust_ooc.errors import BadInput
from tsclust_ooc.matrix import MatrixPlan
from tsclust_ooc.pipeline import sending
from tsclust_ooc.plan import CHUNKS_A_PARTITION, Plan
from tsclust_ooc.remote import Remote, is_url, plain_path
from tsclust_ooc.shards.schema import Problem

FRESH_SECONDS = 60.0
"""A file younger than this is being written, or was just now."""

_NAMED = 10
_WINDOW_SECONDS = 600.0  # of receipts that the rate is taken from
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}
_LOOKS = 5
_MAKE = "a dataset is made by tsclust consolidate SRC"


@dataclass(frozen=True)
class PublishedThing:
    """A published dataset, run or matrix of distances: its commit record in short. `n_rows` of each split."""

    kind: str
    digest: str
    created: str
    host: str
    n_rows: dict[str, int]
    bytes: int
    n_left_out: int


@dataclass(frozen=True)
class LastPass:
    """How far a fit is: passes over the data and updates of the centers so far, and what the last of them found."""

    n_passes: int
    n_iter: int
    inertia: float | None
    moved: float | None


@dataclass(frozen=True)
class InWork:
    """Unpublished work: a consolidation, a matrix of distances, or a run.

    `unit` is 'partition' or 'block' ('' for a run); of the `n_units` each is done, running or missing. `running` and
    `missing` name the first ten, counted from 0; `missing_array` all of the partitions as schedulers write them
    ('0-9,12'). `rate` is in `rate_unit`, None where receipts are too few. `seconds_idle` is how long ago the newest
    file was written. `bad` are shards found bad while reading, `n_left_out` those the survey found bad.
    """

    kind: str
    path: str
    unit: str = ""
    n_units: int = 0
    n_done: int = 0
    n_running: int = 0
    n_missing: int = 0
    running: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    missing_array: str = ""
    n_samples: int = 0
    n_samples_done: int = 0
    rate: float | None = None
    rate_unit: str = ""
    seconds_left: float | None = None
    seconds_idle: float | None = None
    bad: tuple[Problem, ...] = ()
    n_left_out: int = 0
    last_pass: LastPass | None = None
    note: str = ""


@dataclass(frozen=True)
class Status:
    """What lies at `path`; `state` is 'in work' where there is work, also to replace what is published.

    Else it is 'published'.
    """

    path: str
    state: str
    published: PublishedThing | None
    work: tuple[InWork, ...]


class _Vanished(Exception):
    """A work directory went away while it was looked at: it was published, or swept."""


def status(name: str | Path) -> Status:
    """What lies at `name`, a dataset, run or matrix of distances, published or not.

    Raises BadInput when there is neither a result nor work for one, or what is there cannot be read.
    """
    there = plain_path(str(name))
    if is_url(there):
        return _remote(Remote(there))
    path = Path(there).expanduser().absolute()
    for _ in range(_LOOKS):
        with contextlib.suppress(_Vanished):
            work = tuple(_look(root) for root in files.work_of(path))
            found = _published(path)
            if found is None and not work:
                raise _nothing(path)
            return Status(str(path), "in work" if work else "published", found, work)
    raise BadInput(f"{path} changed {_LOOKS} times while it was looked at. Run the same command again.")


def _nothing(path: Path) -> BadInput:
    if path.is_dir() and any(path.iterdir()):
        return BadInput(
            f"{path} is no dataset, run or matrix of distances: a directory without manifest.json, and there is no "
            "work to publish one there. Give the name of a result; a source of shards is for tsclust inspect."
        )
    what = "a file" if path.is_file() else "nothing there, published or in work"
    return BadInput(f"{path} is no dataset, run or matrix of distances: {what}. Check the name; {_MAKE} {path}")


# ---- what is published


def _published(path: Path) -> PublishedThing | None:
    refused: list[BadInput] = []
    for read in (_dataset, _run, _matrix):
        try:
            return read(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except BadInput as error:  # it is of another kind, or of another version
            refused.append(error)
    raise refused[0]


def _remote(remote: Remote) -> Status:
    return Status(str(remote), "published", _of_dataset(sending.read_manifest(remote)), ())


def _dataset(path: Path) -> PublishedThing:
    return _of_dataset(published_dataset.read_manifest(path))


def _of_dataset(found: published_dataset.Manifest) -> PublishedThing:
    rows = {name: split.shape[0] for name, split in found.splits.items()}
    return _thing("dataset", found, rows, found.n_rejected)


def _run(path: Path) -> PublishedThing:
    found = results.read_manifest(path)
    if found is None:
        raise FileNotFoundError(path)
    return _thing("run", found, found.n_rows)


def _matrix(path: Path) -> PublishedThing:
    found = matrix.KIND.read_manifest(path)
    if found is None:
        raise FileNotFoundError(path)
    return _thing("matrix of distances", found, {found.plan.split: found.plan.shape[0]})


def _thing(kind: str, manifest: Any, n_rows: dict[str, int], n_left_out: int = 0) -> PublishedThing:
    made = manifest.provenance
    n_bytes = sum(entry.n_bytes for entry in manifest.files.values())
    return PublishedThing(kind, manifest.digest, made.created, made.host, n_rows, n_bytes, n_left_out)


# ---- what is in work


def _look(root: Path) -> InWork:
    """What a work directory says of itself."""
    with _vanishing(root):
        owner = root.stat().st_uid
        if not os.access(root, os.R_OK | os.X_OK):
            return InWork("unknown", str(root), note=f"it belongs to user {owner}, and only they may look into it")
        if (root / "plan.json").exists():
            return _planned(root)
        if any((root / name).exists() for name in (checkpoint.SAMPLE, checkpoint.FIT)) or any(root.glob("run-*")):
            return _running_fit(root)
        return InWork("unknown", str(root), seconds_idle=_idle(_mtimes(root)), note="just begun: nothing planned yet")


@contextlib.contextmanager
def _vanishing(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _GONE:
            raise
        raise _Vanished from error
    if not root.is_dir():
        raise _Vanished


def _planned(root: Path) -> InWork:
    refused: list[BadInput] = []
    ways: tuple[tuple[type[Any], int, Callable[[Path, Any], InWork]], ...] = (
        (Plan, work_dir.WORK_VERSION, _consolidation),
        (MatrixPlan, matrix.MATRIX_VERSION, _distances),
    )
    for cls, version, look in ways:
        try:
            plan = records.load(root / "plan.json", cls, version)
        except BadInput as error:
            refused.append(error)
        else:
            return look(root, plan)
    return InWork("unknown", str(root), seconds_idle=_idle(_mtimes(root)), note=str(refused[0]))


def _consolidation(root: Path, plan: Plan) -> InWork:
    done = {int(stem): at for stem, at in _receipts(root) if stem.isdecimal()}
    rows = {p.index: p.stop - p.start for p in plan.partitions}
    done = {index: at for index, at in done.items() if index in rows}
    touched = _touched_partitions(root, plan, done)
    began = (root / "plan.json").stat().st_mtime
    now = _now([began, *done.values(), *touched.values()])
    running = sorted(index for index, at in touched.items() if now - at < FRESH_SECONDS)
    missing = [index for index in rows if index not in done and index not in running]
    n_done = sum(rows[index] for index in done)
    rate = _rate([(at, rows[index]) for index, at in done.items()], began)
    return InWork(
        "consolidation", str(root), "partition", len(rows), len(done), len(running), len(missing),
        _named(running), _named(missing), _ranges(missing), plan.n_rows, n_done, rate, "samples/s",
        _left(plan.n_rows - n_done, rate), round(now - max([began, *done.values(), *touched.values()]), 1),
        _bad_shards(root), _n_left_out(root), note=_appends(plan),
    )  # fmt: skip


def _appends(plan: Plan) -> str:
    if plan.base is None:
        return ""
    n_old = sum(plan.base.rows.values())
    return f"appends {plan.n_rows - n_old:,} samples to the {n_old:,} of the dataset that is there"


def _touched_partitions(root: Path, plan: Plan, done: dict[int, float]) -> dict[int, float]:
    """Partitions without a receipt that have files of chunks, with the time of the newest."""
    touched: dict[int, float] = {}
    first: dict[str, int] = {}
    for one in plan.partitions:
        first.setdefault(one.split, one.index)
    for split, begin in first.items():
        chunks = root / "dataset" / DATA / split / ARRAY / "c"
        files_each = 1 if plan.chunks_a_shard[split] else CHUNKS_A_PARTITION
        for name, _ in _listed(chunks):
            index = begin + int(name) // files_each if name.isdecimal() else -1
            if name.isdecimal() and index not in done:
                newest = max(_mtimes(chunks / name), default=0.0)
                touched[index] = max(newest, touched.get(index, 0.0))
    return touched


def _bad_shards(root: Path) -> tuple[Problem, ...]:
    found: list[Problem] = []
    for name, _ in _listed(root / "problems"):
        with contextlib.suppress(BadInput, FileNotFoundError):
            bad = records.load(root / "problems" / name, work_dir.BadShards, work_dir.WORK_VERSION)
            found += [shard.problem for shard in bad.shards]
    return tuple(found)


def _n_left_out(root: Path) -> int:
    with contextlib.suppress(BadInput, FileNotFoundError):
        return len(records.load(root / REJECTED, Rejected, MANIFEST_VERSION).rejected)
    return 0


def _distances(root: Path, plan: MatrixPlan) -> InWork:
    down, across = (-(-n // chunk) for n, chunk in zip(plan.shape, plan.chunk_shape, strict=True))
    blocks = [(i, j) for i in range(down) for j in range(i if plan.mirrored else 0, across)]
    done = dict(_receipts(root))
    touched = _touched_blocks(root, plan, done)
    began = (root / "plan.json").stat().st_mtime
    now = _now([began, *done.values(), *touched.values()])
    names = [f"{i}-{j}" for i, j in blocks]
    running = [name for name in names if now - touched.get(name, 0.0) < FRESH_SECONDS]
    n_done = sum(name in done for name in names)
    missing = [name for name in names if name not in done and name not in running]
    rate = _rate([(at, 1) for at in done.values()], began)
    return InWork(
        "matrix of distances", str(root), "block", len(names), n_done, len(running), len(missing),
        tuple(running[:_NAMED]), tuple(missing[:_NAMED]), rate=rate, rate_unit="blocks/s",
        seconds_left=_left(len(names) - n_done, rate),
        seconds_idle=round(now - max([began, *done.values(), *touched.values()]), 1),
    )  # fmt: skip


def _touched_blocks(root: Path, plan: MatrixPlan, done: dict[str, float]) -> dict[str, float]:
    """Blocks without a receipt of which a file is there, finished or not; the mirror image counts for the block."""
    touched: dict[str, float] = {}
    chunks = root / "matrix" / matrix.STORE / matrix.ARRAY / "c"
    for row, _ in _listed(chunks):
        for name, at in _listed(chunks / row):
            column = name.lstrip(".").partition(".")[0]  # of '3' or '.3.<hex>.partial'
            if row.isdecimal() and column.isdecimal():
                i, j = int(row), int(column)
                block = f"{min(i, j)}-{max(i, j)}" if plan.mirrored else f"{i}-{j}"
                if block not in done:
                    touched[block] = max(at, touched.get(block, 0.0))
    return touched


def _running_fit(root: Path) -> InWork:
    at = _mtimes(root)
    last, note = None, "no pass is kept yet"
    with contextlib.suppress(FileNotFoundError):
        last, note = _last_pass(root / checkpoint.FIT), ""
    if last is None and not note:
        note = f"{checkpoint.FIT} cannot be read: it was written by another version, or is damaged"
    return InWork("run", str(root), seconds_idle=_idle(at), last_pass=last, note=note)


def _last_pass(path: Path) -> LastPass | None:
    """What the first line of a checkpoint says; its arrays stay unread."""
    with path.open("rb") as file:
        line = file.readline()
    try:
        record = json.loads(line)["record"]
        last = record["history"][-1] if record["history"] else {}
        number = partial(_number, last)
        passes = int(record["passes_before"]) + int(record["n_passes"])
        return LastPass(passes, int(record["n_iter"]), number("inertia"), number("moved"))
    except (ValueError, KeyError, TypeError, IndexError):
        return None


def _number(record: dict[str, Any], key: str) -> float | None:
    return float(record[key]) if isinstance(record.get(key), int | float) else None


# ---- files and times, of which any may vanish


def _listed(folder: Path) -> list[tuple[str, float]]:
    """Names in a folder, hidden ones too, each with its time of change; [] when the folder is not there."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as listing:
        for entry in listing:
            with contextlib.suppress(FileNotFoundError):
                found.append((entry.name, entry.stat().st_mtime))
    return sorted(found)


def _receipts(root: Path) -> list[tuple[str, float]]:
    """Stems of the finished receipts, with their times."""
    return [(name[:-5], at) for name, at in _listed(root / "receipts") if name.endswith(".json") and name[0] != "."]


def _mtimes(folder: Path) -> list[float]:
    """Times of change of a folder and of every file below it."""
    found = []
    for path in [folder, *files.walk_files(folder)]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found.append(path.stat().st_mtime)
    return found


def _now(mtimes: Sequence[float]) -> float:
    """The time, by this node's clock or by that of the file server, whichever is ahead."""
    return max(time.time(), *mtimes)


def _idle(mtimes: Sequence[float]) -> float | None:
    return round(_now([0.0, *mtimes]) - max(mtimes), 1) if mtimes else None


def _rate(done: Sequence[tuple[float, int]], began: float) -> float | None:
    """Amounts a second, from (time, amount) of receipts in the last ten minutes before the newest.

    Receipts older than the plan are of earlier work and were only taken over.
    """
    own = sorted(one for one in done if one[0] > began)
    if not own:
        return None
    newest = own[-1][0]
    start = began if newest - began <= _WINDOW_SECONDS else min(at for at, _ in own if at >= newest - _WINDOW_SECONDS)
    amount = sum(n for at, n in own if at > start)
    return amount / (newest - start) if amount else None


def _left(amount: int, rate: float | None) -> float | None:
    return round(amount / rate, 1) if rate else None


def _named(numbers: Sequence[int]) -> tuple[str, ...]:
    return tuple(map(str, numbers[:_NAMED]))


def _ranges(numbers: Sequence[int]) -> str:
    """Rising numbers as schedulers write them: '0-9,12'."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
