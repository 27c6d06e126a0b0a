"""Plain results of a clustering run -> one self-contained HTML page.

Invariant: the same `Report` gives the same text, and that text asks nothing of the network: no script, style, font or
image from outside. Whatever a shard is called, its name is shown and never obeyed (autoescaping, and a content policy).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from tsclust_ooc.errors import UsageError
from tsclust_ooc.units import format_count, format_seconds, plural

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MISSING = "n/a"
_page = Environment(loader=PackageLoader("tsclust_ooc"), autoescape=True, undefined=StrictUndefined, trim_blocks=True)


@dataclass(frozen=True)
class PassLine:
    """One pass over the data: number from 1, inertia, fraction (0..1) of rows that changed cluster, seconds."""

    number: int
    inertia: float
    moved_fraction: float
    seconds: float


@dataclass(frozen=True)
class ScoreLine:
    """A score, what it measures in words, and whether it is 'exact' or a 'sample of n' (then its standard error)."""

    name: str
    value: float
    definition: str
    basis: str
    standard_error: float | None = None


@dataclass(frozen=True)
class Member:
    """A row singled out: the cluster it belongs to, its sample, its split, its distance to the center."""

    cluster: int
    sample_id: str
    split: str
    distance: float


@dataclass(frozen=True, eq=False)
class Points:
    """A projection of a sample of rows to the plane, made elsewhere; about 3,000 points make a legible map.

    Attributes
    ----------
    x, y : (n_points,) float arrays, first and second component; points that are not finite are counted, not drawn
    labels : (n_points,) int array, -1 for a row in no cluster
    splits : split of each point
    explained : fractions (0..1) of the variance along x and y
    n_total : rows the sample was drawn from
    sample_ids : id of each point for the hover text, or empty
    """

    x: NDArray[np.floating]
    y: NDArray[np.floating]
    labels: NDArray[np.integer]
    splits: Sequence[str]
    explained: tuple[float, float]
    n_total: int
    sample_ids: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Refuse columns of unequal length."""
        lengths = {len(self.x), len(self.y), len(self.labels), len(self.splits), len(self.sample_ids) or len(self.x)}
        if len(lengths) > 1:
            raise UsageError(
                f"x, y, labels, splits and sample_ids have lengths {sorted(lengths)}. Pass one value a point."
            )


@dataclass(frozen=True, eq=False)
class Contingency:
    """Rows counted by class and cluster: `class_names` (n_classes,), `matrix` (n_classes, n_clusters) int."""

    class_names: tuple[str, ...]
    matrix: NDArray[np.integer]

    def __post_init__(self) -> None:
        """Refuse a matrix that does not have one row a class."""
        if np.ndim(self.matrix) != 2 or len(self.matrix) != len(self.class_names):
            raise UsageError(
                f"a contingency of shape {np.shape(self.matrix)} does not fit {len(self.class_names)} class names. "
                "Pass (n_classes, n_clusters)."
            )


@dataclass(frozen=True, eq=False)
class Report:
    """Everything the page shows. A part that is None or empty has no section.

    Attributes
    ----------
    title : heading of the page
    facts : (name, value) pairs as they shall read: dataset, digest, view, metric, engine, seed, peak memory, ...
    command : the command line that makes this run again
    sizes : rows of each cluster in each split, one tuple of n_clusters counts a split; the first split is the reference
    passes : the history of the fit
    scores : scores with their definitions
    points : the map, or None
    contingency : known classes against clusters, or None
    representatives, farthest : rows nearest to and farthest from each center
    notes : what the reader must know: shards left out, a fit that did not converge, ...
    noun : what a row is: 'sample', or 'row' where a view makes several of a sample
    run_path, dataset_path : where the results lie, for the lines that open them
    provenance : (name, value) pairs: versions, host, job, times
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    command: str
    sizes: Mapping[str, tuple[int, ...]]
    passes: tuple[PassLine, ...] = ()
    scores: tuple[ScoreLine, ...] = ()
    points: Points | None = None
    contingency: Contingency | None = None
    representatives: tuple[Member, ...] = ()
    farthest: tuple[Member, ...] = ()
    notes: tuple[str, ...] = ()
    noun: str = "sample"
    run_path: str = "RUN"
    dataset_path: str = "DATASET"
    provenance: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Refuse splits that disagree about the number of clusters."""
        counts = {split: len(sizes) for split, sizes in self.sizes.items()}
        if len(set(counts.values())) != 1 or 0 in counts.values():
            raise UsageError(f"sizes count {counts or 'no'} clusters. Pass one count a cluster for every split.")

    @property
    def n_clusters(self) -> int:
        """Clusters, empty ones too."""
        return len(next(iter(self.sizes.values())))


def render(report: Report) -> str:
    """The page as HTML text, to be written as UTF-8 into one file.

    Control characters and undecodable bytes in names are shown as escapes, so that the text can always be encoded.
    """
    html = _page.get_template("report.html.j2").render(
        report=report,
        headline=_headline(report),
        bars=[_bar(split, report) for split in report.sizes],
        table=_size_table(report.sizes),
        map=report.points and _map(report.points, report.n_clusters, report.noun),
        curves=_curves(report.passes),
        heat=report.contingency and _heat(report.contingency),
        nearest=_by_cluster(report.representatives),
        farthest=_by_cluster(report.farthest),
    )
    return (
        _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", html).encode("utf-8", "backslashreplace").decode("utf-8")
    )


def format_number(value: float, digits: int = 4, like: float | None = None) -> str:
    """`value` with thousands separators and at least `digits` significant digits; 'n/a' where it is not finite.

    `like` is the largest value of a column: all get as many decimals as it needs, so that their points align.
    """
    if not math.isfinite(value):
        return _MISSING
    size = abs(value if like is None else like)
    exponent = math.floor(math.log10(size)) if size else digits
    if -4 <= exponent < 9:
        return _signed(f"{value:,.{max(0, digits - 1 - exponent)}f}")
    mantissa, power = f"{value:.{digits - 1}e}".split("e")
    return _signed(f"{mantissa} × {_power_of_ten(int(power))}")


def nice_ticks(low: float, high: float, n_ticks: int = 5) -> list[float]:
    """About `n_ticks` round values from `low` to `high` (finite, low < high), in steps of 1, 2, 2.5 or 5 x 10**n."""
    raw = (high - low) / n_ticks
    scale = 10.0 ** math.floor(math.log10(raw))
    step = scale * min((1, 2, 2.5, 5, 10), key=lambda m: abs(math.log(m * scale / raw)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def drift(sizes: Sequence[int], reference: Sequence[int]) -> tuple[float, float] | None:
    """How far the shares of two splits lie apart, and how far chance alone would put them; None if one is empty.

    The first is the total variation distance: the fraction (0..1) of rows that would have to change cluster for the
    shares to agree. The second is its expectation for independent rows of one distribution (normal approximation).
    """
    n, m = sum(sizes), sum(reference)
    if n == 0 or m == 0:
        return None
    counts, others = np.asarray(sizes, float), np.asarray(reference, float)
    pooled = (counts + others) / (n + m)
    chance = np.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m)).sum() / math.sqrt(2 * math.pi)
    return float(np.abs(counts / n - others / m).sum() / 2), float(chance)


def _signed(text: str) -> str:
    return text.replace("-", "−", 1)


def _power_of_ten(power: int) -> str:
    return "10" + str(power).translate(_SUPERSCRIPT)


def _percent(fraction: float, digits: int = 1) -> str:
    return f"{100 * fraction:.{digits}f} %" if math.isfinite(fraction) else _MISSING


def _seconds(seconds: float) -> str:
    return format_seconds(seconds) if math.isfinite(seconds) else _MISSING


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _headline(report: Report) -> str:
    """What came out, in one sentence."""
    totals = [sum(column) for column in zip(*report.sizes.values(), strict=True)]
    n_rows, n_empty = sum(totals), totals.count(0)
    text = f"{plural(len(totals), 'cluster')} of {plural(n_rows, report.noun)}"
    text += f" in {plural(len(report.sizes), 'split')}" if len(report.sizes) > 1 else ""
    if len(totals) > 1 and n_rows:
        text += f": the largest holds {_percent(max(totals) / n_rows)}, the smallest {_percent(min(totals) / n_rows)}"
    return text + (f"; {n_empty} {'is' if n_empty == 1 else 'are'} empty." if n_empty and n_rows else ".")


def _bar(split: str, report: Report) -> dict[str, object]:
    """One split's stacked bar, 900 units wide, and how its shares differ from those of the first split."""
    sizes, reference = report.sizes[split], next(iter(report.sizes))
    total, start, segments = sum(sizes), 0.0, []
    for cluster, size in enumerate(sizes):
        width = 900 * size / total if total else 0.0
        title = f"{split} · cluster {cluster}: {plural(size, report.noun)}, {_percent(_share(size, total))}"
        text = [str(cluster), _percent(size / total, 0)][: 2 if width >= 44 else width >= 18] if size else []
        if size:
            segments.append((cluster, round(start, 2), round(width, 2), title, text))
        start += width
    apart = drift(sizes, report.sizes[reference]) if split != reference and len(sizes) > 1 else None
    return {
        "split": split, "total": total, "segments": segments, "reference": reference, "drift": apart,
        "widest": max(_share(size, max(total, 1)) for size in sizes),
    }  # fmt: skip


def _size_table(sizes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, list[tuple[int, float]], int, float]]:
    """One row a cluster: itself, (count, share) in each split, all its rows, spread of its shares (nan if one)."""
    totals = [sum(split) for split in sizes.values()]
    rows = []
    for cluster, counts in enumerate(zip(*sizes.values(), strict=True)):
        shares = [_share(count, total) for count, total in zip(counts, totals, strict=True)]
        known = [share for share in shares if math.isfinite(share)]
        spread = max(known) - min(known) if len(known) > 1 else math.nan
        rows.append((cluster, list(zip(counts, shares, strict=True)), sum(counts), spread))
    return rows


@dataclass(frozen=True)
class _Axis:
    """A straight scale from data to the picture: `low`..`high` lie at `start`..`stop`; ticks show value / 10**power."""

    low: float
    high: float
    start: float
    stop: float
    power: int = 0

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start), 1)

    def ticks(self, n_ticks: int = 5) -> list[tuple[float, str]]:
        """Position and text of each tick."""
        values = nice_ticks(self.low, self.high, n_ticks)
        step = (values[1] - values[0] if len(values) > 1 else self.high - self.low) / 10**self.power
        digits = next((d for d in range(12) if abs(round(step, d) - step) < 1e-6 * step), 12)
        return [(self(v), _signed(f"{v / 10**self.power + 0.0:,.{digits}f}")) for v in values]


def _axis(values: Iterable[float], start: float, stop: float, margin: float = 0.05) -> _Axis:
    """An axis that holds all of `values` (finite); values that hardly differ are shown as flat, not blown up."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        low, high = low - (abs(low) or 1) * 0.05, high + (abs(high) or 1) * 0.05
    pad = (high - low) * margin
    return _Axis(low - pad, high + pad, start, stop)


def _map(points: Points, n_clusters: int, noun: str) -> dict[str, object]:
    """The scatter: 880 wide, one unit of data equally long on both axes."""
    x, y = np.asarray(points.x, float), np.asarray(points.y, float)
    drawn = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    labels = np.asarray(points.labels)
    across, up, height = _equal_axes(x[drawn], y[drawn])
    marks = [(int(labels[i]), across(x[i]), up(y[i]), _point_title(points, i)) for i in drawn.tolist()]
    present = sorted(set(labels[drawn].tolist()))
    members = {c: drawn[labels[drawn] == c] for c in present if c >= 0}
    names = [(c, across(float(np.median(x[of]))), up(float(np.median(y[of])))) for c, of in members.items()]
    counts = [(c, int((labels == c).sum())) for c in ([-1] if -1 in present else []) + list(range(n_clusters))]
    return {
        "height": height, "marks": marks, "names": names, "counts": counts, "n_lost": len(x) - len(drawn),
        "across": across, "up": up, "basis": f"sample of {format_count(len(x))} of {plural(points.n_total, noun)}",
    }  # fmt: skip


def _point_title(points: Points, i: int) -> str:
    label = int(points.labels[i])
    where = [str(points.sample_ids[i])] if len(points.sample_ids) else []
    return " · ".join([*where, str(points.splits[i]), f"cluster {label}" if label >= 0 else "no cluster"])


def _equal_axes(x: NDArray[np.floating], y: NDArray[np.floating]) -> tuple[_Axis, _Axis, int]:
    """Axes with one scale, and the height of the picture: as flat as the data, within 300..600."""
    across, up = _axis(x.tolist(), 60, 870), _axis(y.tolist(), 0, 1)
    wide, tall = across.high - across.low, up.high - up.low
    inner = min(max(810 * tall / wide, 250), 550)
    unit = max(wide / 810, tall / inner)

    def grown(axis: _Axis, start: float, stop: float) -> _Axis:
        middle, half = (axis.low + axis.high) / 2, abs(stop - start) * unit / 2
        return _Axis(middle - half, middle + half, start, stop)

    return grown(across, 60, 870), grown(up, 10 + inner, 10), round(inner + 60)


def _curves(passes: Sequence[PassLine]) -> list[dict[str, object]]:
    """Two pictures over the same passes, without those that have no finite value: inertia, and the rows that moved."""
    numbers = [p.number for p in passes]
    finite = [p.inertia for p in passes if math.isfinite(p.inertia)]
    top = max(map(abs, finite), default=0)
    power = 3 * (math.floor(math.log10(top)) // 3) if top >= 1e6 or 0 < top < 1e-2 else 0
    inertia, moved = replace(_axis(finite, 190, 16, 0.08), power=power), _Axis(0, 1, 190, 16, power=-2)
    name = f"Inertia (× {_power_of_ten(power)})" if power else "Inertia"
    curves = [
        _curve(name, numbers, [p.inertia for p in passes], inertia, lambda v: format_number(v, 6)),
        _curve("Rows that changed cluster (%)", numbers, [p.moved_fraction for p in passes], moved, _percent),
    ]
    return [curve for curve in curves if curve["dots"]]


def _curve(
    name: str, numbers: Sequence[int], values: Sequence[float], up: _Axis, text: Callable[[float], str]
) -> dict[str, object]:
    """A line broken where a value is missing, with a dot and a hover text at each pass."""
    first, last = min(numbers, default=1), max(numbers, default=1)
    gap = 0.5 if last - first < 12 else 0
    across = _Axis(first - gap, last + gap, 70, 430)
    every = next(m * 10**e for e in range(18) for m in (1, 2, 5) if last - first <= 8 * m * 10**e)
    pairs = groupby(zip(numbers, values, strict=True), lambda pair: math.isfinite(pair[1]))
    runs = [list(run) for known, run in pairs if known]
    says = [f"pass {n}: {text(v)}" for n, v in zip(numbers, values, strict=True)]
    return {
        "name": name, "ticks": up.ticks(), "ends": ", ".join(dict.fromkeys([*says[:1], *says[-1:]])),
        "passes": [(across(n), format_count(n)) for n in numbers if n % every == 0],
        "dots": [(across(n), up(v), f"pass {n}: {text(v)}") for run in runs for n, v in run],
        "lines": [" ".join(f"{across(n)},{up(v)}" for n, v in run) for run in runs if len(run) > 1],
    }  # fmt: skip


def _heat(contingency: Contingency) -> dict[str, object]:
    """Cells of (count, share of its class); clusters run down the page where too many to stand side by side."""
    matrix = np.asarray(contingency.matrix)
    flip = matrix.shape[1] > max(12, matrix.shape[0])
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    counts, share = (matrix.T, share.T) if flip else (matrix, share)
    return {
        "flip": flip, "classes": contingency.class_names, "clusters": range(matrix.shape[1]),
        "rows": [list(zip(*row, strict=True)) for row in zip(counts.tolist(), share.tolist(), strict=True)],
        "row_totals": counts.sum(axis=1).tolist(), "column_totals": counts.sum(axis=0).tolist(),
        "darkest": float(share.max(initial=0)) or 1.0,
    }  # fmt: skip


def _by_cluster(members: Sequence[Member]) -> list[tuple[int, list[tuple[Member, str]]]]:
    """The rows of each cluster in the caller's order, with their distances written to align."""
    largest = max((m.distance for m in members if math.isfinite(m.distance)), default=0.0)
    rows = [(m, format_number(m.distance, like=largest)) for m in sorted(members, key=lambda m: m.cluster)]
    return [(cluster, list(group)) for cluster, group in groupby(rows, lambda row: row[0].cluster)]


_page.filters |= {
    "number": format_number, "count": format_count, "seconds": _seconds, "percent": _percent, "literal": repr,
}  # fmt: skip
