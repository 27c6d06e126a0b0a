"""The command line: what it prints where, with which exit code, from which of its sources an option comes."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import SIZES, three_splits, write_source

from tsclust_ooc import __version__, locks, scratch
from tsclust_ooc.cli import COMMANDS, main
from tsclust_ooc.cli.console import OutputOptions
from tsclust_ooc.cli.consolidate_command import Step
from tsclust_ooc.pipeline.clustering import ClusterOptions, ComputeOptions
from tsclust_ooc.pipeline.consolidating import ConsolidateOptions
from tsclust_ooc.pipeline.distancing import DistancesOptions
from tsclust_ooc.pipeline.looking import InspectOptions
from tsclust_ooc.pipeline.submitting import SubmitOptions
from tsclust_ooc.runtime import Jobs


def flat(options):
    """Names of the flags of an options dataclass; those of a nested one stand beside its own."""
    own = [f.name for f in fields(options) if f.name != "jobs"]
    return own if len(own) == len(fields(options)) else [*own, *flat(Jobs)]


OPTIONS = {
    "demo": ["samples", "seed"],
    "inspect": [f.name for f in fields(InspectOptions)],
    "consolidate": [*flat(ConsolidateOptions), *flat(Step)],
    "verify": ["against", "also", "workers"],
    "status": [],
    "cluster": ["clusters", *flat(ClusterOptions)],
    "predict": flat(ComputeOptions),
    "evaluate": ["truth"],
    "distances": flat(DistancesOptions),
    "report": [],
    "submit": [*flat(SubmitOptions), *flat(Jobs), "config"],
    "run": ["set", "dry_run"],
}
ESCAPE = "\x1b[31m"


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch):
    """A wide terminal, no options from outside, and the signal handlers as they were."""
    monkeypatch.setenv("COLUMNS", "250")
    for name in [name for name in os.environ if name.startswith("TSCLUST_")]:
        monkeypatch.delenv(name)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A source, its dataset, a run of it, and a truth table."""
    folder = tmp_path_factory.mktemp("cli")
    write_source(folder / "source", three_splits())
    before = signal.getsignal(signal.SIGTERM)
    common = ["--scratch", str(folder), "--quiet", "--workers", "2"]
    assert main(["consolidate", str(folder / "source"), str(folder / "dataset"), "--chunk-bytes", "4096", *common]) == 0
    assert main(["cluster", str(folder / "dataset"), str(folder / "run"), "-k", "3", *common]) == 0
    signal.signal(signal.SIGTERM, before)
    rows = [(split, str(i), "ab"[i % 2]) for split, n in SIZES.items() for i in range(n)]
    table = dict(zip(("split", "sample_id", "class"), zip(*rows, strict=True), strict=True))
    pq.write_table(pa.table(table), folder / "truth.parquet")
    return folder


@pytest.fixture
def command(tsclust, place, tmp_path):
    """Run a command that computes, with its scratch in tmp_path."""
    return lambda *words: tsclust(*words, "--scratch", tmp_path)


def one_line(out):
    """The one line of JSON that is all of `out`."""
    assert out.count("\n") == 1
    assert out.endswith("\n")
    return json.loads(out)


def child(*words, **options):
    """A `tsclust` process of its own group."""
    return subprocess.Popen(
        [sys.executable, "-m", "tsclust_ooc", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options,
    )  # fmt: skip


# help


def test_help_names_every_command_and_every_exit_code(tsclust):
    code, out, _ = tsclust("--help")
    assert code == 0
    assert all(re.search(rf"\b{name}\b", out) for name in COMMANDS)
    assert all(f"{n} " in out for n in (0, 1, 2, 65, 73, 75))
    assert "--config" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_every_option_it_has(tsclust, name):
    code, out, _ = tsclust(name, "--help")
    assert code == 0
    for option in (*OPTIONS[name], *(f.name for f in fields(OutputOptions))):
        flag = "--" + option.replace("_", "-")
        assert re.search(rf"{flag}\b[^│]*\w{{3}}.*│?$", out, re.MULTILINE), f"{flag} has no line in the help"
    told = {f for f in re.findall(r"--[a-z][a-z-]+", out) if not f.startswith("--no-")}
    if name == "submit":
        told -= {"--scratch", "--workers"}  # of the command that is submitted
    assert told <= {"--" + o.replace("_", "-") for o in (*OPTIONS[name], *(f.name for f in fields(OutputOptions)))}


def test_the_first_help_loads_nothing_that_computes():
    script = """
import sys
from tsclust_ooc.cli import main
code = main(["--help"])
heavy = {"numpy", "zarr", "h5py", "dask", "numba", "pyarrow", "sklearn"} & set(sys.modules)
sys.exit(f"{code} {sorted(heavy)}" if code or heavy else 0)
"""
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_the_version_is_the_packages():
    words = [sys.executable, "-m", "tsclust_ooc", "--version"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == f"{__version__}\n"


# --json


def test_inspect_json(tsclust, place):
    code, out, err = tsclust("inspect", place / "source", "--json")
    said = one_line(out)
    assert (code, err) == (0, "")
    assert (said["n_shards"], said["n_samples"]) == (sum(SIZES.values()),) * 2
    assert said["bytes"] == sum(p.stat().st_size for p in (place / "source").rglob("*.h5"))
    assert (said["key"], said["layout"], said["item_shape"]) == ("embeddings", "item-per-file", [3, 16])
    assert np.dtype(said["dtype"]) == np.float32
    assert {name: (s["n_shards"], s["n_samples"]) for name, s in said["splits"].items()} == {
        name: (n, n) for name, n in SIZES.items()
    }
    assert said["problems"] == []


def test_inspect_json_lists_problems_by_path_code_and_detail(tsclust, tmp_path):
    write_source(tmp_path / "source", three_splits(sizes={"train": 5}))
    (tmp_path / "source/train/2.h5").write_bytes(b"")
    code, out, _ = tsclust("inspect", tmp_path / "source", "--json")
    assert code == 0
    (problem,) = one_line(out)["problems"]
    assert (problem["path"], problem["code"]) == ("train/2.h5", "empty-file")
    assert problem["detail"]


def test_consolidate_and_verify_json(command, tsclust, place, tmp_path):
    code, out, err = command("consolidate", place / "source", tmp_path / "dataset", "--json")
    said = one_line(out)
    assert (code, err) == (0, "")
    assert {"n_shards", "n_samples", "n_rejected", "bytes", "seconds", "peak_bytes", "digest"} <= set(said)
    assert (said["n_samples"], said["n_rejected"]) == (sum(SIZES.values()), 0)
    code, out, _ = tsclust("verify", tmp_path / "dataset", "--against", place / "source", "--json")
    assert (code, one_line(out)["n_samples_compared"], one_line(out)["damage"]) == (0, sum(SIZES.values()), [])


def test_cluster_predict_evaluate_and_report_json(command, tsclust, place, tmp_path):
    code, out, _ = command("cluster", place / "dataset", tmp_path / "run", "-k", 3, "--json")
    said = one_line(out)
    assert code == 0
    assert {"k", "inertia", "n_iter", "n_passes", "bytes_read", "seconds", "peak_bytes", "sizes"} <= set(said)
    assert (said["k"], sum(said["sizes"])) == (3, SIZES["train"])
    code, out, _ = command("predict", tmp_path / "run", place / "dataset", tmp_path / "out", "--json")
    assert (code, one_line(out)["splits"]) == (0, SIZES)
    code, out, _ = tsclust("evaluate", tmp_path / "run", "--truth", place / "truth.parquet", "--json")
    assert (code, set(one_line(out))) == (0, {*SIZES, "all"})
    code, out, _ = tsclust("report", tmp_path / "run", "--json")
    assert (code, one_line(out)) == (0, {"report": str(tmp_path / "run-report.html")})


def test_demo_and_dry_run_json(command, tsclust, place, tmp_path):
    code, out, _ = tsclust("demo", tmp_path / "demo", "--samples", 8, "--json")
    assert (code, one_line(out)["samples"]) == (0, [8, 2, 2])
    code, out, _ = command("consolidate", place / "source", tmp_path / "dataset", "--dry-run", "--json")
    assert (code, one_line(out)["n_samples"]) == (0, sum(SIZES.values()))
    assert not (tmp_path / "dataset").exists()


def test_an_error_is_one_line_of_json_too(command, tmp_path):
    write_source(tmp_path / "source", three_splits(sizes={"train": 5}))
    (tmp_path / "source/train/2.h5").write_bytes(b"no HDF5 at all")
    code, out, err = command("consolidate", tmp_path / "source", tmp_path / "dataset", "--json")
    said = one_line(out)
    assert (code, said["exit_code"]) == (65, 65)
    assert [(p["path"], p["code"]) for p in said["problems"]] == [("train/2.h5", "not-hdf5")]
    assert said["error"].split("\n")[0] in err


# what a person sees


def test_results_go_to_stdout_and_progress_to_stderr(command, place, tmp_path):
    code, out, err = command("cluster", place / "dataset", tmp_path / "run", "-k", 3)
    assert code == 0
    assert "converged" in out
    assert f'pandas.read_parquet("{tmp_path / "run/labels"}")' in out
    assert "pass 1 " in err
    assert "pass 1 " not in out


def test_quiet_is_quiet_and_a_log_file_keeps_what_was_said(command, place, tmp_path, monkeypatch):
    monkeypatch.setenv("LOGS", str(tmp_path))
    words = ("cluster", place / "dataset", tmp_path / "run", "-k", 3, "--quiet", "--log-file", "$LOGS/log")
    assert command(*words) == (0, "", "")
    lines = (tmp_path / "log").read_text().splitlines()
    assert any(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d pass 1 ", line) for line in lines)


def test_numbers_of_an_inspection_are_those_of_the_folder(tsclust, place):
    code, out, _ = tsclust("inspect", place / "source")
    assert code == 0
    assert re.search(r"train +60 +60 +train/0\.h5 +train/59\.h5 +-", out)
    assert "no problems" in out
    assert f"Next: tsclust consolidate {place / 'source'} " in out


@pytest.mark.parametrize("name", ["inspect", "consolidate"])
def test_a_terminal_escape_in_a_file_name_is_shown_and_not_obeyed(command, tsclust, tmp_path, name):
    write_source(tmp_path / "source", three_splits(sizes={"train": 5}))
    (tmp_path / f"source/train/{ESCAPE}9.h5").write_bytes(b"")
    call = tsclust if name == "inspect" else command
    code, out, err = call(name, tmp_path / "source", *([tmp_path / "dataset"] if name == "consolidate" else []))
    assert code == (0 if name == "inspect" else 65)
    assert "\x1b" not in out + err
    assert r"train/\x1b[31m9.h5" in out + err


def test_a_terminal_escape_in_an_argument_is_not_obeyed_either(tsclust, tmp_path):
    for words in (["verify", tmp_path / f"no{ESCAPE}such"], ["cluster", "a", "b", "-k", ESCAPE], [f"{ESCAPE}x"]):
        _, out, err = tsclust(*words)
        assert "\x1b" not in out + err
        assert r"\x1b[31m" in err


# exit codes


def test_usage_errors_end_in_2(command, tsclust, place, tmp_path):
    run = ("cluster", place / "dataset", tmp_path / "run")
    for words, said in (
        ([*run], "-k"),
        ([*run, "-k", "two"], '"two"'),
        ([*run, "-k", "0"], "n_clusters=0"),
        ([*run, "-k", "3", "--frobnicate"], "--frobnicate"),
        ([*run, "-k", "3", "--view", "sideways"], "flatten, variable, mean"),
        ([*run, "-k", "3", "--memory", "lots"], "4GB"),
        ([*run, "-k", "3", "--memory", "1MB"], "Use at least"),
        ([*run, "-k", "3", "--workers", "0"], "--workers 0"),
        ([*run, "-k", "3", "--scheduler", "fax"], "threads, local"),
        ([*run, "-k", "3", "--seed", "-1"], "--seed -1"),
        ([*run, "-k", "3", "--fit-split", "nope"], "train, val, test"),
        (["consolidate", place / "source", tmp_path / "d", "--on-bad", "cry"], "fail or skip"),
        (["consolidate", place / "source", tmp_path / "d", "--compress", "rar"], "zstd"),
        (["consolidate", place / "source", tmp_path / "d", "--chunk-bytes", "1"], "16MiB"),
        (["consolidate", place / "source", place / "source/d"], "which is only read from"),
    ):
        code, out, err = command(*words)
        assert (code, out) == (2, ""), words
        assert err.startswith("tsclust: ")
        assert said in err
    for words in (["frobnicate"], ["demo"], ["demo", tmp_path / "x", "--samples", "1"]):
        assert tsclust(*words)[0] == 2
    assert not (tmp_path / "run").exists()


def test_bad_input_ends_in_65(command, tsclust, place, tmp_path):
    (tmp_path / "file").write_text("x")
    for words, said in (
        (["cluster", place / "dataset", tmp_path / "run", "-k", "61"], "61 clusters cannot be made of 60 rows"),
        (["cluster", tmp_path / "none", tmp_path / "run", "-k", "3"], "none is not a dataset"),
        (["cluster", place / "source", tmp_path / "run", "-k", "3"], "source is not a dataset"),
        (["cluster", tmp_path / "file", tmp_path / "run", "-k", "3"], "file is a file, not a dataset"),
        (["consolidate", tmp_path / "none", tmp_path / "d"], "none is not there"),
        (["predict", place / "dataset", place / "dataset", tmp_path / "out"], "manifest.json"),
    ):
        code, out, err = command(*words)
        assert (code, out) == (65, ""), words
        assert said in err
    for words in (["verify", tmp_path / "file"], ["inspect", tmp_path / "file"], ["report", tmp_path / "file"],
                  ["evaluate", place / "run", "--truth", tmp_path / "file"]):  # fmt: skip
        assert tsclust(*words)[0] == 65


def test_a_place_that_cannot_be_written_ends_in_73(command, tsclust, place, tmp_path):
    (tmp_path / "file").write_text("x")
    for words in (
        ["cluster", place / "dataset", place / "run", "-k", "4"],
        ["cluster", place / "dataset", tmp_path / "file", "-k", "3"],
        ["cluster", place / "dataset", tmp_path / "file/run", "-k", "3"],
        ["cluster", place / "dataset", tmp_path / "run", "-k", "3", "--log-file", tmp_path / "none/log"],
        ["consolidate", place / "source", tmp_path / "file"],
        ["consolidate", place / "source", place / "dataset", "--compress", "zstd"],
    ):
        code, _, err = command(*words)
        assert code == 73, (words, err)
    assert tsclust("demo", tmp_path / "file")[0] == 73
    assert tsclust("cluster", place / "dataset", tmp_path / "run", "-k", 3, "--scratch", tmp_path / "none")[0] == 73
    assert (tmp_path / "file").read_text() == "x"


def test_a_busy_name_and_an_unfinished_dataset_end_in_75(command, place, tmp_path):
    local = scratch.scratch_dir(tmp_path)
    for purpose, words in (
        ("run", ["cluster", place / "dataset", tmp_path / "run", "-k", "3"]),
        ("consolidate", ["consolidate", place / "source", tmp_path / "dataset"]),
    ):
        lock = locks.name_for(local, purpose, tmp_path / words[2])
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            code, _, err = command(*words)
        assert code == 75
        assert "another process" in err
    (tmp_path / ".dataset.0123456789ab.wip/dataset").mkdir(parents=True)
    code, _, err = command("cluster", tmp_path / "dataset", tmp_path / "run", "-k", 3)
    assert code == 75
    assert "Run the same consolidate command again" in err


def test_what_the_system_refuses_ends_in_1_and_names_the_file(tsclust, place, tmp_path):
    (tmp_path / "folder").mkdir()
    code, out, err = tsclust("report", place / "run", tmp_path / "folder")
    assert (code, out) == (1, "")
    assert str(tmp_path) in err
    assert "Is a directory" in err


def test_damage_ends_in_65_and_names_the_file(command, tsclust, place, tmp_path):
    assert command("consolidate", place / "source", tmp_path / "dataset")[0] == 0
    chunk = next(p for p in (tmp_path / "dataset/data.zarr/val/embeddings/c").rglob("*") if p.is_file())
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    code, out, err = tsclust("verify", tmp_path / "dataset", "--json")
    assert code == 65
    assert str(chunk.relative_to(tmp_path / "dataset")) in err
    lines = out.splitlines()
    assert json.loads(lines[-1])


# where options come from


def chunks_of(command, place, *more):
    code, out, err = command("consolidate", place / "source", place / "none", "--dry-run", "--json", *more)
    assert code == 0, err
    return json.loads(out)["n_chunks"]


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default(
    command, place, tmp_path, monkeypatch
):
    by_bytes = {size: sum(-(-n // (size // 192)) for n in SIZES.values()) for size in (4096, 4800, 6000)}
    assert len(set(by_bytes.values())) == 3
    config = tmp_path / "flow.toml"
    config.write_text('[consolidate]\nchunk-bytes = "4096"\n[cluster]\nclusters = 3\n')
    assert chunks_of(command, place) == len(SIZES)
    assert chunks_of(command, place, "--config", config) == by_bytes[4096]
    assert chunks_of(command, place, f"--config={config}") == by_bytes[4096]
    monkeypatch.setenv("TSCLUST_CHUNK_BYTES", "4800")
    assert chunks_of(command, place, "--config", config) == by_bytes[4800]
    assert chunks_of(command, place, "--config", config, "--chunk-bytes", "6000") == by_bytes[6000]


def test_k_too_comes_from_flag_environment_or_file(command, place, tmp_path, monkeypatch):
    config = tmp_path / "flow.toml"
    config.write_text("[cluster]\nclusters = 2\nmax_iter = 5\nquiet = true\n")

    def k_of(name, *more):
        code, out, err = command("cluster", place / "dataset", tmp_path / name, "--json", *more)
        assert code == 0, err
        return json.loads(out)["k"]

    assert k_of("a", "--config", config) == 2
    assert json.loads((tmp_path / "a/manifest.json").read_text())["options"]["max_iter"] == 5
    monkeypatch.setenv("TSCLUST_K", "4")
    assert k_of("b", "--config", config) == 4
    assert k_of("c", "--config", config, "-k", "5") == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[consolidate]\nchunk_bites = 4096\n", "chunk_bites"),
        ("[cunsolidate]\nchunk_bytes = 4096\n", "cunsolidate is no section"),
        ("chunk_bytes = 4096\n", "chunk_bytes is no section"),
        ("consolidate = 3\n", "consolidate is no section"),
        ("[consolidate\n", "is not TOML"),
        ('[consolidate]\non_bad = "cry"\n', "fail or skip"),
        ('[consolidate]\nworkers = "two"\n', "workers"),
        (None, "No such file"),
    ],
)
def test_a_file_of_options_that_cannot_be_meant_is_refused(command, place, tmp_path, text, said):
    config = tmp_path / "flow.toml"
    if text is not None:
        config.write_text(text)
    code, out, err = command("consolidate", place / "source", tmp_path / "d", "--dry-run", "--config", config)
    assert (code, out) == (2, "")
    assert said in err


def test_config_without_a_file_is_refused(tsclust):
    code, _, err = tsclust("inspect", "x", "--config")
    assert code == 2
    assert "--config needs a file" in err


def test_home_and_variables_in_paths_are_expanded(tsclust, place, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(place))
    (tmp_path / "my.toml").write_text("[cluster]\nclusters = 3\n")
    assert tsclust("inspect", "$PLACE/source")[0] == 0
    assert tsclust("consolidate", "$PLACE/source", "~/dataset", "--scratch", "~")[0] == 0
    assert tsclust("verify", "~/dataset", "--against", "${PLACE}/source")[0] == 0
    words = ("--config", "~/my.toml", "--truth", "$PLACE/truth.parquet", "--scratch", "~")
    assert tsclust("cluster", "~/dataset", "~/run", *words)[0] == 0
    assert tsclust("predict", "~/run", "$PLACE/dataset", "~/out", "--scratch", "$HOME")[0] == 0
    assert tsclust("evaluate", "~/out", "--truth", "$PLACE/truth.parquet")[0] == 0
    assert tsclust("report", "~/run", "~/page.html")[0] == 0
    assert {"dataset", "run", "out", "page.html"} <= {p.name for p in tmp_path.iterdir()}


# interrupts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_saves_what_is_done_and_the_same_command_finishes(tsclust, tmp_path, number):
    rows = np.random.default_rng(0).standard_normal((15_000, 16)).astype("f4")
    (tmp_path / "source").mkdir()
    with h5py.File(tmp_path / "source/0.h5", "w") as file:
        file["features"] = rows
    words = ["consolidate", tmp_path / "source", tmp_path / "dataset", "--chunk-bytes", "4096", "--workers", "1"]
    words += ["--scratch", tmp_path, "--layout", "rows-per-file"]
    process = child(*words)
    while process.poll() is None and not list(tmp_path.glob(".dataset.*.wip/receipts/*.json")):
        time.sleep(0.005)
    os.killpg(process.pid, number)  # as a terminal or a scheduler does: the whole group
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "Traceback" not in err
    assert f"Go on with: tsclust consolidate {tmp_path / 'source'} " in err
    assert not (tmp_path / "dataset").exists()
    (work,) = tmp_path.glob(".dataset.*.wip")
    kept = {p.name: p.stat().st_mtime_ns for p in (work / "receipts").glob("*.json")}
    assert kept
    code, out, _ = tsclust(*words, "--json")
    assert (code, one_line(out)["n_samples"]) == (0, 15_000)
    assert tsclust("verify", tmp_path / "dataset", "--against", tmp_path / "source")[0] == 0
    assert not list(tmp_path.glob(".dataset.*"))


def test_a_reader_that_goes_away_is_no_failure_worth_a_traceback(place):
    process = child("inspect", place / "source")
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() in (0, 1)
    assert "Traceback" not in err
