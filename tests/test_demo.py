"""The demo source: the classes' formulas, the files as other programs see them, and one rename or nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from tsclust_ooc.demo import CLASSES, control_chart_series, write_demo
from tsclust_ooc.errors import CannotWrite, TsclustError, UsageError

SMALL = (12, 6, 4)


class Hearing:
    """A listener that keeps what it hears and may do something at the first report."""

    def __init__(self, at_first: Callable[[], object] = lambda: None) -> None:
        self.at_first = at_first
        self.reports: list[tuple[str, int, int]] = []

    def advance(self, stage: str, done: int, total: int) -> None:
        self.reports.append((stage, done, total))
        if len(self.reports) == 1:
            self.at_first()

    def say(self, message: str) -> None:
        raise AssertionError(f"unexpected: {message}")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def items(folder: Path, split: str, ids: list[str]) -> NDArray[np.float32]:
    found = []
    for sample_id in ids:
        with h5py.File(folder / split / f"{sample_id}.h5") as file:
            found.append(file["embeddings"][()])
    return np.stack(found)


def draw(name: str) -> NDArray[np.float64]:
    return control_chart_series(np.full(300, CLASSES.index(name)), 96, np.random.default_rng(8))


def test_normal_series_stay_within_three_deviations_of_thirty() -> None:
    series = draw("normal")
    assert 24 < series.min() < 24.1
    assert 35.9 < series.max() < 36


@pytest.mark.parametrize(("name", "sign"), [("increasing trend", 1), ("decreasing trend", -1)])
def test_trends_rise_or_fall_by_a_fifth_to_a_half_a_step(name: str, sign: int) -> None:
    slopes = sign * np.polyfit(np.arange(96), draw(name).T, 1)[0]
    assert 0.15 < slopes.min() < 0.25
    assert 0.45 < slopes.max() < 0.55


@pytest.mark.parametrize(("name", "sign"), [("upward shift", 1), ("downward shift", -1)])
def test_shifts_step_once_in_the_middle_third(name: str, sign: int) -> None:
    above = sign * (draw(name) - 30)
    assert np.abs(above[:, :32]).max() < 6
    steps = above[:, 64:].mean(axis=1)
    assert 5.5 < steps.min() < 9.5
    assert 18 < steps.max() < 22
    assert np.all(above[:, 64:] > 7.5 - 6)


def test_cycles_have_periods_and_amplitudes_of_ten_to_fifteen() -> None:
    t = np.arange(96)
    for row in draw("cyclic")[:50] - 30:
        periods = np.linspace(8, 18, 201)
        waves = np.sin(2 * np.pi * t / periods[:, None])
        fits = waves @ row / (waves**2).sum(axis=1)
        best = np.argmin(((row - fits[:, None] * waves) ** 2).sum(axis=1))
        assert 9.8 <= periods[best] <= 15.2
        assert 8.5 < fits[best] < 16.5


def test_shards_are_what_h5py_writes_by_default(tmp_path: Path) -> None:
    write_demo(tmp_path / "demo", samples=SMALL)
    path = tmp_path / "demo" / "train" / "11.h5"
    with h5py.File(path) as file:
        dataset = file["embeddings"]
        assert list(file) == ["embeddings"]
        assert (dataset.shape, dataset.dtype, dataset.chunks) == ((7, 768), np.dtype("<f4"), None)
        assert len(dataset.attrs) == len(file.attrs) == 0
        item = dataset[()]
    assert item.min() >= 0
    assert item.max() <= 1
    with h5py.File(tmp_path / "same.h5", "w") as file:
        file.create_dataset("embeddings", data=item)
    assert path.read_bytes() == (tmp_path / "same.h5").read_bytes()


def test_truth_names_every_shard_once_and_classes_are_balanced(tmp_path: Path) -> None:
    summary = write_demo(tmp_path / "demo", samples=SMALL)
    truth = pd.read_parquet(tmp_path / "demo" / "truth.parquet")
    assert list(truth.columns) == ["split", "sample_id", "class"]
    shards = {(path.parent.name, path.stem) for path in (tmp_path / "demo").glob("*/*.h5")}
    assert set(zip(truth["split"], truth["sample_id"], strict=True)) == shards
    assert len(truth) == len(shards) == sum(SMALL)
    assert truth["split"].value_counts().to_dict() == {"train": 12, "val": 6, "test": 4}
    assert truth[truth["split"] == "train"]["class"].value_counts().to_dict() == dict.fromkeys(CLASSES, 2)
    assert (summary.samples, summary.item_shape, summary.reused) == (SMALL, (7, 768), False)
    assert summary.n_bytes == sum(SMALL) * 7 * 768 * 4


def test_one_number_of_samples_is_the_train_split_with_a_quarter_for_each_other(tmp_path: Path) -> None:
    assert write_demo(tmp_path / "demo", samples=9).samples == (9, 2, 2)


def test_k_means_of_scikit_learn_finds_the_classes_again(tmp_path: Path) -> None:
    write_demo(tmp_path / "demo", samples=240, seed=2)
    truth = pd.read_parquet(tmp_path / "demo" / "truth.parquet")
    train = truth[truth["split"] == "train"]
    found = items(tmp_path / "demo", "train", train["sample_id"].tolist())
    samples = KMeans(6, n_init=10, random_state=0).fit_predict(found.reshape(240, -1))
    assert adjusted_rand_score(train["class"], samples) > 0.9
    variables = KMeans(6, n_init=10, random_state=0).fit_predict(found.reshape(-1, 768))
    assert adjusted_rand_score(np.repeat(train["class"], 7), variables) > 0.6


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_demo(tmp_path / name, samples=SMALL, seed=seed)
    first, again, other = (contents(tmp_path / name) for name in "abc")
    assert first == again
    assert first.keys() == other.keys()
    assert first["train/0.h5"] != other["train/0.h5"]


def test_a_demo_that_is_there_is_reused_untouched(tmp_path: Path) -> None:
    first = write_demo(tmp_path / "demo", samples=SMALL)
    before = {path: path.stat() for path in (tmp_path / "demo").rglob("*")}
    again = write_demo(tmp_path / "demo", samples=SMALL)
    assert again.reused
    assert (again.folder, again.samples, again.n_bytes) == (first.folder, first.samples, first.n_bytes)
    after = {path: path.stat() for path in (tmp_path / "demo").rglob("*")}
    assert {p: (s.st_ino, s.st_mtime_ns) for p, s in before.items()} == {
        p: (s.st_ino, s.st_mtime_ns) for p, s in after.items()
    }


def own_file(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")


def plain_file(folder: Path) -> None:
    folder.write_text("mine")


def demo_of_another_seed(folder: Path) -> None:
    write_demo(folder, samples=SMALL, seed=9)


def demo_with_a_shard_removed(folder: Path) -> None:
    write_demo(folder, samples=SMALL)
    (folder / "val" / "3.h5").unlink()


def demo_of_a_later_version(folder: Path) -> None:
    folder.mkdir()
    (folder / "demo.json").write_text('{"format_version": 999}')


@pytest.mark.parametrize(
    ("occupy", "message"),
    [
        (own_file, "is not empty and holds no demo"),
        (plain_file, "cannot be a folder"),
        (demo_of_another_seed, "seed 9; wanted .* seed 0"),
        (demo_with_a_shard_removed, "has 5 shards and the demo had 6"),
        (demo_of_a_later_version, "holds no demo of this version"),
    ],
)
def test_a_taken_name_is_refused_and_left_as_it_was(
    tmp_path: Path, occupy: Callable[[Path], None], message: str
) -> None:
    occupy(tmp_path / "demo")
    before = contents(tmp_path)
    with pytest.raises(CannotWrite, match=message):
        write_demo(tmp_path / "demo", samples=SMALL)
    assert contents(tmp_path) == before


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "my demo").mkdir()
    assert not write_demo(tmp_path / "my demo", samples=SMALL).reused
    assert len(list((tmp_path / "my demo").glob("*/*.h5"))) == sum(SMALL)


@pytest.mark.parametrize("options", [{"samples": 3}, {"samples": 0}, {"samples": (5, 0, 5)}, {"seed": -1}])
def test_samples_or_seeds_that_cannot_be_meant_are_refused(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=str(next(iter(options)))):
        write_demo(tmp_path / "demo", **options)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_up_to_all_shards(tmp_path: Path) -> None:
    hearing = Hearing()
    write_demo(tmp_path / "demo", samples=(60, 6, 4), listener=hearing)
    assert hearing.reports == [("demo", done, 70) for done in (50, 60, 66, 70)]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_demo_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def interrupt() -> None:
        raise error

    with pytest.raises((KeyboardInterrupt, CannotWrite)):
        write_demo(tmp_path / "demo", samples=SMALL, listener=Hearing(interrupt))
    assert list(tmp_path.iterdir()) == []


def test_a_killed_demo_is_absent_and_the_next_run_sweeps_it_up(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from tsclust_ooc.demo import write_demo\n"
        "class Deadly:\n"
        "    def advance(self, stage, done, total): os._exit(9)\n"
        f"write_demo(sys.argv[1], samples={SMALL}, listener=Deadly())\n"
    )
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", script, tmp_path / "demo"], cwd=root, check=False).returncode == 9
    assert not (tmp_path / "demo").exists()
    assert len(list(tmp_path.iterdir())) == 1
    write_demo(tmp_path / "demo", samples=SMALL)
    write_demo(tmp_path / "other", samples=SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo", "other"]
    assert contents(tmp_path / "demo") == contents(tmp_path / "other")


def test_the_unfinished_work_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    found: list[Path] = []
    write_demo(tmp_path / "demo", samples=SMALL, listener=Hearing(lambda: found.extend(tmp_path.iterdir())))
    prefix = found[0].name.removesuffix(str(os.getpid()))
    living = tmp_path / f"{prefix.replace('.demo.', '.later.')}{os.getppid()}"
    living.mkdir()
    write_demo(tmp_path / "later", samples=SMALL)
    assert living.exists()


def test_of_two_writers_the_second_finds_the_first_ones_demo(tmp_path: Path) -> None:
    write_demo(tmp_path / "first", samples=SMALL)
    racing = Hearing(lambda: (tmp_path / "first").rename(tmp_path / "demo"))
    assert write_demo(tmp_path / "demo", samples=SMALL, listener=racing).reused
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_folder_that_is_taken_meanwhile_is_not_touched(tmp_path: Path) -> None:
    racing = Hearing(lambda: own_file(tmp_path / "demo"))
    with pytest.raises(TsclustError, match="holds no demo"):
        write_demo(tmp_path / "demo", samples=SMALL, listener=racing)
    assert contents(tmp_path) == {"demo/thesis.tex": b"mine"}
