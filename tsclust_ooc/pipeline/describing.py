"""What a run found, in tables and in words: from labels and distances to label tables, metrics and a report's page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tsclust_ooc import columns, report, results, scores
from tsclust_ooc.cluster.lloyd import Fit
from tsclust_ooc.dataset import Dataset, Split
from tsclust_ooc.errors import BadInput
from tsclust_ooc.projection import principal_components
from tsclust_ooc.results import Classes, Map, Metrics, Pass, RowRef, RunManifest, RunOptions, Score
from tsclust_ooc.units import format_bytes, format_count, format_seconds

_MAP_ROWS, _MAP_BYTES = 3000, 32 * 2**20
_NEAREST, _FARTHEST = 3, 3
_MEAN_COSINE = "Mean cosine between a row and its center: 1 - inertia / (2 rows), as rows and centers have unit length."

Known = dict[tuple[str, str], Any]
"""Known classes: (split, sample_id) -> class."""


@dataclass(frozen=True)
class Sample:
    """Rows of the fit split: which (ascending), and their values (rows, columns)."""

    rows: np.ndarray[Any, Any]
    x: np.ndarray[Any, Any]


@dataclass(frozen=True)
class Described:
    """Labels and distances of every split (`distances` in the units people read), and what made them."""

    opened: Dataset
    what: RunOptions
    distances: dict[str, np.ndarray[Any, Any]]
    labels: dict[str, np.ndarray[Any, Any]]

    def table(self, split: str) -> pa.Table:
        """The label table of one split."""
        ids = self.opened[split].index().column("sample_id")
        return results.label_table(split, ids, self.labels[split], self.distances[split], self._rows_per_sample(split))

    def metrics(
        self,
        fit: Fit,
        inertias: dict[str, float],
        sampled: np.ndarray[Any, Any],
        sample: np.ndarray[Any, Any],
        truth: Known | None,
        notes: tuple[str, ...],
    ) -> Metrics:
        """Everything a report shows of a fit."""
        nearest, farthest = self._members()
        found = _fit_scores(fit, self.what)
        classes = None
        if truth is not None:
            known = {name: classes_of(truth, self.table(name)) for name in self.labels}
            found += _external_scores(external(known))
            classes = _contingency(known, self.what.k)
        return Metrics(
            inertia=fit.inertia, inertia_by_split=inertias, n_iter=fit.n_iter, converged=fit.converged,
            sizes=results.by_cluster(self.labels, self.what.k),
            passes=tuple(Pass(p.number, p.inertia, p.moved, round(p.seconds, 4), p.bytes_read) for p in fit.history),
            scores=found, nearest=nearest, farthest=farthest, notes=notes, map=self._map(sampled, sample),
            classes=classes,
        )  # fmt: skip

    def predicted(self, inertias: dict[str, float], notes: tuple[str, ...]) -> Metrics:
        """Everything a report shows of a prediction."""
        nearest, farthest = self._members()
        return Metrics(
            inertia=sum(inertias.values()), inertia_by_split=inertias, n_iter=0, converged=True,
            sizes=results.by_cluster(self.labels, self.what.k), passes=(), scores=(), nearest=nearest,
            farthest=farthest, notes=notes,
        )  # fmt: skip

    def _rows_per_sample(self, split: str) -> int:
        return self.opened[split].rows(self.what.view).rows_per_sample

    def _members(self) -> tuple[tuple[RowRef, ...], tuple[RowRef, ...]]:
        """Rows nearest to and farthest from each center, over all splits."""
        near: list[tuple[float, RowRef]] = []
        far: list[tuple[float, RowRef]] = []
        for split, labels in self.labels.items():
            distances = self.distances[split]
            per_sample = self._rows_per_sample(split)
            ids = self.opened[split].index().column("sample_id")
            order = np.lexsort((np.arange(len(labels)), distances, labels))
            starts = np.searchsorted(labels[order], np.arange(self.what.k + 1))
            for cluster in range(self.what.k):
                mine = order[starts[cluster] : starts[cluster + 1]]
                for rows, found in ((mine[:_NEAREST], near), (mine[::-1][:_FARTHEST], far)):
                    for row in rows.tolist():
                        name = str(ids[row // per_sample]) + (f"[{row % per_sample}]" if per_sample > 1 else "")
                        found.append((float(distances[row]), RowRef(cluster, name, split, float(distances[row]))))
        return _first(near, _NEAREST, 1), _first(far, _FARTHEST, -1)

    def _map(self, sampled: np.ndarray[Any, Any], sample: np.ndarray[Any, Any]) -> Map:
        """Principal axes of at most a few thousand of the sampled rows."""
        most = min(_MAP_ROWS, _MAP_BYTES // (8 * sample.shape[1]), len(sampled))
        kept = np.unique(np.linspace(0, len(sampled) - 1, max(most, 1)).astype(np.int64))
        flat = principal_components(sample[kept])
        split = self.what.fit_split
        labels = self.labels[split][sampled[kept]]
        per_sample = self._rows_per_sample(split)
        ids = (
            self.opened[split]
            .index()
            .column("sample_id")
            .take(columns.numbers(sampled[kept] // per_sample))
            .to_pylist()
        )
        return Map(
            tuple(flat.coordinates[:, 0].tolist()), tuple(flat.coordinates[:, 1].tolist()), tuple(labels.tolist()),
            tuple(ids), flat.explained, len(self.labels[split]),
        )  # fmt: skip


def origin(split: Split, view: str, row: int) -> str:
    """Where a row of a view came from, in words."""
    per_sample = split.rows(view).rows_per_sample
    index = split.index().slice(row // per_sample, 1).to_pylist()[0]
    variable = f", variable {row % per_sample}" if per_sample > 1 else ""
    return f"It comes from shard {index['shard']}, sample {index['shard_row']}{variable}."


def read_truth(truth: Path) -> Known:
    """The classes in a parquet file of split, sample_id, class; BadInput when it is none."""
    try:
        known = pq.read_table(truth.expanduser(), columns=["split", "sample_id", "class"])
    except (OSError, pa.ArrowInvalid, pa.ArrowKeyError, ValueError) as error:
        raise BadInput(f"{truth} is not a table of split, sample_id, class (parquet): {error}.") from error
    return dict(zip(_keys(known), known.column("class").to_pylist(), strict=True))


def _keys(table: pa.Table) -> Iterator[tuple[str, str]]:
    return zip(*(table.column(name).to_pylist() for name in ("split", "sample_id")), strict=True)


def classes_of(known: Known, labels: pa.Table) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(class, label) of each row whose sample has a known class, as two arrays."""
    found = [known.get(key) for key in _keys(labels)]
    have = np.array([c is not None for c in found], dtype=bool)
    names = np.array([str(c) for c in found if c is not None])
    return names, labels.column("label").to_numpy()[have]


def external(known: dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]) -> dict[str, dict[str, float]]:
    """External scores of each split, and last of all rows together ('all') where there are several splits."""
    filled = {name: pair for name, pair in known.items() if len(pair[0])}
    if not filled:
        raise BadInput("no sample of this run has a known class. The table needs the run's split and sample_id.")
    if len(filled) > 1:
        pairs = list(filled.values())
        together = "all" if "all" not in filled else "all splits"
        filled[together] = (np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs]))
    return {
        split: {name: float(entry["value"]) for name, entry in scores.external_scores(classes, labels).items()}
        for split, (classes, labels) in filled.items()
    }


def page(manifest: RunManifest, metrics: Metrics, path: Path) -> report.Report:
    """The report of a run."""
    options = manifest.options
    noun = "row" if options.view == "variable" else "sample"
    return report.Report(
        title=path.name,
        facts=_facts(manifest, metrics),
        command=_command(manifest, path),
        sizes=metrics.sizes,
        passes=tuple(report.PassLine(p.number, p.inertia, p.moved, p.seconds) for p in metrics.passes),
        scores=tuple(report.ScoreLine(s.name, s.value, s.definition, s.basis) for s in metrics.scores),
        points=_points(metrics.map, options.fit_split),
        contingency=_heat(metrics.classes),
        representatives=tuple(report.Member(m.cluster, m.sample_id, m.split, m.distance) for m in metrics.nearest),
        farthest=tuple(report.Member(m.cluster, m.sample_id, m.split, m.distance) for m in metrics.farthest),
        notes=metrics.notes, noun=noun, run_path=str(path), dataset_path=manifest.dataset,
        provenance=_provenance(manifest),
    )  # fmt: skip


def _heat(found: Classes | None) -> report.Contingency | None:
    return None if found is None else report.Contingency(found.names, np.array(found.counts))


def _facts(manifest: RunManifest, metrics: Metrics) -> tuple[tuple[str, str], ...]:
    options = manifest.options
    rows = ", ".join(f"{split} {format_count(n)}" for split, n in manifest.n_rows.items())
    return (
        ("dataset", f"{manifest.dataset} ({manifest.dataset_digest[:12]})"),
        ("rows", f"{rows} x {format_count(manifest.n_columns)} columns (view {options.view})"),
        ("k, metric, engine", f"{options.k}, {options.metric}, {options.engine} (init {options.init})"),
        ("fitted on", options.fit_split or f"the model of run {options.model[:12]}"),
        ("inertia", f"{metrics.inertia:.6e}, the sum of squared distances to the returned centers"),
        ("iterations", f"{metrics.n_iter} ({'converged' if metrics.converged else 'not converged'})"),
        ("passes over the data", f"{manifest.n_passes} ({format_bytes(manifest.bytes_read)} read)"),
        ("time, peak memory", f"{format_seconds(manifest.seconds)}, {format_bytes(manifest.peak_bytes)}"),
        ("seed", str(options.seed)),
        ("scheduler", f"{manifest.scheduler}, {manifest.n_workers} workers"),
    )


def _command(manifest: RunManifest, path: Path) -> str:
    options = manifest.options
    if options.kind == "predict":
        return f"tsclust predict RUN {manifest.dataset} {path}"
    words = [f"tsclust cluster {manifest.dataset} {path} -k {options.k}"]
    words += [
        f"--{name.replace('_', '-')} {getattr(options, name)}"
        for name in ("view", "metric", "engine", "init", "max_iter", "tol", "seed", "fit_split")
    ]
    return " ".join(words)


def _provenance(manifest: RunManifest) -> tuple[tuple[str, str], ...]:
    made = manifest.provenance
    versions = ", ".join(f"{name} {version}" for name, version in made.packages.items())
    job = tuple((name, value) for name, value in made.job.items())
    return (
        ("made", f"{made.created} on {made.host}"),
        ("tsclust", f"{made.tsclust_version}, Python {made.python}, {made.platform}"),
        ("packages", versions),
        ("run digest", manifest.digest),
        *job,
    )


def _points(found: Map | None, split: str) -> report.Points | None:
    if found is None:
        return None
    return report.Points(
        np.array(found.x), np.array(found.y), np.array(found.labels), (split,) * len(found.x), found.explained,
        found.n_total, found.sample_ids,
    )  # fmt: skip


def _fit_scores(fit: Fit, what: RunOptions) -> tuple[Score, ...]:
    n, k = len(fit.labels), what.k
    if what.metric == "cosine":
        # Centers of unit length are no means, so sums of squares do not part into within and between.
        return (Score("mean cosine", 1.0 - fit.inertia / (2 * n), _MEAN_COSINE, "exact"),)
    explained = 1.0 - fit.inertia / fit.total_ss if fit.total_ss > 0 else 0.0
    found = [Score("variance explained", explained, "1 - inertia / total sum of squares", "exact")]
    if 1 < k < n and fit.inertia > 0:
        value = scores.calinski_harabasz(fit.total_ss, fit.inertia, n, k)
        found.append(Score("Calinski-Harabasz", value, scores.CALINSKI_HARABASZ, "exact"))
    return tuple(found)


def _external_scores(named: dict[str, dict[str, float]]) -> tuple[Score, ...]:
    """The adjusted Rand index of each split, and every score of all rows together."""
    whole = list(named)[-1]
    return tuple(
        Score(f"{name} ({split})", value, scores.EXTERNAL[name], "exact")
        for split, values in named.items()
        for name, value in values.items()
        if split == whole or name == "adjusted_rand"
    )


def _contingency(known: dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]], k: int) -> Classes:
    classes = np.concatenate([pair[0] for pair in known.values()])
    labels = np.concatenate([pair[1] for pair in known.values()])
    names, codes = np.unique(classes, return_inverse=True)
    counts = np.zeros((len(names), k), np.int64)
    np.add.at(counts, (codes, labels), 1)
    return Classes(tuple(names.tolist()), tuple(tuple(row) for row in counts.tolist()))


def _first(found: list[tuple[float, RowRef]], n: int, sign: int) -> tuple[RowRef, ...]:
    """The `n` smallest (sign 1) or largest (-1) distances of each cluster, by cluster."""
    by_cluster: dict[int, list[tuple[float, RowRef]]] = {}
    for pair in found:
        by_cluster.setdefault(pair[1].cluster, []).append(pair)
    kept = []
    for cluster in sorted(by_cluster):
        ranked = sorted(by_cluster[cluster], key=lambda p: (sign * p[0], p[1].split, p[1].sample_id))
        kept += [ref for _, ref in ranked[:n]]
    return tuple(kept)
