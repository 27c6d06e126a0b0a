"""Initial centers: what they are worth, what they read, what they refuse."""

import numpy as np
import pytest
from matrices import Counting, blobs, blocks
from sklearn.cluster import kmeans_plusplus
from sklearn.metrics import pairwise_distances

from tsclust_ooc.cluster.fused import NonFiniteRows, ZeroRows
from tsclust_ooc.cluster.lloyd import assign
from tsclust_ooc.cluster.starts import (
    INITS,
    Start,
    check_k,
    initial_centers,
    kmeans_plus_plus,
    sample_rows,
)
from tsclust_ooc.errors import BadInput, UsageError
from tsclust_ooc.passes import Tally, thread_mapper


def cost(x, centers):
    return (pairwise_distances(x, centers).min(axis=1) ** 2).sum()


def test_greedy_seeding_costs_what_scikit_learns_does():
    x = blobs(2000, 10, k=12, seed=3, dtype=np.float64)
    ours = [cost(x, x[kmeans_plus_plus(x, 12, np.random.default_rng(seed))]) for seed in range(15)]
    theirs = [cost(x, kmeans_plusplus(x, 12, random_state=seed)[0]) for seed in range(15)]
    assert np.median(ours) == pytest.approx(np.median(theirs), rel=0.1)


def test_seeding_far_from_the_origin_finds_every_blob():
    x = blobs(500, 6, k=8, seed=1, spread=0.01) + np.float32(1e4)
    chosen = kmeans_plus_plus(x, 8, np.random.default_rng(0))
    assert cost(x.astype(np.float64), x[chosen].astype(np.float64)) < 1


def test_seeding_stops_when_there_are_no_more_distinct_rows():
    x = np.repeat(blobs(3, 7, seed=2), 50, axis=0)
    chosen = kmeans_plus_plus(x, 10, np.random.default_rng(0))
    assert len(np.unique(x[chosen], axis=0)) == len(chosen) == 3


def test_rows_without_weight_are_never_chosen():
    x = blobs(100, 3)
    weights = (np.arange(100) % 10 == 0).astype(float)
    for seed in range(20):
        assert (kmeans_plus_plus(x, 6, np.random.default_rng(seed), weights) % 10 == 0).all()


def test_a_sample_is_uniform_and_the_same_for_any_worker():
    x = np.arange(1000, dtype=np.float32)[:, None]
    with thread_mapper(3) as mapper:
        again = sample_rows(blocks(x, 9), 100, 5, mapper=mapper)
    np.testing.assert_array_equal(sample_rows(blocks(x, 4), 100, 5), again)
    means = [sample_rows(blocks(x, 4), 100, seed).mean() for seed in range(200)]
    assert np.mean(means) == pytest.approx(499.5, abs=6)
    assert len(np.unique(again)) == 100
    np.testing.assert_array_equal(sample_rows(blocks(x, 4), 5000, 0), x)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("init", INITS)
def test_a_start_depends_on_its_seed_and_not_on_workers(init, metric):
    x = blobs(3000, 8, k=6, spread=2.0)
    start = Start(init, metric, seed=7)
    with thread_mapper(2) as mapper:
        threads = initial_centers(blocks(x, 11), 6, start, mapper=mapper, local=mapper)
    loop = initial_centers(blocks(x, 11), 6, start)
    assert loop.tobytes() == threads.tobytes()
    assert (loop.shape, loop.dtype) == ((6, 8), np.float32)
    assert initial_centers(blocks(x, 11), 6, Start(init, metric, seed=8)).tobytes() != loop.tobytes()
    if metric == "cosine":
        np.testing.assert_allclose(np.linalg.norm(loop, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("init", ["auto", "k-means++", "k-means||"])
def test_separate_blobs_each_get_a_center(init):
    x = blobs(20_000, 8, k=10, spread=0.1, seed=4)
    start = Start(init, sample_bytes=2**19)
    for seed in range(5):
        centers = initial_centers(blocks(x, 5), 10, Start(init, "euclidean", seed, sample_bytes=2**19))
        assert assign(blocks(x, 5), centers)[0] < 2.5 * len(x) * 8 * 0.1**2
    assert start.sample_bytes // (8 * 4) < len(x)


@pytest.mark.parametrize(("init", "n_passes"), [("auto", 1), ("k-means++", 1), ("random", 1), ("k-means||", 6)])
def test_a_start_reads_as_often_as_it_says(init, n_passes):
    x, tally = blobs(20_000, 4, k=5), Tally()
    rows = Counting(blocks(x, 3))
    initial_centers(rows, 30, Start(init), tally=tally)
    assert tally.n_passes == n_passes
    assert len(rows.reads) == 3 * n_passes + (init == "k-means||")  # its first center lies in one block


def test_rounds_of_candidates_can_be_set():
    tally = Tally()
    initial_centers(blocks(blobs(), 3), 4, Start("k-means||", n_rounds=2), tally=tally)
    assert tally.n_passes == 3


@pytest.mark.parametrize("oversampling", [0.1, 2, 50])
def test_any_oversampling_gives_k_distinct_centers(oversampling):
    x = blobs(400, 5)
    centers = initial_centers(blocks(x, 3), 20, Start("k-means||", oversampling_factor=oversampling))
    assert len(np.unique(centers, axis=0)) == 20


def test_candidates_are_drawn_in_proportion_to_squared_distance():
    x = np.array([[0.0], [0.0], [1.0], [2.0]] * 250)
    drawn = []
    for seed in range(300):
        start = Start("k-means||", "euclidean", seed, oversampling_factor=0.5, n_rounds=1)
        centers = initial_centers(blocks(x, 4), 2, start)
        if (centers == 0).any():
            drawn.append(float(centers.max()))
    assert np.mean(np.array(drawn) == 2) == pytest.approx(0.8, abs=0.1)  # 4 / (1 + 4)


@pytest.mark.parametrize("init", INITS[:3])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_too_few_distinct_rows_are_counted_over_all_rows(init, metric):
    x = np.repeat(blobs(4, 6, seed=9), 500, axis=0)
    with pytest.raises(BadInput, match=r"5 clusters were asked for.* 2,000 rows hold only 4 distinct"):
        initial_centers(blocks(x, 3), 5, Start(init, metric, sample_bytes=2000))


@pytest.mark.parametrize("init", INITS[:3])
def test_rare_distinct_rows_outside_the_sample_are_found_before_refusing(init):
    x = np.zeros((30_000, 2), np.float32)
    x[[17, 9_000, 29_999]] = [[1, 0], [0, 2], [3, 3]]
    centers = initial_centers(blocks(x, 4), 4, Start(init, sample_bytes=800))
    assert {tuple(center) for center in centers.tolist()} == {(0, 0), (1, 0), (0, 2), (3, 3)}


@pytest.mark.parametrize("init", INITS)
def test_rows_that_cannot_be_used_are_named_and_counted(init):
    x = blobs(300, 4)
    x[[40, 250]] = np.nan
    with pytest.raises(NonFiniteRows) as caught:
        initial_centers(blocks(x, 3), 200, Start(init))
    assert (caught.value.row, caught.value.n_rows_bad) == (40, 2)
    x[[40, 250]] = 0
    with pytest.raises(ZeroRows) as caught:
        initial_centers(blocks(x, 3), 200, Start(init, "cosine"))
    assert (caught.value.row, caught.value.n_rows_bad) == (40, 2)


@pytest.mark.parametrize("k", [0, -3, 2.5, True, "8"])
def test_what_is_no_number_of_clusters_is_refused(k):
    with pytest.raises(UsageError, match="n_clusters"):
        check_k(k, 10)


def test_more_clusters_than_rows_are_refused():
    with pytest.raises(BadInput, match="11 clusters cannot be made of 10 rows"):
        initial_centers(blocks(blobs(10), 2), 11, Start())


def test_a_start_of_the_wrong_shape_or_name_is_refused():
    rows = blocks(blobs(d=12), 2)
    with pytest.raises(UsageError, match=r"\(3, 11\).*\(3, 12\)"):
        initial_centers(rows, 3, Start(np.zeros((3, 11))))
    with pytest.raises(UsageError, match="'kmeans'"):
        initial_centers(rows, 3, Start("kmeans"))


def test_a_given_start_is_taken_as_it_is():
    x = blobs()
    np.testing.assert_array_equal(initial_centers(blocks(x, 2), 3, Start(x[:3])), x[:3])
