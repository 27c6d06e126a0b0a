"""tsclust run: a workflow file gives what its commands give, is checked before it starts, and goes on."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from datasets import three_splits, write_source
from sources import contents, write_shard

from tsclust_ooc.errors import BadInput, UsageError
from tsclust_ooc.matrix import open_matrix
from tsclust_ooc.pipeline import settings
from tsclust_ooc.pipeline.flowing import intent, read_flow, run_flow
from tsclust_ooc.pipeline.options import ClusterOptions
from tsclust_ooc.pipeline.steps import ClusterStep, ConsolidateStep, DistancesStep, InspectStep, PublishStep
from tsclust_ooc.progress import silent
from tsclust_ooc.results import open_run

WORKFLOWS = Path(__file__).parents[1] / "workflows"
FLOW = """
[flow]
source = "source"
dataset = "made/dataset"
workers = 2
scratch = "."

[inspect]

[consolidate]
chunk-bytes = "4096"

[[cluster]]
run = "made/k3"
k = 3

[[cluster]]
run = "made/k2"
clusters = 2
view = "mean"

[distances]
out = "made/distances"
split = "val"

[publish]
to = "${PUBLIC:-public}"
"""


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    for name in [name for name in os.environ if name.startswith("TSCLUST_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("flowing") / "source", three_splits(sizes={"train": 40, "val": 9}))


@pytest.fixture
def place(tmp_path, source):
    """A folder with a small source and a workflow for it."""
    shutil.copytree(source, tmp_path / "source")
    (tmp_path / "flow.toml").write_text(FLOW)
    return tmp_path


def states(folder):
    """Every file and when it was written, but for locks and other things that come and go."""
    return {p: p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file() and "tsclust-" not in str(p)}


def digest(result):
    return json.loads((result / "manifest.json").read_text())["digest"]


# all of it


def test_a_workflow_gives_what_its_commands_give_and_again_there_is_nothing_to_do(place, tsclust, monkeypatch):
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="tsclust-test-") as public:
        monkeypatch.setenv("PUBLIC", public)
        code, out, err = tsclust("run", place / "flow.toml")
        assert code == 0, err
        headings = [line for line in out.splitlines() if re.match(r"\d/\d ", line)]
        assert headings == ["1/6 inspect", "2/6 consolidate", "3/6 distances distances", "4/6 cluster k3",
                            "5/6 cluster k2", "6/6 publish"]  # fmt: skip
        assert out.splitlines()[-1].startswith("6 steps done in ")
        names = ("dataset", "distances", "k3", "k2")
        for name in names:
            assert contents(Path(public) / name) == contents(place / "made" / name)
        open_run(Path(public) / "k3")
        open_matrix(Path(public) / "distances")
        before = states(place / "made"), states(Path(public))
        code, out, err = tsclust("run", place / "flow.toml", "--json")
        assert code == 0, err
        assert out.count("\n") == 1
        found = json.loads(out)
        assert [one["step"] for one in found["steps"]] == [
            "inspect", "consolidate", "distances", "cluster", "cluster", "publish"
        ]  # fmt: skip
        assert all(one["reused"] for one in found["steps"][1:])
        assert (states(place / "made"), states(Path(public))) == before
    for step in read_flow(place / "flow.toml").steps[1:-1]:  # the same by hand, at other names
        words = [word.replace(str(place / "made"), str(place / "by-hand")) for word in step.words]
        assert tsclust(*words, "--quiet")[0] == 0
    for name in names:
        assert digest(place / "by-hand" / name) == digest(place / "made" / name)


def test_a_dry_run_says_what_would_be_done_and_changes_nothing(place, tsclust):
    before = states(place)
    code, out, err = tsclust("run", place / "flow.toml", "--dry-run")
    assert code == 0, err
    assert states(place) == before
    assert not (place / "made").exists()
    steps = read_flow(place / "flow.toml").steps
    for step in steps[:-1]:
        assert f"  {shlex.join(['tsclust', *step.words])}\n" in out
    assert f"-> {place}/public/k2\n" in out
    assert "49 samples of 49 shards · 3 chunks" in out
    found = json.loads(tsclust("run", place / "flow.toml", "--dry-run", "--json")[1])
    assert [set(one["state"].values()) for one in found["steps"]] == [set(), *[{"absent"}] * 5]
    assert found["steps"][1]["plan"]["n_samples"] == 49


def test_a_step_that_is_there_or_begun_is_seen_in_a_dry_run(place):
    steps = read_flow(place / "flow.toml").steps
    (place / "made/k3").mkdir(parents=True)
    (place / "made/.k2.0123456789ab.wip").mkdir()
    assert [list(intent(step).state.values()) for step in steps if isinstance(step, ClusterStep)] == [
        ["there"], ["unfinished"],
    ]  # fmt: skip


def test_the_library_runs_a_workflow_too(place, heard):
    flow = read_flow(place / "flow.toml")
    flow = replace(flow, steps=flow.steps[:2])
    done = run_flow(flow, heard)
    assert [step["step"] for step in done.steps] == ["inspect", "consolidate"]
    assert done.steps[1]["n_samples"] == 49


# what is refused


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("split = ", "splitt = ", "[distances] splitt is not known. [distances] knows: acc"),
        ("[publish]\nto", "[publish]\ntoo", "[publish] too is not known"),
        ("[publish]", "[publish]\nto-whom = 1", "to-whom is not known"),
        ("[publish]", "[puplish]", "[puplish] is no section of a workflow. Use: [flow], [inspect], "),
        ("workers = 2", 'workers = "2"', "[flow] workers is '2', wanted a whole number"),
        ("workers = 2", "workers = true", "[flow] workers is True, wanted a whole number"),
        ("workers = 2", "workers = 0", "leaves nobody to work"),
        ("workers = 2", "memory = 4", "[flow] memory is 4, wanted a text"),
        ("workers = 2", 'memory = "plenty"', "'plenty' is not a size"),
        ("workers = 2", 'scheduler = "clock"', "--scheduler clock is not known"),
        ("workers = 2", 'job_memory = "big"', "'big' is not a size"),
        ("workers = 2", 'directives = "-x"', "directives is '-x', wanted a list"),
        ("workers = 2", "overwrite = true", "[flow] overwrite is not known"),
        ("k = 3", "", "[[cluster]] 1 has no k. Give one: k = 6"),
        ("k = 3", "k = 3\nclusters = 3", "clusters is the same as k"),
        ("k = 3", "k = 0", "n_clusters=0 is not a number of clusters"),
        ("k = 3", "k = 3.0", "k is 3.0, wanted a whole number"),
        ("k = 3", "k = 3\nmax-iter = 1\nmax_iter = 2", "has max_iter twice"),
        ('view = "mean"', 'view = "median"', "[[cluster]] 2: --view median is not known"),
        ('view = "mean"', 'truth = "gone.parquet"', "gone.parquet is not there"),
        ("split = ", 'block_bytes = "2"\nsplit = ', "--block-bytes 2 does not hold one distance"),
        ('run = "made/k2"', 'run = "made/k3"', "k3 is the place of two results"),
        ('run = "made/k2"', 'run = "made/dataset/k2"', "which is only read from"),
        ('run = "made/k2"', 'run = "source/k2"', "which is only read from"),
        ('run = "made/k2"', 'run = "other/k3"', "public/k3 is the place of two results"),
        ('dataset = "made/dataset"', 'dataset = "source"', "which is only read from"),
        ('dataset = "made/dataset"', "", "[flow] has no dataset, and"),
        ('source = "source"', 'source = "gone"', "gone is not there"),
        ('source = "source"', 'source = "$GONE/x"', "the variable GONE is not set. Set it: export GONE="),
        ('source = "source"', 'source = ""', "[flow] source is empty"),
        ("${PUBLIC:-public}", "made/k3", "which is only read from"),
        ("[publish]", '[publish]\nwhat = ["runs", "shards"]', "what = 'shards' is not known"),
        ("[publish]", '[publish]\nwhat = "runs"', "wanted a list, like"),
        ("[publish]", "[publish]\nworkers = 0", "leaves nobody to work"),
        ("[distances]", "[x]\n[distances]", "[x] is no section"),
        ('[consolidate]\nchunk-bytes = "4096"', '[consolidate]\nchunk-bytes = "12"', "--chunk-bytes 12 is too small"),
        ('[consolidate]\nchunk-bytes = "4096"', "[consolidate]\ndry_run = true", "dry_run is not known"),
        ("[consolidate]\n", "[[consolidate]]\n", "not a table. Write"),
        ("[inspect]", "inspect = 3", "not a table"),
        ("[inspect]", "[inspect", "is not TOML"),
    ],
)
def test_a_mistake_anywhere_in_the_file_is_refused_before_anything_is_made(place, tsclust, old, new, said):
    text = (place / "flow.toml").read_text()
    assert old in text
    mistaken = text.replace(old, new, 1)
    if old == "[inspect]" and new == "inspect = 3":
        mistaken = "inspect = 3\n" + text.replace(old, "", 1)
    (place / "flow.toml").write_text(mistaken)
    before = sorted(place.rglob("*"))
    code, out, err = tsclust("run", place / "flow.toml")
    assert (code, out) == (65 if "is not there" in said else 2, ""), err
    assert said in err
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no step. Add sections: [inspect], "),
        ('[flow]\nsource = "."\n[inspect]\n[publish]\nto = "p"', "this workflow makes nothing to publish"),
        ('[flow]\ndataset = "d"\n[cluster]\nrun = "r"\nk = 2\n[publish]\nto = "p"\nwhat = ["dataset"]', "makes none"),
        ("[inspect]", "[flow] has no source"),
        (None, "No such file"),
    ],
)
def test_a_file_that_says_too_little_is_refused(tmp_path, tsclust, text, said):
    if text is not None:
        (tmp_path / "flow.toml").write_text(text)
    code, _, err = tsclust("run", tmp_path / "flow.toml")
    assert code == 2
    assert said in err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("flow.source", "is not of the form SECTION.KEY=VALUE"),
        ("source=x", "is not of the form SECTION.KEY=VALUE"),
        ("flow.sauce=x", "--set flow.sauce is not known"),
        ("cluster.kk=3", "--set cluster.kk is not known"),
        ("cluster.k=many", "--set cluster.k is 'many', wanted a whole number"),
        ("cluster.tol=small", "--set cluster.tol is 'small', wanted a number"),
        ("publish.overwrite=perhaps", "wanted true or false"),
        ("predict.k=3", "has no [predict]"),
    ],
)
def test_a_change_that_cannot_be_meant_is_refused(place, tsclust, change, said):
    code, out, err = tsclust("run", place / "flow.toml", "--set", change)
    assert (code, out) == (2, "")
    assert said in err


# where options come from


def cluster_options(place, table="", changes=(), environ=(), common=""):
    text = f'[flow]\ndataset = "d"\n{common}\n[cluster]\nrun = "r"\nk = 2\n{table}\n'
    (place / "flow.toml").write_text(text)
    (step,) = read_flow(place / "flow.toml", changes, dict(environ)).steps
    return step


def test_a_change_beats_the_environment_beats_the_section_beats_the_common_section(tmp_path):
    where = {"common": "workers = 1", "table": "workers = 2", "environ": {"TSCLUST_WORKERS": "3"},
             "changes": ["flow.workers=4"]}  # fmt: skip
    given = {}
    assert cluster_options(tmp_path).options.workers is None
    for n, (name, value) in enumerate(where.items(), start=1):
        given[name] = value
        assert cluster_options(tmp_path, **given).options.workers == n
    assert cluster_options(tmp_path, changes=["flow.workers=4", "cluster.workers=5"]).options.workers == 5


def test_options_from_every_place_have_their_types(tmp_path):
    table = 'tol = 1\nmax-iter = 7\nscheduler = "slurm"\njob_cores = 4\ndirectives = ["--nice", "-C avx"]\ntls = "keys"'
    step = cluster_options(tmp_path, table)
    assert (step.options.tol, step.options.max_iter) == (1.0, 7)
    assert (step.options.jobs.job_cores, step.options.jobs.directives) == (4, ("--nice", "-C avx"))
    assert step.options.jobs.tls == tmp_path / "keys"
    environ = {"TSCLUST_TOL": "0.5", "TSCLUST_OVERWRITE": "yes", "TSCLUST_K": "9", "TSCLUST_DIRECTIVES": "--x"}
    step = cluster_options(tmp_path, environ=environ)
    assert (step.options.tol, step.options.overwrite, step.k) == (0.5, True, 9)
    assert step.options.jobs.directives == ("--x",)
    assert cluster_options(tmp_path, changes=["cluster.view=mean", "cluster.overwrite=FALSE"]).options == (
        ClusterOptions(view="mean")
    )


def test_a_path_starts_in_the_folder_of_its_file_or_where_a_change_was_typed(tmp_path, monkeypatch):
    (tmp_path / "file").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cluster_options(tmp_path / "file").run == tmp_path / "file/r"
    assert cluster_options(tmp_path / "file", changes=["cluster.run=r"]).run == tmp_path / "here/r"
    environ = {"HOME": str(tmp_path), "PLACE": "/data", "EMPTY": ""}
    monkeypatch.setenv("HOME", str(tmp_path))
    for text, wanted in [
        ("$PLACE/x", "/data/x"), ("${PLACE}x", "/datax"), ("${NONE:-/y}/z", "/y/z"), ("${EMPTY:-/y}", "/y"),
        ("${PLACE:-/y}", "/data"), ("~/r", f"{tmp_path}/r"), ("${NONE:-~}/r", f"{tmp_path}/r"), ("/a$", "/a$"),
    ]:  # fmt: skip
        (tmp_path / "flow.toml").write_text(f'[flow]\ndataset = "{text}"\n[cluster]\nrun = "/r"\nk = 2\n')
        (step,) = read_flow(tmp_path / "flow.toml", (), environ).steps
        assert step.dataset == Path(wanted)


def test_what_consolidate_is_told_of_the_source_holds_for_inspect_too(place):
    changes = ["consolidate.key=embeddings", "consolidate.layout=item-per-file"]
    look, consolidation = read_flow(place / "flow.toml", changes).steps[:2]
    assert (look.options.key, look.options.layout) == ("embeddings", "item-per-file")
    assert (consolidation.options.key, consolidation.options.chunk_bytes) == ("embeddings", "4096")
    assert read_flow(place / "flow.toml", [*changes, "inspect.key=x"]).steps[0].options.key == "x"


def test_only_what_is_asked_for_is_published(place):
    (place / "flow.toml").write_text(FLOW + 'what = ["runs"]\n')
    step = read_flow(place / "flow.toml").steps[-1]
    assert step.made == (place / "made/k3", place / "made/k2")


def test_the_file_serves_single_commands_too():
    sections = {
        "flow": {"source": "s", "dataset": "d", "memory": "4GB", "job-memory": "1GB"},
        "consolidate": {"memory": "2GB", "on-bad": "skip"},
        "cluster": {"run": "r", "k": 3, "job_memory": "2GB"},
        "distances": {"out": "o", "split": "val"},
        "inspect": {"key": "x"},
        "publish": {"to": "p"},
    }
    assert settings.sections_for_commands(sections) == {
        "consolidate": {"memory": "2GB", "on-bad": "skip", "job-memory": "1GB"},
        "cluster": {"clusters": 3, "job_memory": "2GB", "memory": "4GB"},
        "distances": {"split": "val", "memory": "4GB", "job-memory": "1GB"},
        "predict": {"memory": "4GB", "job-memory": "1GB"},
        "inspect": {"key": "x"},
    }


# steps that fail


def bad_shard(place):
    write_shard(place / "source/train/40.h5", three_splits()["train"][0])
    data = (place / "source/train/40.h5").read_bytes()
    (place / "source/train/40.h5").write_bytes(data[: len(data) // 2])


def test_bad_shards_end_a_workflow_at_the_look_unless_they_are_to_be_skipped(place, tsclust):
    bad_shard(place)
    code, out, err = tsclust("run", place / "flow.toml")
    assert (code, out) == (65, "1/6 inspect\n")
    assert "tsclust: step 1/6 inspect: 1 bad shard in" in err
    assert "train/40.h5   truncated" in err
    assert not (place / "made").exists()
    words = ["run", place / "flow.toml", "--json"]
    code, out, _ = tsclust(*words)
    assert (code, json.loads(out)["problems"][0]["path"]) == (65, "train/40.h5")
    (place / "flow.toml").write_text(FLOW.partition("[[cluster]]")[0])
    code, out, _ = tsclust(*words, "--set", "consolidate.on_bad=skip")
    assert code == 0
    assert json.loads(out)["steps"][1]["n_rejected"] == 1


def test_the_step_that_fails_gives_its_exit_code_and_its_name_and_those_before_it_stay(place, tsclust):
    (place / "flow.toml").write_text(FLOW.replace("k = 3", "k = 41"))
    code, out, err = tsclust("run", place / "flow.toml")
    assert code == 65
    assert "tsclust: step 4/6 cluster k3: " in err
    assert out.endswith("4/6 cluster k3\n")
    assert (place / "made/distances/manifest.json").exists()
    (place / "flow.toml").write_text(FLOW.replace('"made/k3"', '"made/free"'))
    (place / "made/free").write_text("taken")
    code, _, err = tsclust("run", place / "flow.toml")
    assert code == 73
    assert "tsclust: step 4/6 cluster free: " in err


def test_a_file_that_the_system_refuses_is_named_with_the_step(place, tsclust):
    (place / "flow.toml").write_text(FLOW.partition("[inspect]")[0] + '[consolidate]\n[publish]\nto = "/proc/x"\n')
    code, _, err = tsclust("run", place / "flow.toml")
    assert code in (1, 73)
    assert "tsclust: step 2/2 publish: /proc" in err


def test_an_interrupted_workflow_says_how_to_go_on_and_goes_on(place):
    text = FLOW.replace('"source"', '"big"').partition("[inspect]")[0]
    (place / "flow.toml").write_text(text + '[consolidate]\nchunk-bytes = "4096"\n[publish]\nto = "public"\n')
    (place / "big").mkdir()
    with h5py.File(place / "big/0.h5", "w") as file:  # a hundred partitions: long enough to be met at work
        file["features"] = np.random.default_rng(0).standard_normal((8_000, 16)).astype("f4")
    words = [sys.executable, "-m", "tsclust_ooc", "run", str(place / "flow.toml"), "--json"]
    words += ["--set", "flow.workers=1"]
    words += ["--set", "consolidate.layout=rows-per-file"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(words, **pipes)
    while process.poll() is None and not list(place.glob("made/.dataset.*.wip/receipts/*.json")):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert json.loads(out)["exit_code"] == 75
    assert f"Go on with: tsclust run {place}/flow.toml --json --set flow.workers=1 " in err
    assert not (place / "made/dataset").exists()
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert [step["step"] for step in json.loads(done.stdout)["steps"]][-1] == "publish"
    assert contents(place / "public/dataset") == contents(place / "made/dataset")
    assert not list(place.glob("*/.*"))


# the files that come with the project


def test_the_local_workflow_runs(place, tsclust, monkeypatch):
    (place / "local.toml").write_bytes((WORKFLOWS / "local.toml").read_bytes())
    write_source(place / "demo", three_splits())
    monkeypatch.setenv("SOURCE", "demo")
    code, out, err = tsclust("run", place / "local.toml", "--json")
    assert code == 0, err
    steps = json.loads(out)["steps"]
    assert [one["step"] for one in steps] == ["inspect", "consolidate", "distances", "cluster", "cluster", "publish"]
    assert [one["k"] for one in steps if one["step"] == "cluster"] == [6, 3]
    assert {path.name for path in (place / "published").iterdir()} == {"distances", "k6", "k3-mean"}


def test_the_slurm_workflow_says_what_it_explains(place):
    environ = {"SOURCE": str(place / "source")}
    steps = read_flow(WORKFLOWS / "slurm.toml", (), environ).steps
    assert [type(step) for step in steps] == [ConsolidateStep, DistancesStep, ClusterStep]
    for step in steps[1:]:
        assert (step.options.scheduler, step.options.workers, step.options.memory) == ("slurm", 32, "2GB")
        jobs = step.options.jobs
        assert (jobs.queue, jobs.account, jobs.walltime, jobs.interface) == ("cpu", "my_account", "04:00:00", "ib0")
        assert (jobs.job_memory, jobs.job_cores, jobs.min_workers) == ("16GB", 8, 8)


@pytest.mark.parametrize("name", ["local.toml", "slurm.toml"])
def test_every_line_of_the_workflows_is_explained(name):
    lines = [line for line in (WORKFLOWS / name).read_text().splitlines() if "=" in line.partition("#")[0]]
    assert len(lines) > 10
    assert [line for line in lines if "  # " not in line] == []


def test_steps_can_be_made_without_a_file(tmp_path):
    assert InspectStep.name == "inspect"
    step = PublishStep(tmp_path, ("runs",), made=(tmp_path / "made/k3",))
    assert step.results == (tmp_path / "k3",)
    with pytest.raises(UsageError, match="not known"):
        PublishStep(tmp_path, ("everything",))
    with pytest.raises(BadInput, match="is no finished result"):
        step.work(silent)
