"""The published dataset: what lies where, opening it, reading it, checking it.

Invariant: `manifest.json` is the commit record. It names every file with its size and digest, so a file that is
missing, short, swapped or changed by a bit is found; opening checks presence and sizes, `verify` checks digests.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr

from tsclust_ooc import columns, extras, files, records
from tsclust_ooc.errors import BadInput, TryAgain, UsageError
from tsclust_ooc.files import FileEntry
from tsclust_ooc.plan import Options
from tsclust_ooc.progress import Listener, silent
from tsclust_ooc.provenance import Provenance
from tsclust_ooc.remote import is_url, plain_path, shown
from tsclust_ooc.rows import DatasetRows
from tsclust_ooc.shards.schema import Problem, Schema, Shard
from tsclust_ooc.units import format_count

if TYPE_CHECKING:
    import dask.array

MANIFEST_VERSION = 3
MANIFEST, DATA, INDEX, REJECTED = "manifest.json", "data.zarr", "index", "rejected.json"
SHARDS = "shards.parquet"
ARRAY = "embeddings"
VIEWS = ("flatten", "variable", "mean")


@dataclass(frozen=True)
class SplitEntry:
    """One split: array shape (sample, variable, feature) or (sample, feature), dtype, chunk shape, number of shards."""

    n_shards: int
    shape: tuple[int, ...]
    dtype: str
    chunk_shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """The commit record of a dataset.

    `digest` covers the content (splits, schema, options, files); `plan` identifies the inputs it was made from.
    """

    digest: str
    plan: str
    source: str
    schema: Schema
    reason: str
    options: Options
    splits: dict[str, SplitEntry]
    n_rejected: int
    files: dict[str, FileEntry]
    seconds: float
    provenance: Provenance


@dataclass(frozen=True)
class Rejected:
    """Every shard that a dataset leaves out."""

    rejected: tuple[Problem, ...]


def content_digest(
    schema: Schema, options: Options, splits: dict[str, SplitEntry], entries: dict[str, FileEntry]
) -> str:
    """Digest of what a dataset holds, whoever made it and when: not of the times of its shards."""
    return records.digest([schema, options, splits, {name: one for name, one in entries.items() if name != SHARDS}])


def read_manifest(path: Path) -> Manifest:
    """The manifest of the dataset at `path`; FileNotFoundError when there is none."""
    return records.load(path / MANIFEST, Manifest, MANIFEST_VERSION)


def read_rejected(path: Path) -> tuple[Problem, ...]:
    """The shards that the dataset at `path` left out."""
    return records.load(path / REJECTED, Rejected, MANIFEST_VERSION).rejected


def shard_table(shards: Sequence[Shard]) -> pa.Table:
    """Shards in row order as a table: path, split, size, mtime_ns, n_samples."""
    return columns.table({
        "path": columns.text([records.path_to_text(s.path) for s in shards]),
        "split": columns.text([s.split for s in shards]),
        "size": columns.numbers([s.size for s in shards]),
        "mtime_ns": columns.numbers([s.mtime_ns for s in shards]),
        "n_samples": columns.numbers([s.n_samples for s in shards]),
    })  # fmt: skip


def read_shards(path: Path) -> tuple[Shard, ...]:
    """The shards of a `shards.parquet`, of a dataset or of work; FileNotFoundError, with its name, when it is gone."""
    with path.open("rb") as file:  # pyarrow would not say in its error which file is gone
        told = pq.ParquetFile(file).read().to_pydict()  # pq.read_table would import pandas
    paths = [records.text_to_path(path) for path in told.pop("path")]
    return tuple(map(Shard, paths, *told.values()))


def open_dataset(path: str | Path, *, check: bool = True) -> Dataset:
    """Open a published dataset, checking (unless told not to) that every file it should have is there with its size.

    Raises
    ------
    BadInput
        There is no dataset, or files are missing or of the wrong size.
    TryAgain
        There is no dataset yet, but an unfinished consolidation of it.
    UsageError
        `path` is a URL.
    """
    path = plain_path(str(path))
    if is_url(path):
        raise UsageError(
            f"{shown(path)} is a URL, and a dataset is opened from a directory. Copy it first, for instance by 'aws s3 "
            f"sync'; or read it where it is: zarr.open_group('{shown(path)}/{DATA}', mode='r')."
        )
    path = Path(path).expanduser().absolute()
    manifest = _manifest_at(path)
    dataset = Dataset(path, manifest)
    damage = list(check_sizes(dataset)) if check else []
    if damage and _manifest_at(path).digest != manifest.digest:  # an append or --overwrite took its place meanwhile
        return open_dataset(path)
    if damage:
        named = "; ".join(f"{d.file}: {d.what}" for d in damage[:5])
        raise BadInput(
            f"{path} is damaged: {len(damage)} of {len(manifest.files)} files. {named}. "
            f"Consolidate it again with --overwrite from {manifest.source}."
        )
    return dataset


def _manifest_at(path: Path) -> Manifest:
    try:
        return read_manifest(path)
    except FileNotFoundError:
        raise _no_dataset(path) from None
    except NotADirectoryError:
        raise BadInput(f"{path} is a file, not a dataset. Give the directory that consolidate published.") from None


def work_folders(path: Path) -> list[Path]:
    """Unfinished consolidations of the dataset at `path`."""
    return files.work_of(path)


def _no_dataset(path: Path) -> Exception:
    chunks = sum("/c/" in str(f.relative_to(work)) for work in work_folders(path) for f in files.walk_files(work))
    if work_folders(path):
        return TryAgain(
            f"{path} is not a dataset yet: it has no {MANIFEST}. Found: {format_count(chunks)} chunk files of an "
            "unfinished consolidation. Run the same consolidate command again to finish it."
        )
    what = "a directory without" if path.is_dir() else "nothing there, so no"
    return BadInput(f"{path} is not a dataset: {what} {MANIFEST}. Make one: tsclust consolidate SRC {path}")


class Dataset(Mapping[str, "Split"]):
    """A published dataset: a mapping from split name to `Split`. Open it with `open_dataset`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    def __getitem__(self, split: str) -> Split:
        if split not in self.manifest.splits:
            raise KeyError(f"no split {split!r} in {self.path}; it has {', '.join(self)}")
        return Split(self, split, self.manifest.splits[split])

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest.splits)

    def __len__(self) -> int:
        return len(self.manifest.splits)

    @property
    def schema(self) -> Schema:
        """What a sample is."""
        return self.manifest.schema

    def __repr__(self) -> str:
        rows = ", ".join(f"{name} {format_count(split.n_samples)}" for name, split in self.items())
        return f"<Dataset {self.path}: {rows} samples {self.schema.item_shape} {self.schema.dtype}>"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{name}</td><td style='text-align:right'>{format_count(split.n_samples)}</td>"
            f"<td>{split.entry.shape}</td><td>{split.entry.dtype}</td></tr>"
            for name, split in self.items()
        )
        return f"<table><tr><th>split</th><th>samples</th><th>shape</th><th>dtype</th></tr>{rows}</table>"


@dataclass(frozen=True)
class Split:
    """One split of a dataset, read lazily."""

    dataset: Dataset
    name: str
    entry: SplitEntry

    @property
    def n_samples(self) -> int:
        """Samples (time windows) in the split."""
        return self.entry.shape[0]

    @property
    def n_chunks(self) -> int:
        """Chunks of the split."""
        return -(-self.n_samples // self.entry.chunk_shape[0])

    @property
    def chunks_a_shard(self) -> int:
        """Chunks in each zarr shard; 0 where each chunk is a file of its own."""
        n_bytes = math.prod(self.entry.chunk_shape) * np.dtype(self.entry.dtype).itemsize
        return self.dataset.manifest.options.chunks_a_shard(n_bytes, self.n_chunks)

    @property
    def array(self) -> zarr.Array[Any]:
        """The zarr array (sample, variable, feature) or (sample, feature), read-only."""
        found = zarr.open_array(self.dataset.path / DATA / self.name / ARRAY, mode="r")
        assert isinstance(found, zarr.Array)
        return found

    def view(self, name: str = "flatten") -> dask.array.Array:
        """The rows of a view as a lazy 2-D dask array, one block a chunk; see `rows`."""
        rows = self.rows(name)
        lazy: dask.array.Array = extras.load("dask.array").from_zarr(self.array)  # seconds to import, rarely wanted
        if name == "mean" and lazy.ndim == 3:
            return lazy.mean(axis=1, dtype="f8").astype(rows.view_dtype)
        lazy = lazy.astype(rows.view_dtype)
        if lazy.ndim == 2:
            return lazy
        n, variables, features = lazy.shape
        if name == "flatten":
            return lazy.reshape((n, variables * features))
        return lazy.reshape((n * variables, features))

    def rows(self, view: str = "flatten") -> DatasetRows:
        """The rows of a view, for passes: block by block, each block one chunk.

        'flatten' is one row a sample (variable x feature columns), 'variable' one row a variable of a sample,
        'mean' one row a sample, averaged over variables.
        """
        if view not in VIEWS:
            raise UsageError(f"--view {view} is not known. Use one of: {', '.join(VIEWS)}.")
        folder = self.dataset.path / DATA / self.name / ARRAY
        plain, entry = self.dataset.manifest.options.codec == "", self.entry
        return DatasetRows(
            str(folder), entry.shape, entry.chunk_shape[0], entry.dtype, view, plain, self.chunks_a_shard
        )

    def index(self) -> pa.Table:
        """Where each row came from: split, row, shard, shard_row, sample_id, in row order."""
        wanted = f"{INDEX}/{self.name}"  # not by its beginning: one split may be called like the beginning of another
        names = sorted(name for name in self.dataset.manifest.files if name.rpartition("-")[0] == wanted)
        tables = [pq.read_table(self.dataset.path / name) for name in names]
        return pa.concat_tables(tables) if tables else INDEX_SCHEMA.empty_table()


INDEX_SCHEMA = pa.schema([
    pa.field("split", pa.string()), pa.field("row", pa.int64()), pa.field("shard", pa.string()),
    pa.field("shard_row", pa.int64()), pa.field("sample_id", pa.string()),
])  # fmt: skip


def index_table(
    split: str, start: int, shards: Sequence[str], shard_rows: Sequence[int], sample_ids: Sequence[str]
) -> pa.Table:
    """The index of consecutive rows of a split, from row `start` on; names that are not UTF-8 become 'base64:...'."""
    n = len(shards)
    filled = [
        columns.same_text(split, n), columns.numbers(range(start, start + n)),
        columns.text(list(map(records.path_to_text, shards))), columns.numbers(shard_rows),
        columns.text(list(map(records.path_to_text, sample_ids))),
    ]  # fmt: skip
    return pa.Table.from_arrays(filled, schema=INDEX_SCHEMA)


@dataclass(frozen=True)
class Damage:
    """One thing wrong with a dataset: the file (relative), and what was found."""

    file: str
    what: str


def check_sizes(dataset: Dataset) -> Iterator[Damage]:
    """Files of the manifest that are missing or have another size. One stat a file."""
    for name, entry in dataset.manifest.files.items():
        try:
            found = os.stat(dataset.path / name).st_size
        except FileNotFoundError:
            yield Damage(name, "missing")
            continue
        if found != entry.n_bytes:
            yield Damage(name, f"{found:,} bytes, wanted {entry.n_bytes:,}")


def verify(
    dataset: Dataset, *, mapper: Callable[..., Iterable[Damage | None]] = map, listener: Listener = silent
) -> list[Damage]:
    """Check every byte of a dataset against its manifest; returns what is damaged, missing or extra."""
    manifest = dataset.manifest
    damage: list[Damage] = []
    if manifest.digest != content_digest(manifest.schema, manifest.options, manifest.splits, manifest.files):
        damage.append(Damage(MANIFEST, "its digest does not match its content"))
    names = list(manifest.files)
    check = _Check(dataset)
    for done, found in enumerate(mapper(check, names), start=1):
        listener.advance("verify", done, len(names))
        if found is not None:
            damage.append(found)
    known = {*names, MANIFEST}
    extra = (str(path.relative_to(dataset.path)) for path in files.walk_files(dataset.path))
    damage += [Damage(name, "not in the manifest") for name in sorted(extra) if name not in known]
    return damage


@dataclass(frozen=True)
class _Check:
    dataset: Dataset

    def __call__(self, name: str) -> Damage | None:
        entry, path = self.dataset.manifest.files[name], self.dataset.path / name
        try:
            size = path.stat().st_size
            if size != entry.n_bytes:
                return Damage(name, f"{size:,} bytes, wanted {entry.n_bytes:,}")
            found = files.checksum(path)
        except OSError as error:
            return Damage(name, "missing" if isinstance(error, FileNotFoundError) else str(error.strerror))
        return None if found == entry.digest else Damage(name, f"digest {found}, wanted {entry.digest}")
