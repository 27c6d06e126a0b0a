"""New shards for a published dataset: what of it stays, and how the longer one takes its place.

Invariant: the published directory is read and linked from, never written to. Its rows keep their numbers and their
bytes, and are never read from shards again, which may be gone. What takes its place is exchanged for just the dataset
that it extends: when another one comes out, it goes back.

    .NAME.PLAN.wip/base/       links to the files of the old dataset whose rows are written again, beside new ones
                   leaving.*/  what is exchanged for the old dataset, and then the old one
                   old/        the old dataset, between two renames, where the filesystem cannot exchange
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr

from tsclust_ooc import files, records
from tsclust_ooc.dataset import (
    ARRAY,
    DATA,
    INDEX,
    MANIFEST,
    SHARDS,
    Manifest,
    open_dataset,
    read_manifest,
    read_rejected,
    read_shards,
)
from tsclust_ooc.errors import BadInput, TryAgain
from tsclust_ooc.files import FileEntry
from tsclust_ooc.plan import Base, Partition, Plan, make_plan
from tsclust_ooc.reading import Ids
from tsclust_ooc.shards.listing import Entry, Listing, rebased
from tsclust_ooc.shards.schema import Problem, Shard
from tsclust_ooc.shards.splits import split_order
from tsclust_ooc.shards.survey import Survey
from tsclust_ooc.store import make_dirs

BASE, _LEAVING, _OLD = "base", "leaving.", "old"
_EXCHANGES = 8


@dataclass(frozen=True)
class Standing:
    """A published dataset that shards are appended to: its commit record, its shards in row order, those left out."""

    manifest: Manifest
    shards: tuple[Shard, ...]
    rejected: tuple[Problem, ...]


@dataclass(frozen=True)
class Comparison:
    """A listing beside the shards of a dataset: the files that are new, shards with another stamp, shards gone."""

    new: Listing
    changed: tuple[Problem, ...]
    vanished: tuple[str, ...]


def standing(final: Path) -> Standing:
    """The dataset at `final`, as one moment shows it.

    Raises
    ------
    BadInput
        There is none, it is damaged, or it keeps no list of its shards.
    TryAgain
        It was replaced while it was read.
    """
    opened = open_dataset(final).manifest
    if SHARDS not in opened.files:
        raise BadInput(
            f"{final} has no {SHARDS}: it was made by an earlier version, and what was committed to it is not known. "
            f"Make it again with --overwrite from {opened.source}; then --append works."
        )
    with _pinned(final) as here:
        manifest = _same(here, final, opened.digest)
        _check_digest(here, SHARDS, manifest.files[SHARDS], final)
        return Standing(manifest, read_shards(here / SHARDS), read_rejected(here))


def compare(shards: Sequence[Shard], listing: Listing) -> Comparison:
    """What is listed, beside the committed `shards`; both name files relative to one root.

    What lies outside the folders that were searched, or in one that cannot be read, has not vanished; and what is wrong
    with a committed shard now is no concern of ours: it is not read.
    """
    committed = {shard.path: shard for shard in shards}
    entries, changed = [], []
    for entry in listing.entries:
        shard = committed.get(entry.path)
        if shard is None:
            entries.append(entry)
        elif (shard.size, shard.mtime_ns) != (entry.size, entry.mtime_ns):
            changed.append(Problem(entry.path, "changed", _other_stamp(shard, entry)))
    seen = {entry.path for entry in listing.entries} | {problem.path for problem in listing.problems}
    searched = tuple(_inside(os.path.relpath(folder, listing.root)) for folder in listing.folders)
    unseen = tuple(_inside(problem.path) for problem in listing.problems)
    gone = (path for path in committed if path not in seen and path.startswith(searched))
    problems = [problem for problem in listing.problems if problem.path not in committed]
    vanished = tuple(path for path in gone if not path.startswith(unseen))
    return Comparison(replace(listing, entries=entries, problems=problems), tuple(changed), vanished)


def _inside(folder: str) -> str:
    return "" if folder == "." else f"{folder}/"


def below(listing: Listing, source: str) -> Listing | None:
    """The listing with its files named relative to `source`; None where it is of files that lie elsewhere."""
    for root, top in ((listing.root, source), (os.path.realpath(listing.root), os.path.realpath(source))):
        way = os.path.relpath(root, top)
        if way.split("/")[0] != "..":
            folders = tuple(os.path.join(source, os.path.relpath(f, top)) for f in _as(root, listing))
            here = os.path.normpath(os.path.join(source, way))
            return rebased(replace(listing, root=here, folders=folders), source)
    return None


def _as(root: str, listing: Listing) -> Iterator[str]:
    """The folders of a listing, their root spelled as `root`."""
    return (os.path.join(root, os.path.relpath(folder, listing.root)) for folder in listing.folders)


def _other_stamp(shard: Shard, entry: Entry) -> str:
    def stamp(size: int, mtime_ns: int) -> str:
        when = datetime.fromtimestamp(mtime_ns / 1e9, UTC).isoformat(" ", "milliseconds")
        return f"{size:,} bytes of {when.removesuffix('+00:00')} UTC"

    return f"committed with {stamp(shard.size, shard.mtime_ns)}, now {stamp(entry.size, entry.mtime_ns)}"


def extended(base: Standing, new: Survey) -> Plan:
    """The plan of the dataset with the good shards of `new` after those it has, split by split."""
    by_split: dict[str, list[Shard]] = {}
    for shard in (*base.shards, *new.shards):
        by_split.setdefault(shard.split, []).append(shard)
    shards = tuple(shard for name in sorted(by_split, key=split_order) for shard in by_split[name])
    manifest = base.manifest
    together = replace(new, source=manifest.source, schema=manifest.schema, reason=manifest.reason, shards=shards)
    rows = {name: split.shape[0] for name, split in manifest.splits.items()}
    return replace(make_plan(together, manifest.options), base=Base(manifest.digest, len(base.shards), rows))


def left_out(base: Standing, new: Survey) -> tuple[Problem, ...]:
    """The shards that the longer dataset leaves out: those of the survey, and of before, but what was mended since."""
    mended = {shard.path for shard in new.shards}
    found = {problem.path: problem for problem in base.rejected if problem.path not in mended}
    found.update((problem.path, problem) for problem in new.problems)
    return tuple(found.values())


# ---- what stays


def link_base(final: Path, root: Path, plan: Plan) -> dict[int, dict[str, FileEntry]]:
    """Link the files of a plan's base that stay to `root`/dataset, and those to be written anew to `root`/base.

    Files are copied where links are refused. Returns the files of each partition that stays. Raises TryAgain when the
    base is not at `final` any more.
    """
    assert plan.base is not None
    dataset, base = root / "dataset", root / BASE
    base.mkdir(exist_ok=True)
    kept: dict[int, dict[str, FileEntry]] = {index: {} for index in plan.committed}
    with _pinned(final) as here:
        manifest = _same(here, final, plan.base.digest)
        old = [f"{DATA}/{name}/{ARRAY}/zarr.json" for name in plan.base.rows]
        for name, partitions in _partitions_of(here, manifest, plan).items():
            for partition in partitions:
                if partition.index in kept:
                    kept[partition.index][name] = manifest.files[name]
                    _link(here, dataset, name)
                else:
                    old.append(name)
        for name in [*old, MANIFEST]:
            _link(here, base, name)
    return kept


def _partitions_of(here: Path, manifest: Manifest, plan: Plan) -> dict[str, list[Partition]]:
    """For each file of the base that holds rows, chunks or index, the partitions of `plan` that have these rows."""
    by_split = _by_split(plan)
    of: dict[str, list[Partition]] = {}
    for name, (split, start, stop) in _rows_of(here, manifest, plan).items():
        step = by_split[split][0].stop - by_split[split][0].start
        of[name] = by_split[split][start // step : (stop - 1) // step + 1]
    return of


def _rows_of(folder: Path, manifest: Manifest, plan: Plan) -> dict[str, tuple[str, int, int]]:
    """For each chunk file and index file of the base in `folder` the split and the rows it holds."""
    assert plan.base is not None
    assert plan.before is not None
    parts = _by_split(plan.before)
    steps = {split: _rows_a_file(folder, split) for split in parts}
    rows: dict[str, tuple[str, int, int]] = {}
    for name in manifest.files:
        words = name.split("/")
        if words[0] == INDEX:
            split, _, number = words[1].removesuffix(".parquet").rpartition("-")
            part = parts[split][int(number)]
            rows[name] = split, part.start, part.stop
        elif words[0] == DATA and words[3:4] == ["c"]:
            start = int(words[4]) * steps[words[1]]
            rows[name] = words[1], start, min(start + steps[words[1]], plan.base.rows[words[1]])
    return rows


def _by_split(plan: Plan) -> dict[str, list[Partition]]:
    parts: dict[str, list[Partition]] = {}
    for one in plan.partitions:
        parts.setdefault(one.split, []).append(one)
    return parts


def _rows_a_file(folder: Path, split: str) -> int:
    """Rows in a file of a split's array: in a chunk, or in a zarr shard of many."""
    metadata = json.loads((folder / DATA / split / ARRAY / "zarr.json").read_text(encoding="utf-8"))
    return int(metadata["chunk_grid"]["configuration"]["chunk_shape"][0])


def _link(here: Path, there: Path, name: str) -> None:
    """The file `name` of `here` also in `there`, by a hard link: neither is ever changed in place. Else a copy."""
    make_dirs(there, (there / name).parent)
    try:
        os.link(here / name, there / name)
    except FileExistsError:
        return
    except OSError:  # another user's file, a filesystem without links, too many of them
        with (here / name).open("rb") as source, files.atomic_file(there / name) as copy:
            shutil.copyfileobj(source, copy, 1 << 20)


class CommittedRows:
    """Rows of the base of a plan, from the links that `link_base` made in work directory `root`."""

    def __init__(self, root: Path, plan: Plan) -> None:
        self._folder = root / BASE
        self._manifest = read_manifest(self._folder)
        self._rows = _rows_of(self._folder, self._manifest, plan)
        self._sound: set[str] = set()

    def read(self, split: str, start: int, stop: int, out: np.ndarray) -> Ids:
        """Fill `out` ((stop - start, *item_shape)) with committed rows; returns where they came from.

        Raises BadInput when a file of them is not what the manifest of the dataset says: damage must not be written
        again as if it were sound.
        """
        names = [name for name, (of, a, b) in self._rows.items() if of == split and a < stop and b > start]
        for name in names:
            if name not in self._sound:
                _check_digest(self._folder, name, self._manifest.files[name], self._folder)
                self._sound.add(name)
        array = zarr.open_array(self._folder / DATA / split / ARRAY, mode="r")
        out[:] = array[start:stop]
        return self._index([name for name in names if name.startswith(INDEX)], start, stop)

    def _index(self, names: Sequence[str], start: int, stop: int) -> Ids:
        parts = [part for name in sorted(names) for part in self._index_part(name, start, stop)]
        told = pa.concat_tables(parts).to_pydict()
        if told["row"] != list(range(start, stop)):
            raise BadInput(f"the index of {self._folder} does not name rows {start:,} to {stop:,}. Run tsclust verify.")
        paths, ids = (list(map(records.text_to_path, told[column])) for column in ("shard", "sample_id"))
        return Ids(paths, told["shard_row"], ids)

    def _index_part(self, name: str, start: int, stop: int) -> Iterator[pa.Table]:
        """What an index file says of rows `start` to `stop`; a row group at a time, for names take memory."""
        at = self._rows[name][1]
        with (self._folder / name).open("rb") as file:
            index = pq.ParquetFile(file)
            for group in range(index.num_row_groups):
                n = index.metadata.row_group(group).num_rows
                first, last = max(start, at), min(stop, at + n)
                if first < last:
                    yield index.read_row_group(group).slice(first - at, last - first)
                at += n


# ---- the old one out, the new one in


def publish(root: Path, final: Path, plan: Plan) -> None:
    """Exchange the finished `root`/dataset for the base of `plan` at `final`.

    The caller sweeps `root`, where the old dataset then lies. Raises TryAgain, with everything as it was, when what
    lies at `final` is not the base; FileNotFoundError when another process is publishing the same work.
    """
    assert plan.base is not None
    claimed = root / f"{_LEAVING}{secrets.token_hex(6)}"
    files.publish_dir(root / "dataset", claimed)  # only one process can: nobody takes the old one for work of ours
    try:
        with files.naming_the_place(final):
            if _digest_at(final) != plan.base.digest:
                raise _overtaken(final)
            if files.exchange(claimed, final):
                _keep_the_base(claimed, final, plan)
            else:
                _by_two_renames(claimed, root / _OLD, final, plan)
            files.fsync_dir(final.parent)
    except FileNotFoundError as error:
        if claimed.exists():  # then it is the dataset that went away
            files.publish_dir(claimed, root / "dataset")
            raise _overtaken(final) from error
        # Another process took it for what a killed one left.
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(claimed)) from error
    except BaseException:
        if _is_ours(claimed, plan):
            files.publish_dir(claimed, root / "dataset")
        raise


def _keep_the_base(claimed: Path, final: Path, plan: Plan) -> None:
    """After the exchange: back again, and TryAgain, if what came out is not what was extended."""
    assert plan.base is not None
    if _digest_at(claimed) == plan.base.digest:
        return
    for _ in range(_EXCHANGES):
        files.exchange(claimed, final)
        if _is_ours(claimed, plan):  # else somebody else exchanged too, meanwhile
            break
    raise _overtaken(final)


def _by_two_renames(claimed: Path, old: Path, final: Path, plan: Plan) -> None:
    """For a filesystem that cannot exchange. A crash between the two leaves the old one where `recover` finds it."""
    assert plan.base is not None
    files.publish_dir(final, old)
    try:
        if _digest_at(old) != plan.base.digest:
            raise _overtaken(final)
        files.publish_dir(claimed, final)
    except BaseException:
        if not final.exists():
            files.publish_dir(old, final)
        raise


def recover(root: Path, final: Path, plan: Plan) -> None:
    """Put right what a `publish` left that was killed, so that the same command can go on: nothing is lost."""
    if plan.base is None:
        return
    old = root / _OLD
    if old.is_dir() and not os.path.lexists(final):
        files.publish_dir(old, final)
    for claimed in root.glob(f"{_LEAVING}*"):
        with contextlib.suppress(FileNotFoundError):  # whoever claimed it is alive, and was faster
            came_out = _digest_at(claimed)
            if came_out not in ("", plan.base.digest) and not _is_ours(claimed, plan) and _is_ours(final, plan):
                files.exchange(claimed, final)
            if _is_ours(claimed, plan) and not (root / "dataset").exists():
                files.publish_dir(claimed, root / "dataset")


def _overtaken(final: Path) -> TryAgain:
    return TryAgain(
        f"{final} was replaced while shards were being appended to it: what lies there now is left as it is. "
        "Run the same command again to append to that."
    )


def _is_ours(path: Path, plan: Plan) -> bool:
    """Whether the dataset at `path` is what `plan` makes (the base of a plan that adds nothing is not)."""
    with contextlib.suppress(OSError, BadInput):
        manifest = read_manifest(path)
        return manifest.plan == plan.digest and plan.base is not None and manifest.digest != plan.base.digest
    return False


def _digest_at(path: Path) -> str:
    """Digest of the dataset at `path`, '' where there is none that can be read."""
    with contextlib.suppress(OSError, BadInput):
        return read_manifest(path).digest
    return ""


@contextlib.contextmanager
def _pinned(folder: Path) -> Iterator[Path]:
    """A path to the directory that is now called `folder`, also when that name goes to another one meanwhile."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError as error:
        raise _overtaken(folder) from error
    try:
        yield Path(f"/proc/self/fd/{fd}")
    except FileNotFoundError as error:
        if error.filename is not None and str(error.filename).startswith(f"/proc/self/fd/{fd}"):
            raise _overtaken(folder) from error  # it was replaced, and is being removed
        raise
    finally:
        os.close(fd)


def _same(here: Path, final: Path, digest: str) -> Manifest:
    manifest = read_manifest(here)
    if manifest.digest != digest:
        raise _overtaken(final)
    return manifest


def _check_digest(folder: Path, name: str, wanted: FileEntry, told: Path) -> None:
    found = files.entry_of(folder / name)
    if found != wanted:
        raise BadInput(
            f"{told / name} is damaged: {found.n_bytes:,} bytes with digest {found.digest}, wanted {wanted.n_bytes:,} "
            f"with {wanted.digest}. Nothing can be appended to it. Run tsclust verify on the dataset."
        )
