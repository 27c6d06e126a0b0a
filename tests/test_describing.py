"""What a run says of itself: scores, members, the map, the page, and where a row came from."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import SIZES, publish, rows_of, three_splits
from scipy.spatial.distance import cdist
from sklearn.metrics import adjusted_rand_score, calinski_harabasz_score
from sklearn.metrics.cluster import contingency_matrix

from tsclust_ooc import report
from tsclust_ooc.dataset import open_dataset
from tsclust_ooc.errors import BadInput
from tsclust_ooc.pipeline.clustering import ClusterOptions, cluster, predict
from tsclust_ooc.pipeline.describing import classes_of, external, origin, page, read_truth
from tsclust_ooc.results import open_run

SAMPLES = three_splits()
K = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("describing")


@pytest.fixture(scope="module")
def dataset(place):
    return publish(place, SAMPLES)


@pytest.fixture(scope="module")
def options(place):
    return ClusterOptions(workers=2, scratch=place)


@pytest.fixture(scope="module")
def truth(place):
    """One class in three for train and val; test has none."""
    rows = [(split, str(i), "abc"[i % 3]) for split in ("train", "val") for i in range(SIZES[split])]
    columns = zip(*rows, strict=True)
    pq.write_table(pa.table(dict(zip(("split", "sample_id", "class"), columns, strict=True))), place / "truth.parquet")
    return place / "truth.parquet"


@pytest.fixture(scope="module", params=["flatten", "variable"])
def run(request, dataset, place, options, truth):
    cluster(dataset, place / request.param, K, replace(options, view=request.param, truth=truth))
    return open_run(place / request.param)


def rows_and_labels(run, split):
    return rows_of(SAMPLES[split], run.manifest.options.view), run.labels(split).column("label").to_numpy()


# scores


def test_calinski_harabasz_and_explained_variance_are_exact(run):
    x, labels = rows_and_labels(run, "train")
    scores = {score.name: score for score in run.metrics.scores}
    assert scores["Calinski-Harabasz"].value == pytest.approx(calinski_harabasz_score(x, labels), rel=1e-5)
    total = ((x - x.mean(axis=0)) ** 2).sum()
    assert scores["variance explained"].value == pytest.approx(1 - run.metrics.inertia / total, rel=1e-6)
    assert {score.basis for score in run.metrics.scores} == {"exact"}
    assert all(score.definition for score in run.metrics.scores)


def test_cosine_has_a_score_of_its_own_and_none_that_sums_of_squares_do_not_give(dataset, place, options):
    cluster(dataset, place / "cosine", K, replace(options, metric="cosine"))
    run = open_run(place / "cosine")
    x = rows_of(SAMPLES["train"], "flatten")
    nearest = cdist(x, run.centers().astype(np.float64), "cosine").min(axis=1)
    assert [score.name for score in run.metrics.scores] == ["mean cosine"]
    assert run.metrics.scores[0].value == pytest.approx((1 - nearest).mean(), rel=1e-6)


def test_inertia_is_given_for_every_split(run):
    centers = run.centers().astype(np.float64)
    for split in SIZES:
        x, _ = rows_and_labels(run, split)
        expected = (cdist(x, centers).min(axis=1) ** 2).sum()
        assert run.metrics.inertia_by_split[split] == pytest.approx(expected, rel=1e-6)


def test_the_passes_of_a_fit_come_down_to_its_inertia(run):
    inertias = [one.inertia for one in run.metrics.passes]
    assert inertias == sorted(inertias, reverse=True)
    assert inertias[-1] == run.metrics.inertia
    assert (run.metrics.passes[0].moved, run.metrics.passes[0].number) == (1.0, 1)


# members and map


def test_the_rows_nearest_and_farthest_are_those_of_a_sorted_table(run):
    table = run.labels().to_pandas()
    if "variable" in table:
        table["sample_id"] += "[" + table["variable"].astype(str) + "]"
    for found, ascending in ((run.metrics.nearest, True), (run.metrics.farthest, False)):
        for k in range(K):
            mine = table[table["label"] == k].sort_values("distance", ascending=ascending)[:3]
            expected = list(zip(mine["split"], mine["sample_id"], strict=True))
            assert [(ref.split, ref.sample_id) for ref in found if ref.cluster == k] == expected


def test_the_map_shows_rows_of_the_fit_split_with_their_labels(run):
    table = run.labels("train").to_pandas()
    shown = run.metrics.map
    assert shown.n_total == len(table)
    assert len(shown.x) == len(shown.y) == len(table)
    assert list(shown.labels) == table["label"].tolist()
    assert list(shown.sample_ids) == table["sample_id"].tolist()
    assert 0 < shown.explained[1] <= shown.explained[0] < 1


def test_a_converged_fit_has_no_note_and_a_stopped_one_says_how_to_go_on(run, dataset, place, options):
    assert run.metrics.converged
    assert run.metrics.notes == ()
    cluster(dataset, place / "stopped", 7, replace(options, max_iter=1, tol=0.0, init="random"))
    assert any("--max-iter 2" in note for note in open_run(place / "stopped").metrics.notes)


# known classes


def test_classes_are_counted_against_clusters_over_the_samples_that_have_one(run, truth):
    joined = run.labels().to_pandas().merge(pq.read_table(truth).to_pandas(), on=["split", "sample_id"])
    assert run.metrics.classes.names == ("a", "b", "c")
    expected = contingency_matrix(joined["class"], joined["label"])
    np.testing.assert_array_equal(np.array(run.metrics.classes.counts)[:, sorted(joined["label"].unique())], expected)


def test_scores_against_classes_go_with_the_run(run, truth):
    joined = run.labels().to_pandas().merge(pq.read_table(truth).to_pandas(), on=["split", "sample_id"])
    scores = {score.name: score.value for score in run.metrics.scores}
    for split in ("train", "val", "all"):
        mine = joined if split == "all" else joined[joined["split"] == split]
        expected = adjusted_rand_score(mine["class"], mine["label"])
        assert scores[f"adjusted_rand ({split})"] == pytest.approx(expected, abs=1e-12)
    assert "adjusted_rand (test)" not in scores


def test_rows_without_a_known_class_are_left_out(truth):
    labels = pa.table({"split": ["train", "x", "val"], "sample_id": ["0", "0", "4"], "label": [5, 6, 7]})
    names, found = classes_of(read_truth(truth), labels)
    assert (names.tolist(), found.tolist()) == (["a", "b"], [5, 7])


def test_one_split_needs_no_total():
    names, labels = np.array(["a", "a", "b"]), np.array([0, 0, 1])
    assert list(external({"val": (names, labels), "test": (names[:0], labels[:0])})) == ["val"]
    assert external({"val": (names, labels)})["val"]["adjusted_rand"] == 1.0
    with pytest.raises(BadInput, match="no sample of this run"):
        external({"val": (names[:0], labels[:0])})


# words


def test_a_row_is_traced_to_its_shard(dataset):
    split = open_dataset(dataset)["val"]
    assert "shard val/17.h5, sample 0." in origin(split, "flatten", 17)
    assert "shard val/5.h5, sample 0, variable 2." in origin(split, "variable", 17)


def test_the_page_shows_every_number_a_run_has_and_the_command_that_made_it(run):
    text = report.render(page(run.manifest, run.metrics, run.path))
    for shown in (run.manifest.digest, f"--view {run.manifest.options.view}", f"-k {K}", "adjusted_rand", "euclidean"):
        assert shown in text
    assert f"{run.metrics.inertia:.6e}" in text


def test_the_page_of_a_prediction_names_its_model(run, dataset, place, options):
    out = place / f"predicted-{run.path.name}"
    predict(run.path, dataset, out, options)
    predicted = open_run(out)
    facts = dict(page(predicted.manifest, predicted.metrics, out).facts)
    assert facts["fitted on"] == f"the model of run {run.manifest.digest[:12]}"
    assert predicted.metrics.nearest == run.metrics.nearest
