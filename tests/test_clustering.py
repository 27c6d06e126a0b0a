"""cluster, predict and evaluate on small datasets: what is published, that it is true, and what is refused."""

import json
import re
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import SIZES, count_reads, publish, rows_of, three_splits
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, v_measure_score

from tsclust_ooc.cluster import starts
from tsclust_ooc.dataset import open_dataset
from tsclust_ooc.dataset import verify as verify_dataset
from tsclust_ooc.errors import BadInput, CannotWrite, UsageError
from tsclust_ooc.pipeline.clustering import (
    ClusterOptions,
    ComputeOptions,
    cluster,
    evaluate,
    predict,
    rewrite_report,
)
from tsclust_ooc.results import open_run

SAMPLES = three_splits()
VIEWS = ("flatten", "variable", "mean")
WIP = "0123456789ab"

# distributed leaves a connection that was being made to a worker when that was killed to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("clustering")


@pytest.fixture(scope="module")
def dataset(place):
    return publish(place, SAMPLES)


@pytest.fixture
def options(tmp_path):
    return ClusterOptions(workers=2, scratch=tmp_path)


def centers_of(run):
    return np.load(run / "model/centers.npy", allow_pickle=False)


def table_of(run, split=None):
    table = pd.read_parquet(run / "labels")
    return table if split is None else table[table["split"] == split].sort_values("row", kind="stable")


def published(folder, **changes):
    """A dataset of the usual samples with some of train's values changed: (index) -> value."""
    samples = {name: x.copy() for name, x in SAMPLES.items()}
    for split, edits in changes.items():
        for index, value in edits.items():
            samples[split][index] = value
    return publish(folder, samples)


# what is published


def test_a_run_holds_labels_model_metrics_manifest_and_report_and_nothing_else(dataset, options, tmp_path):
    cluster(dataset, tmp_path / "run", 4, options)
    found = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert found == {
        "manifest.json", "metrics.json", "report.html", "model/model.json", "model/centers.npy",
        "labels/train.parquet", "labels/val.parquet", "labels/test.parquet",
    }  # fmt: skip
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_its_manifest_says_what_was_done_to_which_dataset(dataset, options, tmp_path):
    done = cluster(dataset, tmp_path / "run", 4, replace(options, seed=3))
    said = json.loads((tmp_path / "run/manifest.json").read_text())
    assert said["dataset_digest"] == json.loads((dataset / "manifest.json").read_text())["digest"]
    assert (said["options"]["k"], said["options"]["seed"], said["options"]["fit_split"]) == (4, 3, "train")
    assert said["n_rows"] == SIZES
    assert said["n_passes"] == done.n_passes
    assert {"numpy", "zarr", "dask"} <= set(said["provenance"]["packages"])
    assert {"bytes_read", "seconds", "peak_bytes"} <= set(said)


@pytest.mark.parametrize("view", VIEWS)
def test_pandas_alone_reads_a_label_for_every_row_of_every_split(dataset, options, tmp_path, view):
    cluster(dataset, tmp_path / "run", 4, replace(options, view=view))
    per_sample = 3 if view == "variable" else 1
    table = table_of(tmp_path / "run")
    variable = ["variable"] if view == "variable" else []
    assert list(table.columns) == ["split", "row", "sample_id", *variable, "label", "distance"]
    assert table["split"].value_counts().to_dict() == {name: n * per_sample for name, n in SIZES.items()}
    assert set(table["label"]) == {0, 1, 2, 3}
    for split, n in SIZES.items():
        mine = table_of(tmp_path / "run", split)
        assert mine["row"].tolist() == np.repeat(np.arange(n), per_sample).tolist()
        assert mine["sample_id"].tolist() == np.repeat(np.arange(n).astype(str), per_sample).tolist()
        if view == "variable":
            assert mine["variable"].tolist() == [0, 1, 2] * n


# true numbers


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("view", VIEWS)
def test_labels_distances_and_inertia_are_those_of_the_returned_centers(dataset, options, tmp_path, view, metric):
    done = cluster(dataset, tmp_path / "run", 5, replace(options, view=view, metric=metric))
    centers = centers_of(tmp_path / "run").astype(np.float64)
    for split, samples in SAMPLES.items():
        expected = cdist(rows_of(samples, view), centers, metric)
        mine = table_of(tmp_path / "run", split)
        np.testing.assert_array_equal(mine["label"], expected.argmin(axis=1))
        np.testing.assert_allclose(mine["distance"], expected.min(axis=1), rtol=1e-6, atol=1e-6)
    nearest = cdist(rows_of(SAMPLES["train"], view), centers, metric).min(axis=1)
    assert done.inertia == pytest.approx((2 * nearest if metric == "cosine" else nearest**2).sum(), rel=1e-6)


@pytest.mark.parametrize("engine", ["lloyd", "dask-ml"])
def test_the_inertia_of_either_engine_is_scikit_learns_for_its_centers(dataset, options, tmp_path, engine):
    done = cluster(dataset, tmp_path / "run", 4, replace(options, engine=engine, view="variable"))
    rows, centers = rows_of(SAMPLES["train"], "variable"), centers_of(tmp_path / "run").astype(np.float64)
    reference = KMeans(4, init=centers, n_init=1, max_iter=1).fit(rows)
    reference.cluster_centers_ = centers
    assert done.inertia == pytest.approx(-reference.score(rows), rel=1e-6)
    np.testing.assert_array_equal(table_of(tmp_path / "run", "train")["label"], reference.predict(rows))
    assert done.sizes == tuple(np.bincount(reference.predict(rows), minlength=4))


def test_the_fit_is_as_good_as_scikit_learns(dataset, options, tmp_path):
    rows = rows_of(SAMPLES["train"], "flatten")
    best = KMeans(5, n_init=20, random_state=0).fit(rows).inertia_
    assert cluster(dataset, tmp_path / "run", 5, options).inertia <= 1.01 * best


def test_squares_beyond_float32_still_give_distances(tmp_path, options):
    dataset = published(tmp_path, train={(7, 1, 3): 1e30})
    done = cluster(dataset, tmp_path / "run", 1, options)
    rows, centers = rows_of(open_dataset(dataset)["train"].array[:], "flatten"), centers_of(tmp_path / "run")
    expected = cdist(rows, centers.astype(np.float64))[:, 0]
    np.testing.assert_allclose(table_of(tmp_path / "run", "train")["distance"], expected, rtol=1e-6)
    assert done.inertia == pytest.approx((expected**2).sum(), rel=1e-6)


# deterministic


def test_workers_repeats_and_other_random_numbers_change_nothing(dataset, options, tmp_path):
    made = []
    for i, workers in enumerate((1, 2, 3, 2)):
        np.random.seed(i)
        made.append(cluster(dataset, tmp_path / f"run{i}", 4, replace(options, workers=workers, view="variable")))
    assert len({one.digest for one in made}) == 1
    first = centers_of(tmp_path / "run0")
    assert all(centers_of(tmp_path / f"run{i}").tobytes() == first.tobytes() for i in range(4))
    assert len({(tmp_path / f"run{i}/labels/val.parquet").read_bytes() for i in range(4)}) == 1


def test_another_seed_may_give_other_labels(dataset, options, tmp_path):
    digests = {cluster(dataset, tmp_path / str(s), 7, replace(options, seed=s, init="random")).digest for s in range(4)}
    assert len(digests) > 1


def test_a_local_cluster_gives_the_same_bits_and_a_report_that_names_our_stages(dataset, options, tmp_path, heard):
    plain = cluster(dataset, tmp_path / "plain", 4, options)
    local = replace(options, scheduler="local", workers=2, memory="3GB")
    made = cluster(dataset, tmp_path / "run", 4, local, heard)
    assert made.digest == plain.digest
    assert centers_of(tmp_path / "run").tobytes() == centers_of(tmp_path / "plain").tobytes()
    assert made.dashboard.startswith("http://127.0.0.1:")
    assert any(made.dashboard in message for message in heard.messages)
    page = (tmp_path / "run/dask-report.html").read_text()
    assert all(stage in page for stage in ("sample-", "lloyd-pass-", "label-val-", "label-test-"))
    assert "dask-report.html" in json.loads((tmp_path / "run/manifest.json").read_text())["files"]
    assert not list((tmp_path / "run").parent.glob("tsclust-*/dask-*"))


# which split is fitted


def test_centers_are_fitted_on_train_where_there_is_one(dataset, options, tmp_path):
    cluster(dataset, tmp_path / "run", 1, options)
    expected = rows_of(SAMPLES["train"], "flatten").mean(axis=0)
    np.testing.assert_allclose(centers_of(tmp_path / "run")[0], expected, rtol=1e-5, atol=1e-6)


def test_centers_are_fitted_on_the_split_that_is_asked_for(dataset, options, tmp_path):
    done = cluster(dataset, tmp_path / "run", 1, replace(options, fit_split="val"))
    expected = rows_of(SAMPLES["val"], "flatten").mean(axis=0)
    np.testing.assert_allclose(centers_of(tmp_path / "run")[0], expected, rtol=1e-5, atol=1e-6)
    assert done.sizes == (SIZES["val"],)
    assert done.splits == SIZES


def test_a_dataset_without_splits_is_fitted_as_a_whole(options, tmp_path):
    dataset = publish(tmp_path, {"all": SAMPLES["val"]})
    done = cluster(dataset, tmp_path / "run", 2, options)
    assert (done.splits, sum(done.sizes)) == ({"all": SIZES["val"]}, SIZES["val"])


def test_an_unknown_split_is_refused_and_the_known_ones_named(dataset, options, tmp_path):
    with pytest.raises(UsageError, match=r"--fit-split nope.*Use one of: train, val, test"):
        cluster(dataset, tmp_path / "run", 2, replace(options, fit_split="nope"))
    assert not (tmp_path / "run").exists()


# passes are counted


@pytest.mark.parametrize("init", ["auto", "k-means++", "k-means||"])
@pytest.mark.parametrize("engine", ["lloyd", "dask-ml"])
def test_the_manifest_counts_the_passes_and_bytes_that_were_read(dataset, options, tmp_path, monkeypatch, init, engine):
    reads = count_reads(monkeypatch)
    done = cluster(dataset, tmp_path / "run", 4, replace(options, init=init, engine=engine))
    opened = open_dataset(dataset)
    passes, n_bytes = Fraction(0), 0  # a start by k-means|| reads a single row besides: a third of a pass
    for (split, block), times in reads.items():
        bounds = opened[split].rows().bounds
        passes += Fraction(times, len(bounds) - 1)
        n_bytes += times * (bounds[block + 1] - bounds[block]) * SAMPLES[split][0].nbytes
    assert (done.n_passes, done.bytes_read) == (int(passes), n_bytes)
    said = json.loads((tmp_path / "run/manifest.json").read_text())
    assert (said["n_passes"], said["bytes_read"]) == (int(passes), n_bytes)


def test_a_fit_costs_a_sample_an_update_each_and_a_pass_for_every_other_split(dataset, options, tmp_path, heard):
    done = cluster(dataset, tmp_path / "run", 4, options, heard)
    metrics = open_run(tmp_path / "run").metrics
    assert done.n_passes == 1 + len(metrics.passes) + 2
    assert len(metrics.passes) in (done.n_iter, done.n_iter + 1)
    assert [m for m in heard.messages if m.startswith("pass 1 ")]
    assert {stage for stage, *_ in heard.steps} == {"sample", "pass", "label val", "label test"}


# data that cannot be clustered


@pytest.mark.parametrize("sampled_rows", [starts.LEAST_SAMPLE_ROWS, 12])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named_by_shard_sample_and_variable_in_the_first_pass(
    options, tmp_path, monkeypatch, value, sampled_rows
):
    monkeypatch.setattr(starts, "LEAST_SAMPLE_ROWS", sampled_rows)
    monkeypatch.setattr(starts, "ROWS_PER_CENTER", 1)
    dataset = published(tmp_path, train={(41, 2, 5): value})
    reads = count_reads(monkeypatch)
    with pytest.raises(BadInput, match=r"1 of 180 rows.*train/41\.h5, sample 0, variable 2"):
        cluster(dataset, tmp_path / "run", 4, replace(options, view="variable"))
    assert max(reads.values()) <= 2  # the sample that centers start from, and one pass
    assert {split for split, _ in reads} == {"train"}
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob(".run.*"))


@pytest.mark.parametrize("engine", ["lloyd", "dask-ml"])
def test_rows_that_are_not_finite_are_counted(options, tmp_path, engine):
    dataset = published(tmp_path, train={(3, 0, 0): np.nan, (50, 1, 1): np.inf})
    with pytest.raises(BadInput, match=r"2 of 60 rows.*row 3\b.*train/3\.h5, sample 0"):
        cluster(dataset, tmp_path / "run", 4, replace(options, engine=engine))


def test_a_bad_row_of_a_split_that_is_only_labelled_is_named_too(options, tmp_path):
    dataset = published(tmp_path, val={(22, 0, 0): np.nan})
    with pytest.raises(BadInput, match=r"val: 1 of 23 rows.*val/22\.h5"):
        cluster(dataset, tmp_path / "run", 4, options)


def test_a_zero_row_has_no_direction_for_cosine(options, tmp_path):
    dataset = published(tmp_path, train={(17, 1): 0.0})
    with pytest.raises(BadInput, match=r"1 of 180 rows are all zero.*train/17\.h5, sample 0, variable 1"):
        cluster(dataset, tmp_path / "run", 3, replace(options, view="variable", metric="cosine"))
    cluster(dataset, tmp_path / "run", 3, replace(options, view="variable"))


def test_more_clusters_than_rows_are_refused_with_both_numbers(dataset, options, tmp_path):
    with pytest.raises(BadInput, match=r"61 clusters cannot be made of 60 rows"):
        cluster(dataset, tmp_path / "run", 61, options)
    assert cluster(dataset, tmp_path / "run", 60, options).inertia == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("k", [0, -3])
def test_less_than_one_cluster_is_no_number_of_clusters(dataset, options, tmp_path, k):
    with pytest.raises(UsageError, match=f"{k} is not a number of clusters"):
        cluster(dataset, tmp_path / "run", k, options)


@pytest.mark.parametrize("engine", ["lloyd", "dask-ml"])
def test_fewer_distinct_rows_than_clusters_are_refused_with_both_numbers(options, tmp_path, engine):
    few = np.repeat(SAMPLES["train"][:4], 6, axis=0)
    dataset = publish(tmp_path, {"all": few})
    with pytest.raises(BadInput, match=r"5 clusters were asked for, but the 24 rows hold only 4 distinct"):
        cluster(dataset, tmp_path / "run", 5, replace(options, engine=engine))
    assert sorted(cluster(dataset, tmp_path / "run", 4, options).sizes) == [6, 6, 6, 6]


def test_constant_data_make_one_cluster_and_no_more(options, tmp_path):
    dataset = publish(tmp_path, {"all": np.full((8, 3, 16), 2.5, np.float32)})
    with pytest.raises(BadInput, match="8 rows hold only 1 distinct"):
        cluster(dataset, tmp_path / "run", 2, options)
    done = cluster(dataset, tmp_path / "run", 1, options)
    assert (done.inertia, done.sizes, done.scores) == (0.0, (8,), {"variance explained": 0.0})


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"view": "sideways"}, "flatten, variable, mean"),
        ({"metric": "manhattan"}, "euclidean, cosine"),
        ({"engine": "magic"}, "lloyd, dask-ml"),
        ({"init": "guess"}, "auto"),
        ({"max_iter": 0}, "--max-iter 0"),
        ({"tol": -1.0}, "--tol -1"),
        ({"tol": float("nan")}, "--tol nan"),
        ({"seed": -1}, "--seed -1"),
        ({"engine": "dask-ml", "metric": "cosine"}, "--engine lloyd"),
    ],
)
def test_an_option_that_cannot_be_meant_is_refused_with_what_can(wrong, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        ClusterOptions(**wrong)


# what lies at the name of the run already


def test_the_same_command_again_finds_its_run_and_reads_nothing(dataset, options, tmp_path, monkeypatch):
    first = cluster(dataset, tmp_path / "run", 4, options)
    reads = count_reads(monkeypatch)
    again = cluster(dataset, tmp_path / "run", 4, replace(options, workers=1))
    assert (first.reused, again.reused) == (False, True)
    assert not reads
    assert replace(again, reused=False, dashboard="") == first


def test_a_run_with_other_options_is_replaced_only_when_told_to(dataset, options, tmp_path):
    old = cluster(dataset, tmp_path / "run", 4, options)
    with pytest.raises(CannotWrite, match="--overwrite"):
        cluster(dataset, tmp_path / "run", 3, options)
    assert open_run(tmp_path / "run").manifest.digest == old.digest
    new = cluster(dataset, tmp_path / "run", 3, replace(options, overwrite=True))
    assert open_run(tmp_path / "run").manifest.digest == new.digest != old.digest
    assert not list(tmp_path.glob(".run.*"))


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_run_is_never_replaced(dataset, options, tmp_path, overwrite):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("years of work")
    (tmp_path / "notes").write_text("more")
    for name in ("thesis", "notes"):
        with pytest.raises(CannotWrite, match="is not a run"):
            cluster(dataset, tmp_path / name, 3, replace(options, overwrite=overwrite))
    assert (tmp_path / "thesis/chapter.tex").read_text() == "years of work"
    assert (tmp_path / "notes").read_text() == "more"


def test_an_empty_folder_becomes_the_run(dataset, options, tmp_path):
    (tmp_path / "run").mkdir()
    cluster(dataset, tmp_path / "run", 3, options)
    assert open_run(tmp_path / "run").manifest.options.k == 3


def test_a_run_below_a_file_is_refused_before_anything_is_read(dataset, options, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    reads = count_reads(monkeypatch)
    with pytest.raises(CannotWrite, match=r"file is not a directory"):
        cluster(dataset, tmp_path / "file/run", 3, options)
    assert not reads


def test_inputs_are_not_written_into(dataset, options, tmp_path):
    for inside in (dataset, dataset / "run"):
        with pytest.raises(UsageError, match="only read from"):
            cluster(dataset, inside, 3, replace(options, overwrite=True))
    cluster(dataset, tmp_path / "run", 3, options)
    with pytest.raises(UsageError, match="only read from"):
        predict(tmp_path / "run", dataset, tmp_path / "run", ComputeOptions(scratch=tmp_path, overwrite=True))
    assert verify_dataset(open_dataset(dataset)) == []


def test_what_killed_runs_left_is_swept_and_what_belongs_to_others_stays(dataset, options, tmp_path):
    left = [tmp_path / f".run.{WIP}.{end}" for end in ("wip", "deleting", f"wip.{WIP}.deleting")]
    kept = [tmp_path / name for name in (f".run.b.{WIP}.wip", f".other.{WIP}.wip", ".run.notes")]
    for folder in (*left, *kept):
        (folder / "labels").mkdir(parents=True)
        (folder / "labels/train.parquet").write_bytes(b"half")
    cluster(dataset, tmp_path / "run", 3, options)
    assert [p for p in left if p.exists()] == []
    assert [p for p in kept if not p.exists()] == []


def test_a_failure_leaves_nothing_behind(dataset, options, tmp_path):
    with pytest.raises(BadInput):
        cluster(dataset, tmp_path / "new/run", 3, replace(options, truth=tmp_path / "absent.parquet"))
    assert not (tmp_path / "new").exists()


# predict


@pytest.mark.parametrize("view", VIEWS)
def test_predicting_the_rows_of_a_fit_gives_its_labels(dataset, options, tmp_path, view):
    cluster(dataset, tmp_path / "run", 4, replace(options, view=view))
    done = predict(tmp_path / "run", dataset, tmp_path / "out", ComputeOptions(scratch=tmp_path, workers=2))
    pd.testing.assert_frame_equal(table_of(tmp_path / "out"), table_of(tmp_path / "run"))
    assert (done.k, done.n_passes, done.splits) == (4, 3, open_run(tmp_path / "run").manifest.n_rows)
    assert sum(sum(sizes) for sizes in open_run(tmp_path / "out").metrics.sizes.values()) == sum(done.splits.values())


def test_new_rows_get_the_nearest_center_and_their_own_inertia(dataset, options, tmp_path):
    cluster(dataset, tmp_path / "run", 4, replace(options, metric="cosine", view="mean"))
    new = three_splits(seed=9, sizes={"all": 31})
    done = predict(tmp_path / "run", publish(tmp_path, new), tmp_path / "out", ComputeOptions(scratch=tmp_path))
    expected = cdist(rows_of(new["all"], "mean"), centers_of(tmp_path / "run").astype(np.float64), "cosine")
    found = table_of(tmp_path / "out")
    np.testing.assert_array_equal(found["label"], expected.argmin(axis=1))
    np.testing.assert_allclose(found["distance"], expected.min(axis=1), atol=1e-6)
    assert done.inertia == pytest.approx(2 * expected.min(axis=1).sum(), rel=1e-6)


@pytest.mark.parametrize(
    ("view", "item"), [("flatten", (3, 8)), ("flatten", (6, 8)), ("flatten", (48,)), ("mean", (3, 8))]
)
def test_rows_with_other_features_are_refused(dataset, options, tmp_path, view, item):
    cluster(dataset, tmp_path / "run", 3, replace(options, view=view))
    other = publish(tmp_path, three_splits(sizes={"train": 12}, item=item))
    with pytest.raises(BadInput, match=re.escape(f"samples {item}") + r".*fitted on \(3, 16\)"):
        predict(tmp_path / "run", other, tmp_path / "out", ComputeOptions(scratch=tmp_path))


def test_rows_with_other_variables_fit_a_model_of_single_variables(dataset, options, tmp_path):
    cluster(dataset, tmp_path / "run", 3, replace(options, view="variable"))
    other = publish(tmp_path, three_splits(sizes={"train": 12}, item=(5, 16)))
    assert predict(tmp_path / "run", other, tmp_path / "out", ComputeOptions(scratch=tmp_path)).splits == {"train": 60}


def test_predictions_are_no_model(dataset, options, tmp_path):
    cluster(dataset, tmp_path / "run", 3, options)
    predict(tmp_path / "run", dataset, tmp_path / "out", ComputeOptions(scratch=tmp_path))
    assert not (tmp_path / "out/model/centers.npy").exists()
    with pytest.raises(BadInput, match="holds predictions, not a model"):
        predict(tmp_path / "out", dataset, tmp_path / "again", ComputeOptions(scratch=tmp_path))


def test_damaged_centers_are_refused(dataset, options, tmp_path):
    cluster(dataset, tmp_path / "run", 3, options)
    path = tmp_path / "run/model/centers.npy"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(BadInput, match=r"centers\.npy is damaged"):
        predict(tmp_path / "run", dataset, tmp_path / "out", ComputeOptions(scratch=tmp_path))


# evaluate and report


def truth_of(path, samples=SAMPLES, split_name=lambda s: s):
    """A truth table with one class in five, by the sign of values: not the clusters, but related to them."""
    rows = [
        (split_name(split), str(i), f"class {int(x[0, 0] > 0)}{int(x[1, 0] > 0)}")
        for split, many in samples.items()
        for i, x in enumerate(many)
    ]
    pq.write_table(pa.table(dict(zip(("split", "sample_id", "class"), zip(*rows, strict=True), strict=True))), path)
    return pd.DataFrame(rows, columns=["split", "sample_id", "class"])


@pytest.mark.parametrize("view", ["flatten", "variable"])
def test_scores_against_known_classes_are_scikit_learns(dataset, options, tmp_path, view):
    cluster(dataset, tmp_path / "run", 4, replace(options, view=view))
    truth = truth_of(tmp_path / "truth.parquet")
    found = evaluate(tmp_path / "run", tmp_path / "truth.parquet")
    joined = table_of(tmp_path / "run").merge(truth, on=["split", "sample_id"])
    assert list(found) == [*SIZES, "all"]
    for split, values in found.items():
        mine = joined if split == "all" else joined[joined["split"] == split]
        for name, score in (
            ("adjusted_rand", adjusted_rand_score), ("adjusted_mutual_info", adjusted_mutual_info_score),
            ("v_measure", v_measure_score),
        ):  # fmt: skip
            assert values[name] == pytest.approx(score(mine["class"], mine["label"]), abs=1e-12)


def test_a_truth_without_our_samples_is_refused(dataset, options, tmp_path):
    cluster(dataset, tmp_path / "run", 4, options)
    truth_of(tmp_path / "truth.parquet", split_name=lambda split: f"{split}-old")
    with pytest.raises(BadInput, match="no sample of this run has a known class"):
        evaluate(tmp_path / "run", tmp_path / "truth.parquet")


@pytest.mark.parametrize("content", [b"split,sample_id,class\n", b"", None])
def test_a_truth_that_is_no_such_table_is_refused_before_anything_is_read(
    dataset, options, tmp_path, monkeypatch, content
):
    path = tmp_path / "truth"
    if content is None:
        pq.write_table(pa.table({"split": ["train"], "id": ["0"], "class": ["a"]}), path)
    else:
        path.write_bytes(content)
    reads = count_reads(monkeypatch)
    with pytest.raises(BadInput, match="truth is not a table of split, sample_id, class"):
        cluster(dataset, tmp_path / "run", 4, replace(options, truth=path))
    assert not reads


def test_a_report_asks_nothing_of_the_network_and_can_be_written_again(dataset, options, tmp_path):
    truth_of(tmp_path / "truth.parquet")
    cluster(dataset, tmp_path / "run", 4, replace(options, truth=tmp_path / "truth.parquet"))
    page = (tmp_path / "run/report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(\s*["']?http""", page)
    assert "<script" not in page
    assert rewrite_report(tmp_path / "run") == tmp_path / "run-report.html"
    assert (tmp_path / "run-report.html").read_text() == page
    assert rewrite_report(tmp_path / "run", tmp_path / "mine.html").read_text() == page
    with pytest.raises(CannotWrite, match="is not a directory"):
        rewrite_report(tmp_path / "run", tmp_path / "absent/mine.html")
