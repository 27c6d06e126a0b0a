"""What Python programs import: the names, how little that costs, and the example in the package's docstring."""

import json
import subprocess
import sys

import dask.array
import numpy as np
import pytest
from datasets import SIZES, publish, three_splits
from scipy.spatial.distance import cdist

import tsclust_ooc
from tsclust_ooc import KMeans, open_dataset, open_run, open_source

SAMPLES = three_splits()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    publish(folder, SAMPLES)
    return folder


def in_a_fresh_process(script, *words):
    command = [sys.executable, "-c", script, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_every_public_name_is_something_to_call_in_whatever_order_names_are_used():
    script = """
import tsclust_ooc
for names in (tsclust_ooc.__all__, reversed(tsclust_ooc.__all__)):
    for name in names:
        if not callable(getattr(tsclust_ooc, name)):
            print(name)
"""
    assert in_a_fresh_process(script) == ""


def test_names_are_listed_and_unknown_ones_refused():
    assert {"KMeans", "open_dataset", "open_run", "open_source"} <= set(tsclust_ooc.__all__) <= set(dir(tsclust_ooc))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = tsclust_ooc.nonsense


def test_importing_the_package_loads_nothing_heavy():
    script = "import sys, json, tsclust_ooc; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(in_a_fresh_process(script)))
    assert not loaded & {"numpy", "zarr", "h5py", "dask", "pyarrow", "sklearn", "numba", "cyclopts", "rich"}


def test_the_example_clusters_a_view_of_a_dataset(place):
    dataset = open_dataset(place / "dataset")
    x = dataset["train"].view("variable")
    assert isinstance(x, dask.array.Array)
    fitted = KMeans(3, random_state=0).fit(x)
    rows = SAMPLES["train"].reshape(-1, 16).astype(np.float64)
    assert fitted.labels_.shape == (3 * SIZES["train"],)
    expected = cdist(rows, fitted.cluster_centers_.astype(np.float64))
    np.testing.assert_array_equal(fitted.labels_.compute(), expected.argmin(axis=1))
    assert fitted.inertia_ == pytest.approx((expected.min(axis=1) ** 2).sum(), rel=1e-6)


def test_a_dataset_is_a_mapping_of_splits(place):
    dataset = open_dataset(place / "dataset")
    assert {name: split.n_samples for name, split in dataset.items()} == SIZES
    np.testing.assert_array_equal(dataset["val"].array[:], SAMPLES["val"])
    means = SAMPLES["val"].mean(axis=1, dtype="f8").astype("f4")
    np.testing.assert_array_equal(dataset["val"].view("mean").compute(), means)
    with pytest.raises(KeyError, match="no split 'nope'"):
        dataset["nope"]
    assert "train" in repr(dataset)
    assert "<td>train</td>" in dataset._repr_html_()


def test_a_source_is_read_lazily_without_being_consolidated(place):
    source = open_source(place / "source")
    assert list(source) == list(SIZES)
    assert isinstance(source["train"], dask.array.Array)
    np.testing.assert_array_equal(source["train"].compute(), SAMPLES["train"])
    np.testing.assert_array_equal(source["test"][-1].compute(), SAMPLES["test"][-1])


def test_a_run_made_from_python_is_opened_from_python(place):
    script = """
import sys
from tsclust_ooc.pipeline.clustering import ClusterOptions, cluster
print(cluster(sys.argv[1], sys.argv[2], 3, ClusterOptions(workers=1)).digest)
"""
    digest = in_a_fresh_process(script, place / "dataset", place / "run").strip()
    run = open_run(place / "run")
    assert run.manifest.digest == digest
    table = run.labels().to_pandas()
    assert table["split"].value_counts().to_dict() == SIZES
    assert run.centers().shape == (3, 48)
