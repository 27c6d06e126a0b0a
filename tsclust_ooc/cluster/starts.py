"""Initial centers, chosen with few reads of the data.

Invariant: a start depends on the rows, their bounds and the seed, never on workers; where
there are fewer than k distinct rows, that is found out by looking at all of them and said, never guessed from a sample.

Passes: auto, k-means++ and random read at most once (fewer where the sample lies in few blocks); k-means|| reads once a
round and once for the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tsclust_ooc.cluster import INITS
from tsclust_ooc.cluster.fused import Assigned, Fused, Metric, check_rows, fused, unit
from tsclust_ooc.cluster.lloyd import assign, lloyd, rounding_floor, starting_centers
from tsclust_ooc.errors import BadInput, UsageError
from tsclust_ooc.passes import Mapper, Rows, Tally, as_rows, gather, one_pass, working_dtype
from tsclust_ooc.units import format_count, plural

SAMPLE_BYTES = 64 * 2**20
ROWS_PER_CENTER = 256
"""Sampled rows a center; more changes the found centers little (the figure faiss trains with)."""
LEAST_SAMPLE_ROWS = 4096
N_ROUNDS = 5
N_TRIES, TRY_ITERATIONS, SETTLE_ITERATIONS = 4, 4, 30


@dataclass(frozen=True)
class Start:
    """How initial centers are chosen."""

    init: Any = "auto"
    metric: Metric = "euclidean"
    seed: int = 0
    oversampling_factor: float = 2
    n_rounds: int = N_ROUNDS
    sample_bytes: int = SAMPLE_BYTES


@dataclass(frozen=True)
class _Reader:
    """The rows, and how they are read."""

    rows: Rows
    mapper: Mapper
    tally: Tally | None

    def gather(self, indices: np.ndarray) -> np.ndarray:
        return gather(self.rows, indices, mapper=self.mapper, tally=self.tally)


def initial_centers(
    rows: Rows,
    k: int,
    start: Start,
    *,
    mapper: Mapper = map,
    local: Mapper = map,
    tally: Tally | None = None,
    sample: np.ndarray | None = None,
) -> np.ndarray:
    """`k` centers to start from, shape (k, columns), in the type the rows are read as.

    `start.init` is "auto" (on a uniform sample: greedy k-means++ a few times, the best by Lloyd until it hardly moves),
    "k-means++" (once, without Lloyd), "random" (k rows), "k-means||" (Bahmani et al. 2012, Scalable K-Means++,
    VLDB 5), or an array of centers. `local` maps work on the in-memory sample and has to stay in this process.
    `sample` is one that the caller drew already (`sample_indices` of `sample_size` rows): then nothing is read for it.

    Raises UsageError for options, BadInput for more centers than (distinct) rows, NonFiniteRows and ZeroRows.
    """
    check_k(k, rows.n_rows)
    if not isinstance(start.init, str):
        return _given(rows, k, start)
    reader, rng = _Reader(rows, mapper, tally), np.random.default_rng(start.seed)
    if start.init == "k-means||":
        return _parallel(reader, k, start, rng)
    if start.init == "random":
        return _usable(reader, sample_rows(rows, k, start.seed, mapper=mapper, tally=tally), start.metric)
    if start.init not in INITS:
        raise UsageError(f"init={start.init!r} is not known. Use one of {', '.join(INITS)}, or an array of centers.")
    if sample is None:
        n = sample_size(rows, k, start.sample_bytes)
        sample = sample_rows(rows, n, start.seed, mapper=mapper, tally=tally)
    sample = _usable(reader, sample, start.metric)
    centers: np.ndarray = sample[kmeans_plus_plus(sample, k, rng)]
    if len(centers) < k:
        return _with_far_rows(reader, centers, k, start.metric, rng)
    if start.init == "k-means++":
        return centers
    return _settled(sample, centers, start.metric, rng, local)


def _settled(
    sample: np.ndarray, centers: np.ndarray, metric: Metric, rng: np.random.Generator, local: Mapper
) -> np.ndarray:
    """Centers that hardly move on the sample: the best of a few short tries from k-means++, then Lloyd.

    One start may end in a poor local optimum; a few tries on the sample cost less than one pass over large data.
    """
    rows, k = as_rows(sample), len(centers)
    tries = []
    for number in range(N_TRIES):
        if number:
            centers = sample[kmeans_plus_plus(sample, k, rng)]
        tries.append(lloyd(rows, centers, metric=metric, max_iter=TRY_ITERATIONS, mapper=local))
    best = min(tries, key=lambda found: found.inertia)
    return lloyd(rows, best.centers, metric=metric, max_iter=SETTLE_ITERATIONS, mapper=local).centers


def check_k(k: int, n_rows: int) -> None:
    """Raise UsageError when `k` is no number of clusters, BadInput when there are fewer rows than that."""
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise UsageError(f"n_clusters={k!r} is not a number of clusters. Use a whole number, 1 or more.")
    if k > n_rows:
        wanted, there = plural(int(k), "cluster"), plural(n_rows, "row")
        raise BadInput(f"{wanted} cannot be made of {there}. Use n_clusters <= {n_rows}.")


def sample_rows(rows: Rows, n: int, seed: int, *, mapper: Mapper = map, tally: Tally | None = None) -> np.ndarray:
    """`n` rows drawn uniformly without replacement, in ascending order, shape (n, columns); all if `n` is more."""
    return gather(rows, sample_indices(rows.n_rows, n, seed), mapper=mapper, tally=tally)


def sample_indices(n_rows: int, n: int, seed: int) -> np.ndarray:
    """Which of `n_rows` rows `sample_rows` draws: `n` of them, ascending; all if `n` is more."""
    if n >= n_rows:
        return np.arange(n_rows)
    return np.sort(np.random.default_rng(seed).choice(n_rows, n, replace=False, shuffle=False))


def kmeans_plus_plus(x: np.ndarray, k: int, rng: np.random.Generator, weights: np.ndarray | None = None) -> np.ndarray:
    """Indices of `k` rows of `x` by greedy k-means++; fewer when `x` holds fewer distinct rows than `k`.

    Arthur & Vassilvitskii 2007 (k-means++: the advantages of careful seeding): each next row is the best of 2 + log(k)
    drawn with probability proportional to weight times squared distance to the rows chosen so far.
    """
    weights = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
    floor = rounding_floor(x, x.dtype, len(x))
    centered = x - x.mean(axis=0, dtype=np.float64).astype(x.dtype)
    norms = np.einsum("ij,ij->i", centered, centered, dtype=np.float64)
    chosen = [int(rng.choice(len(x), p=weights / weights.sum()))]
    closest = _distances_to(centered, chosen[0], floor)
    while len(chosen) < k:
        mass = np.cumsum(weights * closest)
        if not mass[-1] > 0:
            break
        drawn = np.searchsorted(mass, rng.random(2 + int(np.log(k))) * mass[-1], side="right")
        drawn = np.minimum(drawn, np.searchsorted(mass, mass[-1]))  # rounding may reach past the last row with mass
        # Products are good enough to compare the candidates; the chosen one's distances are then taken exactly.
        with np.errstate(over="ignore", invalid="ignore"):  # rows near the end of float32: then the draw decides alone
            rough = norms[:, None] + norms[drawn] - 2 * (centered @ centered[drawn].T)
            best = drawn[np.argmin(weights @ np.clip(rough, 0, closest[:, None]))]
        chosen.append(int(best))
        closest = np.minimum(closest, _distances_to(centered, chosen[-1], floor))
    return np.array(chosen)


def _distances_to(x: np.ndarray, chosen: int, floor: np.ndarray, tile: int = 1024) -> np.ndarray:
    """Squared distances of the rows of `x` to one of them; exactly 0 for a row that equals it to rounding."""
    distances = np.empty(len(x))
    for top in range(0, len(x), tile):
        gap = x[top : top + tile] - x[chosen]
        distances[top : top + tile] = np.einsum("ij,ij->i", gap, gap)
    distances[distances <= floor] = 0
    return distances


def sample_size(rows: Rows, k: int, sample_bytes: int = SAMPLE_BYTES) -> int:
    """Rows that centers start from: some hundreds a center, as far as `sample_bytes` hold them; at least k."""
    row_bytes = rows.n_columns * working_dtype(rows.dtype).itemsize
    wanted = max(ROWS_PER_CENTER * k, LEAST_SAMPLE_ROWS)
    return int(max(k, min(wanted, sample_bytes // row_bytes)))


def _given(rows: Rows, k: int, start: Start) -> np.ndarray:
    shape = np.shape(start.init)
    if shape != (k, rows.n_columns):
        raise UsageError(
            f"init holds centers of shape {shape}. Wanted: ({k}, {rows.n_columns}), n_clusters x columns of the rows."
        )
    return starting_centers(rows, start.init, start.metric)


def _usable(reader: _Reader, x: np.ndarray, metric: Metric) -> np.ndarray:
    """`x` as the metric sees it. A row that cannot be used ends in the error that counts all of them."""
    usable = np.isfinite(x).all() and (metric == "euclidean" or x.any(axis=1).all())
    if not usable:
        assign(reader.rows, np.eye(1, reader.rows.n_columns), metric=metric, mapper=reader.mapper, tally=reader.tally)
    return unit(x) if metric == "cosine" else x


def _with_far_rows(
    reader: _Reader, centers: np.ndarray, k: int, metric: Metric, rng: np.random.Generator
) -> np.ndarray:
    """`k` distinct rows when the sample held only `centers`: the farthest of all rows join them, a pass a time.

    When a pass finds every row on a row already chosen, their number is known exactly.
    """
    while len(centers) < k:
        found = _pass_with(reader, fused(centers, metric, centers.dtype))
        order = np.argsort(found.far_rows)
        far = _usable(reader, reader.gather(found.far_rows[order]), metric)
        apart = found.far_distances[order] > rounding_floor(far, centers.dtype)
        if not apart.any():
            raise BadInput(
                f"{plural(k, 'cluster')} were asked for, but the {format_count(reader.rows.n_rows)} rows hold only "
                f"{format_count(len(centers))} distinct ones. Use n_clusters <= {len(centers)}."
            )
        more = np.concatenate([centers, far[apart]])
        centers = more[kmeans_plus_plus(more, k, rng)]
    return centers


def _pass_with(reader: _Reader, kernel: Fused) -> Assigned:
    found = one_pass(kernel, reader.rows, mapper=reader.mapper, tally=reader.tally)
    check_rows(found, reader.rows.n_rows)
    return found


@dataclass(frozen=True)
class _Drawn:
    """Rows drawn so far, by ascending key, and the pass's own findings."""

    keys: np.ndarray
    x: np.ndarray
    found: Assigned


@dataclass(frozen=True)
class _Draw:
    """The kernel of a k-means|| round: `n` rows drawn in proportion to their squared distance to the candidates.

    Exponential keys make it one pass (Efraimidis & Spirakis 2006, weighted random sampling with a reservoir): the n
    least of e / weight, e ~ Exp(1), are a weighted sample without replacement. Keys are seeded by the row's position.
    """

    nearest: Fused
    n: int
    seed: tuple[int, ...]

    def chunk(self, x: np.ndarray, start: int) -> tuple[_Drawn, None]:
        """Draw among rows `x`."""
        found, (_, distances) = self.nearest.chunk(x, start)
        noise = np.random.default_rng([*self.seed, start]).exponential(size=len(x))
        apart = np.flatnonzero(distances > 0)
        keys = noise[apart] / distances[apart]
        least = np.argsort(keys, kind="stable")[: self.n]
        return _Drawn(keys[least], x[apart[least]], _light(found)), None

    def combine(self, a: _Drawn, b: _Drawn) -> _Drawn:
        """The draw among the rows of both."""
        keys = np.concatenate([a.keys, b.keys])
        least = np.argsort(keys, kind="stable")[: self.n]
        return _Drawn(keys[least], np.concatenate([a.x, b.x])[least], self.nearest.combine(a.found, b.found))


def _light(found: Assigned) -> Assigned:
    """`found` without the sums, which a round of drawing does not need to send."""
    return replace(found, sums=np.zeros((len(found.counts), 0)))


def _parallel(reader: _Reader, k: int, start: Start, rng: np.random.Generator) -> np.ndarray:
    """k-means||: draw far rows in rounds, weight these candidates by the rows they attract, k-means++ on them."""
    n_draws = max(1, round(start.oversampling_factor * k))
    candidates = _usable(reader, reader.gather(rng.integers(reader.rows.n_rows, size=1)), start.metric)
    for number in range(start.n_rounds):
        nearest = fused(candidates, start.metric, candidates.dtype)
        draw = _Draw(nearest, n_draws, (start.seed, number))
        drawn = one_pass(draw, reader.rows, mapper=reader.mapper, tally=reader.tally)
        check_rows(drawn.found, reader.rows.n_rows)
        if not len(drawn.x):
            break
        far = unit(drawn.x) if start.metric == "cosine" else drawn.x
        candidates = np.concatenate([candidates, far])
    attracted = _pass_with(reader, fused(candidates, start.metric, candidates.dtype)).counts
    kept = attracted > 0
    candidates = candidates[kept]
    chosen = kmeans_plus_plus(candidates, k, rng, attracted[kept].astype(np.float64))
    return _with_far_rows(reader, candidates[chosen], k, start.metric, rng)
