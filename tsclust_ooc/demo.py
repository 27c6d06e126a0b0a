"""Write a labelled demo source: control-chart series, embedded, as one small HDF5 shard a sample.

    demo/  train/0.h5 ...  val/0.h5 ...  test/0.h5 ...   `embeddings` (7, 768) float32
           truth.parquet                                 split, sample_id, class
           demo.json                                     what it was made from

Invariant: however its process ends, the folder is absent or complete, and it is never overwritten; the same seed and
samples give the same bytes.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tsclust_ooc import columns, files, records
from tsclust_ooc.encoders.rocket import Rocket
from tsclust_ooc.errors import BadInput, CannotWrite, UsageError
from tsclust_ooc.progress import Listener, silent

CLASSES = ("normal", "cyclic", "increasing trend", "decreasing trend", "upward shift", "downward shift")
SPLITS = ("train", "val", "test")
N_VARIABLES = 7
N_STEPS = 96
N_FEATURES = 768
KEY = "embeddings"

_RECORD = "demo.json"
_RECORD_VERSION = 1
_REPORT_EVERY = 50  # shards
_SHARD_BYTES = N_VARIABLES * N_FEATURES * 4


@dataclass(frozen=True)
class DemoSummary:
    """What lies in a demo folder; `samples` counts train, val and test, `reused` says that it was there before."""

    folder: Path
    seed: int
    samples: tuple[int, int, int]
    item_shape: tuple[int, int]
    classes: tuple[str, ...]
    n_bytes: int
    reused: bool


@dataclass(frozen=True)
class _Recipe:
    """All that decides the bytes of a demo: its record on disk."""

    source: str
    seed: int
    samples: tuple[int, int, int]
    n_variables: int
    n_steps: int
    n_features: int


def write_demo(
    folder: Path | str,
    *,
    samples: int | tuple[int, int, int] = (1200, 300, 300),
    seed: int = 0,
    listener: Listener = silent,
) -> DemoSummary:
    """Write the demo source into `folder`, or find that it is there already.

    Parameters
    ----------
    folder : a name that is free, an empty folder, or a demo written with the same `samples` and `seed`.
    samples : counts for train, val and test; one number N is the train samples, with N // 4 each for val and test.
    seed : of the series and of the encoder's kernels; not negative.
    listener : hears stage ``demo``, in shards.

    Raises
    ------
    UsageError
        A split would be empty, or the seed is negative.
    CannotWrite
        `folder` holds something else, or there is no room or permission.
    """
    recipe = _recipe(samples, seed)
    folder = Path(folder).resolve()
    with files.naming_the_place(folder):
        if _is_free(folder):
            return _write_new(folder, recipe, listener)
        return _reuse(folder, recipe)


def control_chart_series(classes: NDArray[np.integer], n_steps: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """One series for each entry of `classes`, an index into `CLASSES`: (n, n_steps) float64.

    The formulas and ranges of Alcock & Manolopoulos (1999), "Time-series similarity queries employing a feature-based
    approach": m + r s with m = 30, s = 2, r in (-3, 3); plus a sin(2 pi t / T) with a, T in [10, 15] (cyclic); plus or
    minus g t with g in [0.2, 0.5] (trends); plus or minus x in [7.5, 20] from step t3 in [n/3, 2n/3] on (shifts).
    """
    n = len(classes)
    is_class = (np.asarray(classes)[:, None] == np.arange(len(CLASSES))).astype(np.float64)
    _, cyclic, increasing, decreasing, upward, downward = is_class.T[:, :, None]
    t = np.arange(n_steps, dtype=np.float64)

    def each(low: float, high: float) -> NDArray[np.float64]:
        return rng.uniform(low, high, (n, 1))

    noise = 2.0 * rng.uniform(-3, 3, (n, n_steps))
    cycle = each(10, 15) * np.sin(2 * np.pi * t / each(10, 15))
    trend = each(0.2, 0.5) * t
    shift = each(7.5, 20) * (t >= each(n_steps / 3, 2 * n_steps / 3))
    series: NDArray[np.float64] = 30.0 + noise + cyclic * cycle
    series += (increasing - decreasing) * trend + (upward - downward) * shift
    return series


def _recipe(samples: int | tuple[int, int, int], seed: int) -> _Recipe:
    counts = (samples, samples // 4, samples // 4) if isinstance(samples, int) else samples
    if len(counts) != len(SPLITS) or min(counts) < 1:
        raise UsageError(
            f"samples {samples} leave a split empty. "
            "Use 4 or more (train; a quarter of it each for val and test), or three counts of 1 or more."
        )
    if seed < 0:
        raise UsageError(f"seed {seed} is negative. Use 0 or more.")
    return _Recipe("control-chart", seed, (counts[0], counts[1], counts[2]), N_VARIABLES, N_STEPS, N_FEATURES)


def _summary(folder: Path, recipe: _Recipe, *, reused: bool) -> DemoSummary:
    item_shape = (recipe.n_variables, recipe.n_features)
    n_bytes = sum(recipe.samples) * _SHARD_BYTES
    return DemoSummary(folder, recipe.seed, recipe.samples, item_shape, CLASSES, n_bytes, reused)


def _is_free(folder: Path) -> bool:
    """Whether `folder` is absent or an empty directory."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except FileNotFoundError:
        return True
    except NotADirectoryError as error:
        raise CannotWrite(
            f"{folder} cannot be a folder: it is a file, or lies below one. Choose another name."
        ) from error


def _reuse(folder: Path, recipe: _Recipe) -> DemoSummary:
    """The summary of the demo in `folder`, if it is what `recipe` makes; CannotWrite otherwise."""
    try:
        found = records.load(folder / _RECORD, _Recipe, _RECORD_VERSION)
    except (FileNotFoundError, BadInput) as error:
        raise CannotWrite(
            f"{folder} is not empty and holds no demo of this version; nothing there was touched. "
            "Choose another folder, or empty it."
        ) from error
    if found != recipe:
        raise CannotWrite(
            f"{folder} holds a demo of samples {found.samples}, seed {found.seed}; "
            f"wanted samples {recipe.samples}, seed {recipe.seed}. Choose another folder, or remove it first."
        )
    for split, n_samples in zip(SPLITS, recipe.samples, strict=True):
        n_found = sum(path.suffix == ".h5" for path in (folder / split).glob("*"))
        if n_found != n_samples:
            raise CannotWrite(
                f"{folder / split} has {n_found} shards and the demo had {n_samples}: it was changed since. "
                f"Remove {folder} and run the same command again, or choose another folder."
            )
    return _summary(folder, recipe, reused=True)


def _write_new(folder: Path, recipe: _Recipe, listener: Listener) -> DemoSummary:
    """Write all of the demo in a sibling directory, then give it its name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    work = folder.with_name(f"{_work_prefix(folder)}{os.getpid()}")
    work.mkdir()
    try:
        _fill(work, recipe, listener)
        try:
            os.rename(work, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            return _reuse(folder, recipe)  # another process was first
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return _summary(folder, recipe, reused=False)


def _work_prefix(folder: Path) -> str:
    return f".{folder.name}.demo-{socket.gethostname()}-"


def _sweep(folder: Path) -> None:
    """Remove unfinished demos for `folder` whose process on this host is gone (or is this one, and has ended them)."""
    prefix = _work_prefix(folder)
    for path in [path for path in folder.parent.iterdir() if path.name.startswith(prefix)]:
        pid = path.name.removeprefix(prefix)
        if pid.isdigit() and (int(pid) == os.getpid() or not _is_alive(int(pid))):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _fill(work: Path, recipe: _Recipe, listener: Listener) -> None:
    """Write shards, truth and record into `work`, the record last."""
    encoder: Rocket | None = None
    truth: list[tuple[str, str, str]] = []
    for number, (split, n_samples) in enumerate(zip(SPLITS, recipe.samples, strict=True)):
        rng = np.random.default_rng([recipe.seed, number])
        labels = rng.permutation(np.arange(n_samples) % len(CLASSES))
        series = _z_scored(control_chart_series(np.repeat(labels, N_VARIABLES), N_STEPS, rng))
        encoder = encoder or Rocket.fit(series, width=N_FEATURES, seed=recipe.seed)
        items = encoder.encode(series).reshape(n_samples, N_VARIABLES, N_FEATURES)
        (work / split).mkdir()
        for i in _counted(n_samples, len(truth), sum(recipe.samples), listener):
            _write_shard(work / split / f"{i}.h5", items[i])
        truth += [(split, str(i), CLASSES[label]) for i, label in enumerate(labels)]
    _write_truth(work / "truth.parquet", truth)
    records.save(work / _RECORD, recipe, _RECORD_VERSION)


def _z_scored(series: NDArray[np.float64]) -> NDArray[np.float64]:
    scaled: NDArray[np.float64] = (series - series.mean(axis=1, keepdims=True)) / series.std(axis=1, keepdims=True)
    return scaled


def _counted(n: int, done: int, total: int, listener: Listener) -> Iterator[int]:
    """0 ... n - 1, telling `listener` now and then that all handed out before are finished."""
    for i in range(n):
        yield i
        if (i + 1) % _REPORT_EVERY == 0 or i + 1 == n:
            listener.advance("demo", done + i + 1, total)


def _write_shard(path: Path, item: NDArray[np.float32]) -> None:
    """The three lines with which TimeKD's extraction writes an embedding."""
    with h5py.File(path, "w") as file:
        file.create_dataset(KEY, data=item)


def _write_truth(path: Path, rows: list[tuple[str, str, str]]) -> None:
    named = zip(("split", "sample_id", "class"), zip(*rows, strict=True), strict=True)
    pq.write_table(columns.table({name: columns.text(values) for name, values in named}), path)
