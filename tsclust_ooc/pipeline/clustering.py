"""cluster, predict and evaluate: a dataset's rows into labels, and what they are worth."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tsclust_ooc import checkpoint, files, provenance, published, report, results
from tsclust_ooc.checkpoint import Drawn, Progress
from tsclust_ooc.cluster import starts, stock
from tsclust_ooc.cluster.fused import UnusableRows
from tsclust_ooc.cluster.lloyd import Fit, PassInfo, assign, lloyd
from tsclust_ooc.dataset import Dataset, open_dataset
from tsclust_ooc.errors import BadInput, CannotWrite, UsageError
from tsclust_ooc.passes import Tally, gather, thread_mapper
from tsclust_ooc.pipeline import describing
from tsclust_ooc.pipeline.options import ClusterOptions, ComputeOptions
from tsclust_ooc.pipeline.session import Session, check_apart, session
from tsclust_ooc.progress import Listener, silent
from tsclust_ooc.results import Metrics, Run, RunManifest, RunOptions, RunWork
from tsclust_ooc.rows import DatasetRows
from tsclust_ooc.runtime import Runtime
from tsclust_ooc.units import format_bytes, format_seconds

_TASK_NAMES = {"pass": "lloyd-pass"}
"""What tasks of a stage are called on a dashboard; else as the stage, in one word."""
_ROWS_AT_ONCE = 1024
_BLOCKS_A_WORKER = 4  # a block as read and as float32, its tile and products, and one waiting to be taken

Arrays = dict[str, np.ndarray[Any, Any]]
"""One array a split."""


@dataclass(frozen=True)
class Clustered:
    """Result of cluster and predict. `sizes` and `scores` are of the fit split; paths are absolute."""

    run: str
    k: int
    inertia: float
    n_iter: int
    converged: bool
    n_passes: int
    bytes_read: int
    seconds: float
    peak_bytes: int
    sizes: tuple[int, ...]
    splits: dict[str, int]
    scores: dict[str, float]
    labels: str
    report: str
    dashboard: str
    digest: str
    reused: bool


def cluster(
    dataset: str | Path,
    run: str | Path,
    k: int,
    options: ClusterOptions = ClusterOptions(),
    listener: Listener = silent,
) -> Clustered:
    """Fit `k` clusters on one split of a dataset, label every split, publish the run.

    Raises BadInput for data that cannot be clustered (the shard and row are named), CannotWrite when `run` is taken,
    TryAgain when another process is making it.
    """
    opened = open_dataset(dataset)
    known = None if options.truth is None else describing.read_truth(options.truth)
    fit_split = _fit_split(opened, options.fit_split)
    starts.check_k(k, opened[fit_split].rows(options.view).n_rows)
    what = RunOptions(
        "cluster", k, options.engine, options.view, options.metric, options.init, options.max_iter, options.tol,
        options.seed, fit_split,
    )  # fmt: skip
    with _working(opened, run, options, listener) as held:
        work = _Work(held, opened, what)
        return work.reuse() or work.cluster(options, known)


def predict(
    run: str | Path,
    dataset: str | Path,
    out: str | Path,
    options: ComputeOptions = ComputeOptions(),
    listener: Listener = silent,
) -> Clustered:
    """Label every row of a dataset by the centers of a published run; publish the labels as a run of their own."""
    fitted, opened = results.open_run(run), open_dataset(dataset)
    model = fitted.model
    if model is None:
        raise BadInput(f"{fitted.path} holds predictions, not a model. Give the run that cluster published.")
    # Columns of 'flatten' are (variable, feature) pairs; the rows of the other views are features alone.
    kept = slice(None) if model.view == "flatten" else slice(-1, None)
    if opened.schema.item_shape[kept] != model.item_shape[kept]:
        raise BadInput(
            f"{opened.path} has samples {opened.schema.item_shape}, the run {fitted.path} was fitted on "
            f"{model.item_shape} (view {model.view}). Use a dataset with the same features."
        )
    check_apart(Path(out).expanduser().absolute(), fitted.path)
    what = replace(fitted.manifest.options, kind="predict", fit_split="", model=fitted.manifest.digest)
    with _working(opened, out, options, listener) as held:
        work = _Work(held, opened, what)
        return work.reuse() or work.predict(fitted, model)


def _working(
    opened: Dataset, out: str | Path, options: ComputeOptions, listener: Listener
) -> contextlib.AbstractContextManager[Session]:
    final = Path(out).expanduser().absolute()
    check_apart(final, opened.path)
    return session(final, "run", "made", options, listener)


class _Work:
    """One cluster or predict command at work: rows, counts, and what it notes on the way."""

    def __init__(self, held: Session, opened: Dataset, what: RunOptions) -> None:
        self.held, self.opened, self.what, self.tally = held, opened, what, Tally()
        self.final, self.options, self.listener = held.final, held.options, held.listener
        self.rows = {name: split.rows(what.view) for name, split in opened.items() if split.n_samples}
        self.work = RunWork(self.final, opened.manifest.digest, what)
        self.keeper = checkpoint.Keeper(self.work, self.listener)
        self.notes: list[str] = []
        if opened.manifest.n_rejected:
            self.notes.append(f"{opened.manifest.n_rejected:,} shards were left out of the dataset (rejected.json)")

    def reuse(self) -> Clustered | None:
        """The published run, if it is just this one."""
        found = results.existing(self.final, self.opened.manifest.digest, self.what, overwrite=self.options.overwrite)
        if found is None:
            return None
        published.sweep(self.final)
        return _clustered(found, dashboard="", reused=True)

    def cluster(self, options: ClusterOptions, known: describing.Known | None) -> Clustered:
        """Fit, label, describe, publish."""
        name = self.what.fit_split
        with self.work, self._runtime() as runtime, self.keeper, self._naming_rows(name):
            before = self._kept()
            sample = self._sample(runtime, name, options, before)
            fit = self._fit(runtime, self.rows[name], sample.x, options, before)
            labels, distances = {name: fit.labels}, {name: fit.distances}
            inertias = {name: fit.inertia}
            for other in self.rows:
                if other != name:
                    with self._naming_rows(other):
                        labels[other], distances[other], inertias[other] = self._assign(runtime, other, fit.centers)
            if not fit.converged:
                self.notes.append(f"not converged after {fit.n_iter} updates: --max-iter {2 * fit.n_iter} goes on")
            described = describing.Described(
                self.opened, self.what, self._in_units(distances, labels, fit.centers), labels
            )
            metrics = described.metrics(fit, inertias, sample.rows, sample.x, known, tuple(self.notes))
            return self._publish(described, metrics, fit.centers, runtime)

    def predict(self, fitted: Run, model: results.Model) -> Clustered:
        """Label, describe, publish."""
        centers = results.load_centers(fitted.path, model)
        labels, distances, inertias = {}, {}, {}
        with self.work, self._runtime() as runtime:
            for name in self.rows:
                with self._naming_rows(name):
                    labels[name], distances[name], inertias[name] = self._assign(runtime, name, centers)
            described = describing.Described(self.opened, self.what, self._in_units(distances, labels, centers), labels)
            metrics = described.predicted(inertias, tuple(self.notes))
            return self._publish(described, metrics, None, runtime)

    @contextlib.contextmanager
    def _runtime(self) -> Iterator[Runtime]:
        block = max(rows.view_dtype.itemsize * (rows.bounds[1] * rows.n_columns) for rows in self.rows.values())
        n_workers = self.held.workers_that_fit(_BLOCKS_A_WORKER * block, "clustering", self._sample_bytes())
        with self.held.runtime(n_workers) as runtime:
            yield runtime

    def _sample_bytes(self) -> int:
        """The sample and k-means++'s centered copy. Its size depends on no budget, for labels must not."""
        if not self.what.fit_split:
            return 0
        rows = self.rows[self.what.fit_split]
        n = min(rows.n_rows, starts.sample_size(rows, self.what.k))
        return 2 * n * rows.n_columns * rows.view_dtype.itemsize

    def _kept(self) -> Progress | None:
        """What an earlier try got to; its reads count as ours."""
        before = self.keeper.progress()
        if before is not None:
            n = len(before.state.history)
            self.tally = Tally(before.passes_before, before.bytes_before)
            self.listener.say(f"going on after pass {n}" if n else "going on with the centers that were chosen")
            self.notes.append(f"an earlier try was ended after pass {n}; seconds and peak memory are of the last one")
        return before

    def _sample(
        self, runtime: Runtime, name: str, options: ClusterOptions, before: Progress | None
    ) -> describing.Sample:
        """A uniform sample of the fit split: where centers start, and what the map of the report shows."""
        rows = self.rows[name]
        chosen = starts.sample_indices(rows.n_rows, starts.sample_size(rows, self.what.k), options.seed)
        drawn = self.keeper.drawn()
        if drawn is None:
            # Read again because a try was killed, it counts as once.
            tally = self.tally if before is None else None
            x = gather(rows, chosen, mapper=_watched(runtime, "sample", self.listener), tally=tally)
            drawn = Drawn(x, self.tally.n_passes, self.tally.bytes_read)
            if before is None:
                self.keeper.keep_sample(drawn)
        elif before is None:
            self.tally = Tally(drawn.n_passes, drawn.bytes_read)
        return describing.Sample(chosen, drawn.x)

    def _fit(
        self, runtime: Runtime, rows: DatasetRows, sample: np.ndarray[Any, Any], options: ClusterOptions,
        before: Progress | None,
    ) -> Fit:  # fmt: skip
        centers = self._start(runtime, rows, sample, options) if before is None else before.state.centers
        if options.engine == "dask-ml":
            return self._fit_stock(runtime, rows, centers, options)
        begun = replace(self.tally)
        return lloyd(
            rows, centers, metric=options.metric, max_iter=options.max_iter, tol=options.tol,  # type: ignore[arg-type]
            mapper=_watched(runtime, "pass", self.listener), tally=self.tally, on_pass=self._say_pass,
            resume=None if before is None else before.state,
            on_state=lambda state: self.keeper.keep(Progress(state, begun.n_passes, begun.bytes_read)),
        )  # fmt: skip

    def _start(
        self, runtime: Runtime, rows: DatasetRows, sample: np.ndarray[Any, Any], options: ClusterOptions
    ) -> np.ndarray[Any, Any]:
        start = starts.Start(options.init, options.metric, options.seed)  # type: ignore[arg-type]
        mapper = _watched(runtime, "start", self.listener)
        with thread_mapper(self.held.limits.n_workers) as local:
            return starts.initial_centers(
                rows, self.what.k, start, mapper=mapper, local=local, tally=self.tally, sample=sample
            )

    def _fit_stock(
        self, runtime: Runtime, rows: DatasetRows, centers: np.ndarray[Any, Any], options: ClusterOptions
    ) -> Fit:
        """dask-ml's centers, with labels, distances and inertia of our own from one more pass: its own are wrong."""
        lazy = self.opened[self.what.fit_split].view(self.what.view)
        fitted = stock.fit_stock(lazy, centers, max_iter=options.max_iter, tol=options.tol, seed=options.seed)
        self.notes.append(f"dask-ml ran {fitted.n_iter} iterations of its own; n_passes does not count its reads")
        once = lloyd(
            rows, fitted.centers, max_iter=1, tol=0.0, mapper=_watched(runtime, "pass", self.listener), tally=self.tally
        )
        found = self._assign(runtime, self.what.fit_split, fitted.centers)
        return replace(
            once, centers=fitted.centers, labels=found[0], distances=found[1], inertia=found[2], n_iter=fitted.n_iter,
            history=(), converged=fitted.n_iter < options.max_iter,
        )  # fmt: skip

    def _assign(
        self, runtime: Runtime, name: str, centers: np.ndarray[Any, Any]
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], float]:
        """Labels, squared distances and inertia of one split, in one pass."""
        rows = self.rows[name]
        labels, distances = np.empty(rows.n_rows, np.int32), np.empty(rows.n_rows, rows.view_dtype)

        def take(start: int, per_row: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]) -> None:
            there = slice(start, start + len(per_row[0]))
            labels[there], distances[there] = per_row

        inertia, _ = assign(
            rows, centers, metric=self.what.metric, tally=self.tally, sink=take,  # type: ignore[arg-type]
            mapper=_watched(runtime, f"label {name}", self.listener),
        )  # fmt: skip
        return labels, distances, inertia

    def _in_units(self, squared: Arrays, labels: Arrays, centers: np.ndarray[Any, Any]) -> Arrays:
        """Squared distances as people know them: euclidean distance, or 1 - cosine."""
        if self.what.metric == "cosine":
            return {name: d / 2 for name, d in squared.items()}
        found = {name: np.sqrt(d) for name, d in squared.items()}
        for name, d in found.items():
            beyond = np.flatnonzero(np.isinf(d))  # the square is too large for float32, the distance itself is not
            for far in np.split(beyond, range(_ROWS_AT_ONCE, len(beyond), _ROWS_AT_ONCE)):
                gaps = gather(self.rows[name], far, tally=self.tally) - centers[labels[name][far]].astype(np.float64)
                d[far] = np.linalg.norm(gaps, axis=1)
        return found

    def _say_pass(self, info: PassInfo) -> None:
        rate = format_bytes(info.bytes_read / max(info.seconds, 1e-9))
        self.listener.say(
            f"pass {info.number}   inertia {info.inertia:.4e}   moved {100 * info.moved:.3g} %   "
            f"{format_seconds(info.seconds)}   {rate}/s"
        )

    @contextlib.contextmanager
    def _naming_rows(self, split: str) -> Iterator[None]:
        """Say which shard a row that cannot be used came from."""
        try:
            yield
        except UnusableRows as error:
            where = describing.origin(self.opened[split], self.what.view, error.row)
            raise BadInput(f"{split}: {error} {where}") from error

    def _publish(
        self, described: describing.Described, metrics: Metrics, centers: np.ndarray[Any, Any] | None, runtime: Runtime
    ) -> Clustered:
        work = self.work
        for split in described.labels:
            work.write_labels(split, described.table(split))
        if centers is not None:
            work.write_model(
                centers, metric=self.what.metric, view=self.what.view, item_shape=self.opened.schema.item_shape,
                dataset_digest=self.opened.manifest.digest,
            )  # fmt: skip
        work.write_metrics(metrics)
        if self.options.scheduler != "threads":
            page = work.path(results.DASK_REPORT)
            runtime.save_report(page)
            if page.exists():
                work.note(results.DASK_REPORT)
        manifest = self._manifest(runtime)
        work.write(results.REPORT, report.render(describing.page(manifest, metrics, self.final)).encode())
        manifest = replace(manifest, files=dict(sorted(work.files.items())))
        try:
            work.publish(manifest, replace=self.options.overwrite)
        except (CannotWrite, FileNotFoundError):
            if self.options.overwrite:
                raise
            # Without a lock between nodes another process may have published just this run meanwhile.
            found = results.existing(self.final, self.opened.manifest.digest, self.what, overwrite=False)
            if found is None:
                raise
            return _clustered(found, dashboard=runtime.dashboard, reused=True)
        return _clustered(results.open_run(self.final), dashboard=runtime.dashboard, reused=False)

    def _manifest(self, runtime: Runtime) -> RunManifest:
        return RunManifest(
            digest=self.work.digest(), dataset=str(self.opened.path), dataset_digest=self.opened.manifest.digest,
            options=self.what, n_rows={name: rows.n_rows for name, rows in self.rows.items()},
            n_columns=next(iter(self.rows.values())).n_columns, scheduler=self.options.scheduler,
            n_workers=runtime.n_workers, n_passes=self.tally.n_passes, bytes_read=self.tally.bytes_read,
            seconds=round(self.held.meter.elapsed(), 3), peak_bytes=self.held.meter.peak_bytes, files={},
            provenance=provenance.here_and_now(),
        )  # fmt: skip


def evaluate(run: str | Path, truth: str | Path) -> dict[str, dict[str, float]]:
    """Scores of a run's labels against known classes, for each split and for 'all'.

    `truth` is a parquet file of split, sample_id, class; rows of a sample all have its class.
    """
    opened, known = results.open_run(run), describing.read_truth(Path(truth))
    tables = {name: opened.labels(name) for name in opened.manifest.n_rows}
    return describing.external({name: describing.classes_of(known, t) for name, t in tables.items()})


def rewrite_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Render the report of a published run again, to `out` (default: RUN-report.html beside the run)."""
    opened = results.open_run(run)
    target = opened.path.with_name(f"{opened.path.name}-report.html") if out is None else Path(out).expanduser()
    if not target.absolute().parent.is_dir():
        raise CannotWrite(f"{target}: {target.absolute().parent} is not a directory. Make it, or choose another name.")
    page = describing.page(opened.manifest, opened.metrics, opened.path)
    files.write_atomic(target.absolute(), report.render(page).encode())
    return target


def _fit_split(opened: Dataset, asked: str | None) -> str:
    filled = [name for name, split in opened.items() if split.n_samples]
    if not filled:
        raise BadInput(f"{opened.path} holds no samples. Consolidate shards that have some.")
    if asked is not None and asked not in filled:
        raise UsageError(f"--fit-split {asked}: {opened.path} has no such rows. Use one of: {', '.join(filled)}.")
    if asked is not None:
        return asked
    return "train" if "train" in filled else "all" if "all" in filled else filled[0]


def _watched(runtime: Runtime, stage: str, listener: Listener) -> Callable[..., Iterator[Any]]:
    """The runtime's mapper, telling the listener how many blocks are done."""

    def mapper(fn: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        todo = list(items)
        named = _Named(fn, _TASK_NAMES.get(stage, stage.replace(" ", "-")))
        for done, result in enumerate(runtime.mapper(named, todo), start=1):
            listener.advance(stage, done, len(todo))
            yield result

    return mapper


@dataclass(frozen=True)
class _Named:
    """A function with the name that its tasks have on a dashboard."""

    fn: Callable[[Any], Any]
    task_name: str

    def __call__(self, item: Any) -> Any:
        return self.fn(item)


def _clustered(run: Run, *, dashboard: str, reused: bool) -> Clustered:
    manifest, metrics = run.manifest, run.metrics
    first = manifest.options.fit_split or next(iter(metrics.sizes))
    return Clustered(
        run=str(run.path), k=manifest.options.k, inertia=metrics.inertia, n_iter=metrics.n_iter,
        converged=metrics.converged, n_passes=manifest.n_passes, bytes_read=manifest.bytes_read,
        seconds=manifest.seconds, peak_bytes=manifest.peak_bytes, sizes=metrics.sizes[first], splits=manifest.n_rows,
        scores={score.name: score.value for score in metrics.scores}, labels=str(run.path / results.LABELS),
        report=str(run.path / results.REPORT), dashboard=dashboard, digest=manifest.digest, reused=reused,
    )  # fmt: skip
