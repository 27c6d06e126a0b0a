"""The run directory: labels, model and metrics, written beside its final name and published by one rename.

Invariant: a run is absent or complete. Its manifest is written last and names every file with size and digest; the
labels and the model depend on the dataset, the options and the seed alone.

    .RUN.<12 hex>.wip/     mode 0700; one for each dataset, options and user, found again by the next try
      *.checkpoint         what the next try goes on with (`checkpoint`)
      run-<12 hex>/        what will be published, of one process alone: two at the same work differ in times
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tsclust_ooc import columns, files, published, records
from tsclust_ooc.errors import BadInput, TryAgain, UsageError
from tsclust_ooc.files import FileEntry
from tsclust_ooc.provenance import Provenance
from tsclust_ooc.published import Kind, NameTaken

RUN_VERSION = 1
MANIFEST, METRICS, MODEL, CENTERS = "manifest.json", "metrics.json", "model/model.json", "model/centers.npy"
LABELS, REPORT, DASK_REPORT = "labels", "report.html", "dask-report.html"
HOPELESS = (BadInput, UsageError, NameTaken)
"""Errors that the same command meets again, whatever progress was kept."""


@dataclass(frozen=True)
class RunOptions:
    """What decides the labels of a run, besides the dataset. `kind` is 'cluster' or 'predict' (then `model` is set)."""

    kind: str
    k: int
    engine: str
    view: str
    metric: str
    init: str
    max_iter: int
    tol: float
    seed: int
    fit_split: str
    model: str = ""


@dataclass(frozen=True)
class RunManifest:
    """The commit record of a run. `digest` covers labels and model: equal digests, equal results.

    `n_passes` and `bytes_read` count the reads that led to the result, those of earlier tries that it went on from
    included; what a killed try read in vain is not counted. `seconds` and `peak_bytes` are those of the last try.
    """

    digest: str
    dataset: str
    dataset_digest: str
    options: RunOptions
    n_rows: dict[str, int]
    n_columns: int
    scheduler: str
    n_workers: int
    n_passes: int
    bytes_read: int
    seconds: float
    peak_bytes: int
    files: dict[str, FileEntry]
    provenance: Provenance


@dataclass(frozen=True)
class Model:
    """What `predict` needs besides the centers: how samples became rows, and how distance is measured.

    `item_shape` is that of the samples fitted; `centers_digest` the xxh3-128 of centers.npy.
    """

    k: int
    metric: str
    view: str
    item_shape: tuple[int, ...]
    n_columns: int
    dataset_digest: str
    centers_digest: str


@dataclass(frozen=True)
class Pass:
    """One read of all rows of the fit split: inertia to the centers it began with, fraction of rows that moved."""

    number: int
    inertia: float
    moved: float
    seconds: float
    n_bytes: int


@dataclass(frozen=True)
class Score:
    """A score, what it means, and whether it is 'exact' or from a sample."""

    name: str
    value: float
    definition: str
    basis: str


@dataclass(frozen=True)
class RowRef:
    """One row worth a look: its cluster, sample, split and distance to its center."""

    cluster: int
    sample_id: str
    split: str
    distance: float


@dataclass(frozen=True)
class Map:
    """A sample of rows on two principal axes, of `n_total` rows; `explained` variance fractions."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    labels: tuple[int, ...]
    sample_ids: tuple[str, ...]
    explained: tuple[float, float]
    n_total: int


@dataclass(frozen=True)
class Classes:
    """Known classes against clusters, over all labelled rows: counts (class, cluster)."""

    names: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Metrics:
    """Everything a report shows. `inertia` is the sum of squared distances of the fit split to the returned centers."""

    inertia: float
    inertia_by_split: dict[str, float]
    n_iter: int
    converged: bool
    sizes: dict[str, tuple[int, ...]]
    passes: tuple[Pass, ...]
    scores: tuple[Score, ...]
    nearest: tuple[RowRef, ...]
    farthest: tuple[RowRef, ...]
    notes: tuple[str, ...]
    map: Map | None = None
    classes: Classes | None = None


@dataclass(frozen=True)
class Run:
    """A published run: open it with `open_run`."""

    path: Path
    manifest: RunManifest
    metrics: Metrics = field(repr=False)
    model: Model | None = field(repr=False)

    def centers(self) -> np.ndarray[Any, np.dtype[Any]]:
        """Cluster centers (k, columns) of the run's own model."""
        return load_centers(self.path, self.model) if self.model else np.empty((0, 0))

    def labels(self, split: str | None = None) -> pa.Table:
        """Labels of one split, or of all: split, row, sample_id, (variable), label, distance."""
        if split is not None:
            return pq.read_table(self.path / LABELS / f"{split}.parquet")
        return pa.concat_tables([self.labels(name) for name in self.manifest.n_rows])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{split}</td>" + "".join(f"<td style='text-align:right'>{n:,}</td>" for n in sizes) + "</tr>"
            for split, sizes in self.metrics.sizes.items()
        )
        heads = "".join(f"<th>{i}</th>" for i in range(self.manifest.options.k))
        return f"<table><tr><th>split</th>{heads}</tr>{rows}</table>"


def open_run(path: str | Path) -> Run:
    """Open a published run; BadInput when there is none or files are missing or of the wrong size."""
    path = Path(path).expanduser().absolute()
    manifest = read_manifest(path)
    if manifest is None:
        raise BadInput(f"{path} is not a run: it has no {MANIFEST}. Make one: tsclust cluster DATASET {path} -k 6")
    published.check_sizes(path, manifest.files)
    model = records.load(path / MODEL, Model, RUN_VERSION) if manifest.options.kind == "cluster" else None
    return Run(path, manifest, records.load(path / METRICS, Metrics, RUN_VERSION), model)


def read_manifest(path: Path) -> RunManifest | None:
    """The manifest of the run at `path`, None when there is none; BadInput when it is of another kind or version."""
    try:
        return records.load(path / MANIFEST, RunManifest, RUN_VERSION)
    except (FileNotFoundError, NotADirectoryError):
        return None


def load_centers(path: Path, model: Model) -> np.ndarray[Any, np.dtype[Any]]:
    """The centers of the run at `path`, checked against the model's digest; nothing is unpickled."""
    if files.checksum(path / CENTERS) != model.centers_digest:
        raise BadInput(f"{path / CENTERS} is damaged: its digest is not the one in model.json. Cluster again.")
    centers: np.ndarray[Any, np.dtype[Any]] = np.load(path / CENTERS, allow_pickle=False)
    return centers


class RunWork:
    """An unpublished run: a context that leaves the work directory behind only when the same command can use it.

    `key` is the digest of what decides the run, `root` the work directory, `run` what this process will publish.
    Nothing is made before it is wanted, and nothing again that another process took away.
    """

    def __init__(self, final: Path, dataset_digest: str, options: RunOptions) -> None:
        self.final = final
        self.key = records.digest([dataset_digest, options])
        self.root = published.work_root(final, self.key)
        self.run = self.root / f"run-{secrets.token_hex(6)}"
        self.files: dict[str, FileEntry] = {}
        self._made: set[Path] = set()

    def __enter__(self) -> RunWork:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.root in self._made and isinstance(error, FileNotFoundError) and not self.root.exists():
            # Without a lock between nodes another process may take our work for that of a killed one.
            message = f"another process replaced the work for {self.final}. Run the same command again."
            raise TryAgain(message) from error
        if error is None or isinstance(error, HOPELESS):
            files.retire(self.root)
            return
        if self.run in self._made:
            files.retire(self.run)
        with contextlib.suppress(OSError):
            self.root.rmdir()  # goes only when empty: there is no progress in it, and nobody else's work

    def prepare(self) -> Path:
        """The work directory, made now if it was not wanted before."""
        if self.root not in self._made:
            published.make_private(self.root)
            self._made.add(self.root)
        return self.root

    def path(self, name: str) -> Path:
        """Where a file of the run is to be written."""
        self.prepare()
        if self.run not in self._made:
            with files.naming_the_place(self.final):
                self.run.mkdir()
                self._made.add(self.run)
                for folder in (LABELS, "model"):
                    (self.run / folder).mkdir()
        return self.run / name

    def write(self, name: str, data: bytes) -> None:
        """One file of the run, durably."""
        files.write_atomic(self.path(name), data)
        self.note(name)

    def note(self, name: str) -> None:
        """Take a file that is already in the directory into the manifest."""
        self.files[name] = files.entry_of(self.run / name)

    def write_labels(self, split: str, table: pa.Table) -> None:
        """The labels of one split."""
        with files.atomic_file(self.path(f"{LABELS}/{split}.parquet")) as file:
            pq.write_table(table, file)
        self.note(f"{LABELS}/{split}.parquet")

    def write_model(self, centers: np.ndarray[Any, Any], **what: Any) -> Model:
        """centers.npy and model.json."""
        with files.atomic_file(self.path(CENTERS)) as file:
            np.save(file, centers, allow_pickle=False)
        self.note(CENTERS)
        model = Model(k=len(centers), n_columns=centers.shape[1], centers_digest=self.files[CENTERS].digest, **what)
        records.save(self.path(MODEL), model, RUN_VERSION)
        self.note(MODEL)
        return model

    def write_metrics(self, metrics: Metrics) -> None:
        """metrics.json."""
        records.save(self.path(METRICS), metrics, RUN_VERSION)
        self.note(METRICS)

    def digest(self) -> str:
        """Digest of labels and model: what the run found, not when or how fast."""
        lasting = {name: f for name, f in self.files.items() if name.startswith((f"{LABELS}/", "model/"))}
        return records.digest(dict(sorted(lasting.items())))

    def publish(self, manifest: RunManifest, *, replace: bool) -> None:
        """Write the manifest, give the run its final name, and sweep the work for that name."""
        files.fsync_tree(self.run)
        records.save(self.path(MANIFEST), manifest, RUN_VERSION)
        files.publish_dir(self.run, self.final, replace=replace)
        published.sweep(self.final)


KIND = Kind("a run", "is a run with other options or of another dataset", read_manifest)


def existing(final: Path, dataset_digest: str, options: RunOptions, *, overwrite: bool) -> Run | None:
    """The run at `final` when it is just this one, None when the name is free (or to be overwritten).

    Raises CannotWrite when something else lies there; --overwrite replaces runs, not whatever else a name hits.
    """

    def is_same(manifest: RunManifest) -> bool:
        return (manifest.dataset_digest, manifest.options) == (dataset_digest, options)

    return open_run(final) if published.existing(final, KIND, is_same, overwrite=overwrite) else None


def label_table(
    split: str,
    sample_ids: pa.ChunkedArray,
    labels: np.ndarray[Any, Any],
    distances: np.ndarray[Any, Any],
    rows_per_sample: int,
) -> pa.Table:
    """Labels as a table: split, row, sample_id, (variable,) label, distance; one line a row of the view."""
    n = len(labels)
    row = np.repeat(np.arange(n // rows_per_sample), rows_per_sample)
    filled: dict[str, Any] = {
        "split": columns.same_text(split, n),
        "row": columns.numbers(row),
        "sample_id": sample_ids if rows_per_sample == 1 else sample_ids.take(columns.numbers(row)),
    }
    if rows_per_sample > 1:
        filled["variable"] = columns.numbers(np.tile(np.arange(rows_per_sample, dtype=np.int32), n // rows_per_sample))
    ends = {"label": columns.numbers(labels.astype(np.int32)), "distance": columns.numbers(distances)}
    return columns.table(filled | ends)


def by_cluster(labels: Mapping[str, np.ndarray[Any, Any]], k: int) -> dict[str, tuple[int, ...]]:
    """Rows of each cluster in each split."""
    return {split: tuple(np.bincount(found, minlength=k).tolist()) for split, found in labels.items()}
