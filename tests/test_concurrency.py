"""Two processes at one name: one publishes, the other joins it or says so; what is published is never a mixture.

Separate scratch directories stand for two nodes: the lock is a file in scratch, so there it keeps nobody apart.
Run as a script, this file is the racer: it imports everything once and forks the competitors of each race.
"""

import json
import os
import subprocess
import sys
import time
import traceback

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import SIZES, publish, three_splits, write_source
from sources import contents, data_of

from tsclust_ooc.cli import main
from tsclust_ooc.cluster.lloyd import assign
from tsclust_ooc.dataset import open_dataset
from tsclust_ooc.dataset import verify as verify_dataset
from tsclust_ooc.passes import as_rows
from tsclust_ooc.pipeline import clustering, consolidating, verifying  # noqa: F401 - imported before the forks
from tsclust_ooc.results import open_run

DONE, TAKEN, AGAIN = 0, 73, 75
DELAYS = (0.0, 0.0, 0.03, 0.1, 0.2)
"""Head start, in seconds, of the first of two processes: from none to most of the work."""


def race(commands, delay):
    """Exit codes of commands run at once, each in a fork; each next one starts `delay` seconds later."""
    start, go = os.pipe()
    racers = []
    for i, words in enumerate(commands):
        pid = os.fork()
        if pid == 0:
            os.close(go)
            os.read(start, 1)  # until the parent closes its end
            time.sleep(i * delay)
            os._exit(run(words))
        racers.append(pid)
    os.close(start)
    os.close(go)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in racers]


def run(words):
    code = 70
    try:
        code = main([*words, "--quiet"])
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    return code


def races(many):
    """Codes of each race of `many` = [(commands, delay)], run in one fresh process that forks."""
    done = subprocess.run([sys.executable, __file__, json.dumps(many)], capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout)


def places(folder, n):
    """One folder a race, with a scratch directory for each of two nodes."""
    made = [folder / f"race{i}" for i in range(n)]
    for place in made:
        for node in ("node0", "node1"):
            (place / node).mkdir(parents=True)
    return made


def left_over(place):
    return [path.name for path in place.iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("concurrency") / "source", three_splits())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("published"), three_splits())


def consolidate(source, place, node=0, chunk_bytes=4096):
    options = ["--chunk-bytes", str(chunk_bytes), "--workers", "2", "--scratch", str(place / f"node{node}")]
    return ["consolidate", str(source), str(place / "dataset"), *options]


def cluster(dataset, place, node=0, k=3):
    return ["cluster", str(dataset), str(place / "run"), "-k", str(k), "--scratch", str(place / f"node{node}")]


def alone(command, folder, **options):
    """What one process makes of a command when nobody is in its way."""
    (place,) = places(folder / "alone", 1)
    assert races([([command(place, **options)], 0)]) == [[DONE]]
    return place


def check_dataset(place, expected):
    opened = open_dataset(place / "dataset")
    assert verify_dataset(opened) == []
    assert data_of(place / "dataset") in expected
    for split, x in three_splits().items():
        np.testing.assert_array_equal(opened[split].array[:], x)


@pytest.mark.parametrize("n_nodes", [1, 2])
def test_two_consolidations_to_one_name_make_one_dataset(source, tmp_path, n_nodes):
    reference = data_of(alone(lambda place: consolidate(source, place), tmp_path) / "dataset")
    made = places(tmp_path, len(DELAYS))
    found = races([
        ([consolidate(source, place), consolidate(source, place, n_nodes - 1)], delay)
        for place, delay in zip(made, DELAYS, strict=True)
    ])  # fmt: skip
    for place, codes in zip(made, found, strict=True):
        assert DONE in codes, codes
        assert set(codes) <= {DONE, AGAIN}, codes
        check_dataset(place, [reference])
        assert left_over(place) == []


def test_two_consolidations_with_other_options_never_mix(source, tmp_path):
    sizes = (4096, 6000)
    references = [
        data_of(alone(lambda place, n=n: consolidate(source, place, chunk_bytes=n), tmp_path / str(n)) / "dataset")
        for n in sizes
    ]
    made = places(tmp_path, len(DELAYS))
    found = races([
        ([consolidate(source, place, node, chunk_bytes=sizes[node]) for node in (0, 1)], delay)
        for place, delay in zip(made, DELAYS, strict=True)
    ])  # fmt: skip
    for place, codes in zip(made, found, strict=True):
        assert sorted(codes) in ([DONE, TAKEN], [DONE, AGAIN]), codes
        check_dataset(place, [references[codes.index(DONE)]])
    # What the others left behind goes with the next command to that name.
    winners = [consolidate(source, p, chunk_bytes=sizes[c.index(DONE)]) for p, c in zip(made, found, strict=True)]
    assert races([([words], 0) for words in winners]) == [[DONE]] * len(made)
    assert [left_over(place) for place in made] == [[]] * len(made)


@pytest.mark.parametrize("n_nodes", [1, 2])
def test_two_clusterings_to_one_name_make_one_run(dataset, tmp_path, n_nodes):
    reference = open_run(alone(lambda place: cluster(dataset, place), tmp_path) / "run").manifest.digest
    made = places(tmp_path, len(DELAYS))
    found = races([
        ([cluster(dataset, place), cluster(dataset, place, n_nodes - 1)], delay)
        for place, delay in zip(made, DELAYS, strict=True)
    ])  # fmt: skip
    for place, codes in zip(made, found, strict=True):
        assert DONE in codes, codes
        assert set(codes) <= {DONE, AGAIN}, codes
        opened = open_run(place / "run")
        assert opened.manifest.digest == reference
        assert {f for f in contents(place / "run") if f != "manifest.json"} == set(opened.manifest.files)
        assert left_over(place) == []


def test_two_clusterings_with_other_options_never_mix(dataset, tmp_path):
    made = places(tmp_path, len(DELAYS))
    found = races([
        ([cluster(dataset, place, node, k=3 + node) for node in (0, 1)], delay)
        for place, delay in zip(made, DELAYS, strict=True)
    ])  # fmt: skip
    for place, codes in zip(made, found, strict=True):
        assert sorted(codes) in ([DONE, TAKEN], [DONE, AGAIN]), codes
        opened = open_run(place / "run")
        assert opened.manifest.options.k == opened.model.k == len(opened.centers()) == 3 + codes.index(DONE)
        labels = pq.read_table(place / "run/labels").column("label")
        assert len(labels.unique()) == opened.model.k
        assert len(labels) == sum(SIZES.values())
        assert left_over(place) == []


if __name__ == "__main__":
    for kind in (np.float32, np.float64):  # compiled once, not in every fork
        assign(as_rows(np.eye(4, dtype=kind)), np.eye(2, 4, dtype=kind))
    print(json.dumps([race(*one) for one in json.loads(sys.argv[1])]))
