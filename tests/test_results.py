"""The run directory: absent or complete, checked when it is opened, and readable by plain tools."""

import json
import os
import re
import stat
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from datasets import SIZES, publish, three_splits

from tsclust_ooc import provenance
from tsclust_ooc.errors import BadInput, CannotWrite, TryAgain, TsclustError, UsageError
from tsclust_ooc.pipeline.clustering import ClusterOptions, cluster
from tsclust_ooc.published import NameTaken
from tsclust_ooc.results import (
    Metrics,
    RunManifest,
    RunOptions,
    RunWork,
    by_cluster,
    existing,
    label_table,
    load_centers,
    open_run,
)

OPTIONS = RunOptions("cluster", 2, "lloyd", "flatten", "euclidean", "auto", 300, 1e-4, 0, "all")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("results")
    dataset = publish(place, three_splits())
    cluster(dataset, place / "run", 4, ClusterOptions(view="variable", workers=2, scratch=place))
    return place / "run"


@pytest.fixture
def run(made, tmp_path):
    """A copy of a published run, to be damaged."""
    for path in made.rglob("*"):
        if path.is_file():
            copy = tmp_path / "run" / path.relative_to(made)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return tmp_path / "run"


def work_on(final, *, replace=False, label=0):
    """Publish a run of three rows by hand."""
    with RunWork(final, "d", OPTIONS) as work:
        labels = np.array([0, 1, label], np.int32)
        work.write_labels("all", label_table("all", pa.chunked_array([["a", "b", "c"]]), labels, np.ones(3, "f4"), 1))
        model = work.write_model(
            np.eye(2, dtype="f4"), metric="euclidean", view="flatten", item_shape=(2,), dataset_digest="d"
        )
        work.write_metrics(
            Metrics(3.0, {"all": 3.0}, 1, True, by_cluster({"all": labels}, 2), (), (), (), (), ())
        )  # fmt: skip
        work.publish(manifest(work), replace=replace)
    return model


def manifest(work):
    return RunManifest(
        work.digest(), "/data/x", "d", OPTIONS, {"all": 3}, 2, "threads", 1, 2, 48, 0.1, 1000, dict(work.files),
        provenance.here_and_now(),
    )  # fmt: skip


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


# reading one


def test_plain_tools_read_a_run_without_us(run):
    script = """
import sys, json, numpy, pandas
run = sys.argv[1]
table = pandas.read_parquet(run + "/labels")
centers = numpy.load(run + "/model/centers.npy", allow_pickle=False)
print(json.dumps([len(table), list(table.columns), centers.shape, any(m.startswith("tsclust") for m in sys.modules)]))
"""
    out = subprocess.run([sys.executable, "-c", script, str(run)], capture_output=True, text=True, check=True).stdout
    columns = ["split", "row", "sample_id", "variable", "label", "distance"]
    assert json.loads(out) == [3 * sum(SIZES.values()), columns, [4, 16], False]


def test_a_run_gives_its_labels_by_split_or_all_together(run):
    opened = open_run(run)
    assert opened.labels("val").num_rows == 3 * SIZES["val"]
    whole = opened.labels().to_pandas()
    assert whole["split"].unique().tolist() == list(SIZES)
    order = ["split", "row", "variable"]
    expected = pd.read_parquet(run / "labels").sort_values(order, ignore_index=True)
    pd.testing.assert_frame_equal(whole.sort_values(order, ignore_index=True), expected)


def test_a_run_gives_its_centers_and_shows_itself_in_a_notebook(run):
    opened = open_run(str(run))
    np.testing.assert_array_equal(opened.centers(), np.load(run / "model/centers.npy", allow_pickle=False))
    page = opened._repr_html_()
    numbers = [int(n.replace(",", "")) for n in re.findall(r"right'>([\d,]+)<", page)]
    assert sum(numbers) == 3 * sum(SIZES.values())


def test_what_is_not_a_run_is_refused_with_the_command_that_makes_one(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for name in ("absent", "file", "folder"):
        with pytest.raises(BadInput, match=f"{name} is not a run: it has no manifest.json.*tsclust cluster"):
            open_run(tmp_path / name)


@pytest.mark.parametrize("name", ["labels/val.parquet", "model/centers.npy", "metrics.json", "report.html"])
def test_a_missing_or_short_file_is_named(run, name):
    whole = (run / name).read_bytes()
    (run / name).write_bytes(whole[:-1])
    with pytest.raises(BadInput, match=f"{name} is .* bytes, wanted {len(whole):,}"):
        open_run(run)
    (run / name).unlink()
    with pytest.raises(BadInput, match=f"{name} is missing"):
        open_run(run)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 99}, "format_version 99"),
        ({"surprise": 1}, "unknown keys \\['surprise'\\]"),
        ({"n_passes": "many"}, "found 'many', wanted a int"),
    ],
)
def test_a_manifest_of_another_kind_is_refused_with_both_values(run, change, said):
    body = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(body | change))
    with pytest.raises(BadInput, match=said):
        open_run(run)


def test_centers_are_checked_by_digest_and_never_unpickled(run):
    opened = open_run(run)
    path = run / "model/centers.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(BadInput, match="damaged"):
        load_centers(run, opened.model)


def test_a_record_holds_no_environment(run, monkeypatch):
    text = "".join(path.read_text() for path in run.rglob("*.json"))
    assert "PATH" not in text
    assert "HOME" not in text


# making one


def test_a_run_appears_by_one_rename_and_leaves_nothing_beside_it(tmp_path):
    work_on(tmp_path / "deep/er/run")
    assert open_run(tmp_path / "deep/er/run").labels().column("label").to_pylist() == [0, 1, 0]
    assert hidden(tmp_path / "deep/er") == []


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, BadInput, CannotWrite])
def test_work_that_fails_is_removed_and_nothing_is_published(tmp_path, error):
    with pytest.raises(error), RunWork(tmp_path / "run", "d", OPTIONS) as work:  # noqa: PT012
        work.write("report.html", b"half")
        assert not (tmp_path / "run").exists()
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (KeyboardInterrupt, True),
        (CannotWrite, True),
        (OSError, True),
        (TsclustError, True),
        (BadInput, False),
        (UsageError, False),
        (NameTaken, False),
    ],
)
def test_progress_stays_where_the_same_command_may_go_on_with_it(tmp_path, error, kept):
    work = RunWork(tmp_path / "run", "d", OPTIONS)
    with pytest.raises(error), work:  # noqa: PT012
        (work.prepare() / "fit.checkpoint").write_bytes(b"progress")
        work.write("report.html", b"half")
        raise error
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["fit.checkpoint"] * kept
    assert len(hidden(tmp_path)) == kept
    assert RunWork(tmp_path / "run", "d", OPTIONS).root == work.root
    assert RunWork(tmp_path / "run", "d", replace(OPTIONS, k=3)).root != work.root
    assert RunWork(tmp_path / "run", "other", OPTIONS).root != work.root
    work_on(tmp_path / "run")
    assert hidden(tmp_path) == []


def test_work_in_which_another_process_is_at_work_is_left_to_it(tmp_path):
    with RunWork(tmp_path / "run", "d", OPTIONS) as other:
        other.write("report.html", b"theirs")
        with pytest.raises(KeyboardInterrupt), RunWork(tmp_path / "run", "d", OPTIONS) as work:  # noqa: PT012
            work.write("report.html", b"ours")
            raise KeyboardInterrupt
        assert [path.read_bytes() for path in tmp_path.rglob("report.html")] == [b"theirs"]


def test_unpublished_work_is_private_and_what_is_published_follows_the_umask(tmp_path):
    for mask, folder, file in ((0o022, 0o755, 0o644), (0o027, 0o750, 0o640), (0o077, 0o700, 0o600)):
        before = os.umask(mask)
        try:
            with RunWork(tmp_path / "other", "d", OPTIONS) as work:
                work.write("report.html", b"half")
                assert [mode(path) for path in tmp_path.glob(".other.*")] == [0o700]
            work_on(tmp_path / "run", replace=True)
        finally:
            os.umask(before)
        made = tmp_path / "run"
        assert {mode(path) for path in (made, *made.rglob("*")) if path.is_dir()} == {folder}
        assert {mode(path) for path in made.rglob("*") if path.is_file()} == {file}


def test_a_run_does_not_take_the_place_of_another_unless_told_to(tmp_path):
    work_on(tmp_path / "run")
    before = open_run(tmp_path / "run").manifest.digest
    with pytest.raises(CannotWrite, match="already exists"):
        work_on(tmp_path / "run", label=1)
    assert open_run(tmp_path / "run").manifest.digest == before
    work_on(tmp_path / "run", label=1, replace=True)
    assert open_run(tmp_path / "run").manifest.digest != before
    assert hidden(tmp_path) == []


def test_work_that_was_swept_away_meanwhile_asks_for_another_try(tmp_path):
    with pytest.raises(TryAgain, match="another process"), RunWork(tmp_path / "run", "d", OPTIONS) as work:  # noqa: PT012
        work.prepare().rename(tmp_path / "elsewhere")
        work.write("report.html", b"late")
    with pytest.raises(TryAgain, match="another process"), RunWork(tmp_path / "run", "d", OPTIONS) as work:  # noqa: PT012
        work.write("report.html", b"early")
        work.root.rename(tmp_path / "elsewhere too")
        work.publish(manifest(work), replace=False)
    assert not (tmp_path / "run").exists()


def test_equal_results_have_equal_digests_whenever_they_were_made(tmp_path):
    for name, label in (("a", 0), ("b", 0), ("c", 1)):
        work_on(tmp_path / name, label=label)
    a, b, c = (open_run(tmp_path / name).manifest.digest for name in "abc")
    assert a == b != c


def test_a_run_made_with_the_same_options_is_found_and_any_other_refused(tmp_path):
    assert existing(tmp_path / "run", "d", OPTIONS, overwrite=False) is None
    work_on(tmp_path / "run")
    assert existing(tmp_path / "run", "d", OPTIONS, overwrite=False).path == tmp_path / "run"
    assert existing(tmp_path / "run", "d", OPTIONS, overwrite=True) is None
    with pytest.raises(CannotWrite, match="of another dataset"):
        existing(tmp_path / "run", "other", OPTIONS, overwrite=False)


# tables


def test_a_label_table_has_a_line_a_row_of_the_view():
    ids = pa.chunked_array([["a"], ["b"]])
    table = label_table("val", ids, np.array([1, 0, 2, 2]), np.array([0.1, 0.2, 0.3, 0.4], "f4"), 2).to_pandas()
    assert table["split"].tolist() == ["val"] * 4
    assert table["row"].tolist() == [0, 0, 1, 1]
    assert table["sample_id"].tolist() == ["a", "a", "b", "b"]
    assert table["variable"].tolist() == [0, 1, 0, 1]
    assert table["label"].tolist() == [1, 0, 2, 2]
    assert table["distance"].dtype == np.float32


def test_sizes_count_empty_clusters_too():
    assert by_cluster({"a": np.array([0, 2, 2]), "b": np.array([], np.int32)}, 4) == {"a": (1, 0, 2, 0), "b": (0,) * 4}
