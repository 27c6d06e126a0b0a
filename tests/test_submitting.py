"""submit: what is checked, what is written, what is submitted, and that nothing happens where it must not."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from standins import NASTY, WORST, shelf_of

from tsclust_ooc import cli
from tsclust_ooc.arguments import load_words
from tsclust_ooc.cli import build_app
from tsclust_ooc.cli.console import expand
from tsclust_ooc.cli.submit_command import settle
from tsclust_ooc.errors import BadInput, CannotWrite, TsclustError, UsageError
from tsclust_ooc.pipeline.submitting import SubmitOptions, Task, submit
from tsclust_ooc.runtime import Jobs

SLURM = SubmitOptions(scheduler="slurm")
PLANS = """
for word in "$@"; do
    if [[ $word == --init || $word == --dry-run ]]; then
        echo '{"n_partitions": 7, "memory_bytes": 1, "disk_bytes": 1}'
    fi
done
"""
COUNTS = """
n=$(ls "$RECORD" | wc -l)
echo "$((100 + n))"
"""


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """Stand-ins first on the PATH: sbatch answers with an id, tsclust with 7 partitions."""
    for variable in [name for name in os.environ if name.startswith("TSCLUST_")]:
        monkeypatch.delenv(variable)
    shelf = shelf_of(tmp_path, monkeypatch)
    shelf.put("sbatch", COUNTS)
    shelf.put("scancel")
    shelf.put("tsclust", PLANS)
    return shelf


def program_of(shelf):
    return (str(shelf.folder / "tsclust"),)


def tree(root):
    """Every path below `root` with its content, but the records of stand-ins."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else b""
        for path in sorted(root.rglob("*"))
        if "record" not in path.parts
    }


def consolidation(tmp_path):
    return Task(("consolidate", str(tmp_path / "src"), str(tmp_path / "out"), "--on-bad=skip"), tmp_path / "out")


def settled(*words, options=SLURM, jobs=Jobs(), config=None):
    return settle(build_app(config), words[0], tuple(words[1:]), options, jobs)


# ---- a consolidation


def test_a_consolidation_is_planned_now_and_becomes_an_array_and_a_job_that_publishes(tmp_path, shelf):
    done = submit(consolidation(tmp_path), SLURM, Jobs(), program_of(shelf))
    words = ["consolidate", str(tmp_path / "src"), str(tmp_path / "out"), "--on-bad=skip"]
    partitions, finalize = (job.script for job in done.jobs)
    assert shelf.calls() == [
        ["tsclust", *words, "--init", "--json"],
        ["sbatch", "--parsable", partitions],
        ["sbatch", "--parsable", "--dependency=afterany:102", finalize],
    ]
    folder = tmp_path / ".out.jobs"
    assert sorted(path.name for path in folder.iterdir()) == sorted([done.arguments, partitions, finalize])
    assert folder.stat().st_mode & 0o777 == 0o700
    assert load_words(folder / done.arguments) == words
    assert [job.id for job in done.jobs] == ["102", "103"]
    assert (done.n_partitions, done.n_tasks) == (7, 7)
    assert (done.watch, done.cancel) == ("squeue -j 102,103", "scancel 102 103")
    assert [job.logs for job in done.jobs] == ["partitions-102-*.log", "finalize-103.log"]


def test_more_partitions_than_tasks_are_folded(tmp_path, shelf):
    done = submit(consolidation(tmp_path), replace(SLURM, tasks=3), Jobs(), program_of(shelf))
    text = (tmp_path / ".out.jobs" / done.jobs[0].script).read_text()
    assert "#SBATCH --array=0-2\n" in text
    assert "partition < 7; partition += 3" in text


def test_jobs_in_the_queue_keep_their_arguments_when_other_work_is_submitted(tmp_path, shelf):
    first = submit(consolidation(tmp_path), SLURM, Jobs(), program_of(shelf))
    before = tree(tmp_path / ".out.jobs")
    other = Task((*consolidation(tmp_path).words, "--compress=zstd"), tmp_path / "out")
    second = submit(other, SLURM, Jobs(), program_of(shelf))
    again = submit(consolidation(tmp_path), SLURM, Jobs(), program_of(shelf))
    assert before.items() <= tree(tmp_path / ".out.jobs").items()
    assert first.arguments != second.arguments
    assert first.arguments == again.arguments


@pytest.mark.parametrize("flag", ["--init", "--partition=3", "--one-based", "--finalize", "--dry-run"])
def test_what_submit_gives_to_its_jobs_is_refused_from_others(flag, tmp_path, shelf):
    task = Task((*consolidation(tmp_path).words, flag), tmp_path / "out")
    with pytest.raises(UsageError, match=flag):
        submit(task, SLURM, Jobs(), program_of(shelf))
    assert shelf.calls() == []


@pytest.mark.parametrize(
    ("does", "kind", "words"),
    [
        ("exit 65", BadInput, "exit code 65"),
        ("exit 73", CannotWrite, "exit code 73"),
        ("exit 1", TsclustError, "exit code 1"),
        ("echo '{}'", TsclustError, "n_partitions"),
        ("echo '{\"n_partitions\": -1}'", TsclustError, "-1 partitions"),
        ("echo no json", TsclustError, "no json"),
        ("true", TsclustError, "n_partitions"),
    ],
)
def test_a_plan_that_fails_submits_nothing(does, kind, words, tmp_path, shelf):
    shelf.put("tsclust", does)
    with pytest.raises(kind, match=words) as caught:
        submit(consolidation(tmp_path), SLURM, Jobs(), program_of(shelf))
    assert "nothing was submitted" in str(caught.value)
    assert type(caught.value) is kind
    assert [call[0] for call in shelf.calls()] == ["tsclust"]
    assert not (tmp_path / ".out.jobs").exists()


def test_a_dataset_that_is_there_already_submits_nothing_and_is_no_failure(tmp_path, shelf):
    shelf.put("tsclust", "echo '{\"n_partitions\": 0}'")
    done = submit(consolidation(tmp_path), SLURM, Jobs(), program_of(shelf))
    assert done.jobs == ()
    assert [call[0] for call in shelf.calls()] == ["tsclust"]
    assert not (tmp_path / ".out.jobs").exists()


def test_when_the_second_job_is_refused_the_first_is_cancelled(tmp_path, shelf):
    shelf.put("sbatch", 'if [[ "$*" == *afterany* ]]; then echo "no such thing" >&2; exit 1; fi; echo 123')
    with pytest.raises(TsclustError, match=r"no such thing[\s\S]*123 was cancelled again"):
        submit(consolidation(tmp_path), SLURM, Jobs(), program_of(shelf))
    assert shelf.calls()[-1] == ["scancel", "123"]


def test_a_job_that_cannot_be_cancelled_is_named_with_the_command(tmp_path, shelf):
    shelf.put("sbatch", 'if [[ "$*" == *afterany* ]]; then exit 1; fi; echo 123')
    shelf.put("scancel", "echo 'slurmctld is away' >&2; exit 1")
    with pytest.raises(TsclustError, match=r"123 could not be cancelled \(slurmctld is away\): scancel 123"):
        submit(consolidation(tmp_path), SLURM, Jobs(), program_of(shelf))


# ---- nothing happens where it must not


@pytest.mark.parametrize("scheduler", ["slurm", "pbs", "sge", "lsf"])
def test_print_changes_nothing(scheduler, tmp_path, shelf):
    before = tree(tmp_path)
    options = SubmitOptions(scheduler=scheduler, print=True)
    done = submit(consolidation(tmp_path), options, Jobs(), program_of(shelf))
    assert tree(tmp_path) == before
    assert [call[0] for call in shelf.calls()] == ["tsclust"]
    assert shelf.calls()[0][-2:] == ["--dry-run", "--json"]
    assert list(done.texts) == [done.arguments, *(job.script for job in done.jobs)]
    assert json.loads(done.texts[done.arguments])["words"] == list(consolidation(tmp_path).words)
    assert [job.id for job in done.jobs] == ["", ""]


def test_what_is_printed_is_what_would_be_written(tmp_path, shelf):
    printed = submit(consolidation(tmp_path), replace(SLURM, print=True), Jobs(job_cores=2), program_of(shelf))
    written = submit(consolidation(tmp_path), SLURM, Jobs(job_cores=2), program_of(shelf))
    for job in written.jobs:
        assert (tmp_path / ".out.jobs" / job.script).read_text() == printed.texts[job.script]


@pytest.mark.parametrize(
    ("options", "jobs"),
    [
        (SubmitOptions(), Jobs()),
        (SubmitOptions(scheduler="threads"), Jobs()),
        (SLURM, Jobs(queue="a;b")),
        (SLURM, Jobs(walltime="never")),
        (SLURM, Jobs(directives=("--x\n",))),
    ],
)
def test_an_option_that_cannot_be_meant_is_refused_before_anything_happens(options, jobs, tmp_path, shelf):
    before = tree(tmp_path)
    with pytest.raises(UsageError):
        submit(consolidation(tmp_path), options, jobs, program_of(shelf))
    assert (tree(tmp_path), shelf.calls()) == (before, [])


def test_no_task_at_all_is_refused():
    with pytest.raises(UsageError, match="--tasks 0"):
        SubmitOptions(tasks=0)


def test_without_the_batch_system_nothing_is_planned_or_written(tmp_path, shelf, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    before = tree(tmp_path)
    with pytest.raises(TsclustError, match=r"qsub is not on the PATH[\s\S]*--print"):
        submit(consolidation(tmp_path), SubmitOptions(scheduler="sge"), Jobs(), program_of(shelf))
    assert (tree(tmp_path), shelf.calls()) == (before, [])


@pytest.mark.parametrize("kind", ["file", "link", "open"])
def test_a_job_folder_that_others_can_write_is_refused(kind, tmp_path, shelf):
    folder = tmp_path / ".out.jobs"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if kind == "file":
        folder.touch()
    elif kind == "link":
        folder.symlink_to(elsewhere)
    else:
        folder.mkdir()
        folder.chmod(0o770)
    with pytest.raises(CannotWrite, match=r"\.out\.jobs.*0700"):
        submit(consolidation(tmp_path), SLURM, Jobs(), program_of(shelf))
    assert [call[0] for call in shelf.calls()] == ["tsclust"]
    assert list(elsewhere.iterdir()) == []


# ---- the words of the command


def test_paths_are_made_absolute_and_options_are_settled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA", "/data/of me")
    monkeypatch.setenv("TSCLUST_MEMORY", "3GB")
    task = settled("cluster", "$DATA/ettm1", "run", "-k", "6", "--truth", "t.parquet", "--view=flatten", "--overwrite")
    assert task.words == (
        "cluster", "/data/of me/ettm1", str(tmp_path / "run"), "--clusters=6", "--memory=3GB", "--overwrite",
        f"--truth={tmp_path}/t.parquet",
    )  # fmt: skip
    assert task.result == tmp_path / "run"


def test_the_home_directory_is_expanded_and_scratch_is_left_to_the_job(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("TMPDIR", "/tmp/of-the-login-node")
    task = settled("distances", "~/ettm1", "~/d", "--scratch", "$TMPDIR/s")
    assert task.words == ("distances", "/home/ada/ettm1", "/home/ada/d", "--scratch=$TMPDIR/s")
    assert settled("distances", "~/ettm1", "~/d", "--scratch", "~/s").words[-1] == "--scratch=/home/ada/s"


def test_memory_is_left_to_the_job_where_nobody_gave_it():
    assert not [word for word in settled("consolidate", "/s", "/d").words if "memory" in word]


@pytest.mark.parametrize("name", [*NASTY, WORST])
def test_settled_words_mean_the_same_command(name):
    task = settled("cluster", f"./{name}", "/run", "-k", "3", f"--fit-split={name}", f"--truth=./{name}")
    function, bound, _ = build_app().parse_args(list(task.words), print_error=False, exit_on_error=False)
    assert function.__name__ == "cluster"
    assert bound.arguments["dataset"] == expand(Path(name)).absolute()
    assert bound.arguments["k"] == 3
    assert bound.arguments["options"].fit_split == name
    assert bound.arguments["options"].truth == expand(Path(name)).absolute()


def test_the_config_file_is_settled_too(tmp_path):
    config = tmp_path / "flow.toml"
    config.write_text('[cluster]\nview = "variable"\nscheduler = "local"\nseed = 5\n')
    words = settled("cluster", "/d", "/r", "-k", "2", "--seed", "6", config=str(config)).words
    assert words == ("cluster", "/d", "/r", "--clusters=2", "--view=variable", "--seed=6")


def test_inside_the_job_the_command_runs_on_threads_unless_told(monkeypatch):
    monkeypatch.setenv("TSCLUST_SCHEDULER", "slurm")  # of submit; in the job it would be the command's
    assert settled("cluster", "/d", "/r", "-k", "2").words == ("cluster", "/d", "/r", "--clusters=2")
    inner = replace(SLURM, inner_scheduler="local")
    assert settled("cluster", "/d", "/r", "-k", "2", options=inner).words[-1] == "--scheduler=local"


def test_a_driver_job_with_workers_of_its_own_asks_for_them_alike():
    inner = replace(SLURM, inner_scheduler="slurm")
    jobs = Jobs(queue="cpu", interface="ib0", job_cores=4, directives=("--constraint=avx512",))
    words = settled("cluster", "/d", "/r", "-k", "2", options=inner, jobs=jobs).words
    assert {"--scheduler=slurm", "--queue=cpu", "--interface=ib0", "--job-cores=4"} < set(words)
    assert "--directives=--constraint=avx512" in words


# ---- the command line


@pytest.fixture
def tsclust(tmp_path, monkeypatch, capsys, shelf):
    """Run a command line in tmp_path; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = cli.main(list(words))
        return (code, *capsys.readouterr())

    return run


def test_a_driver_job_is_submitted_and_the_person_is_told_how_to_watch_it(tsclust, tmp_path, shelf):
    code, out, _ = tsclust("submit", "cluster", "ettm1", "runs/k6", "-k", "6", "--scheduler", "slurm", "--queue", "cpu")
    assert code == 0
    folder = tmp_path / "runs" / ".k6.jobs"
    script = next(folder.glob("cluster-*.sh"))
    assert shelf.calls() == [["sbatch", "--parsable", script.name]]
    assert "#SBATCH --partition=cpu\n" in script.read_text()
    assert f"readonly program=({sys.executable} -m tsclust_ooc)\n" in script.read_text()
    words = load_words(next(folder.glob("args-*.json")))
    assert words == ["cluster", str(tmp_path / "ettm1"), str(tmp_path / "runs/k6"), "--clusters=6"]
    for part in ("job 101", f"{folder}/cluster-101.log", "squeue -j 101", "scancel 101"):
        assert part in out


@pytest.mark.parametrize(
    "line",
    [
        ["submit", "--scheduler", "slurm", "--queue=cpu", "cluster", "d", "r", "-k", "6", "--view", "mean"],
        ["submit", "cluster", "--scheduler=slurm", "d", "-k", "6", "r", "--view", "mean", "--queue", "cpu"],
        ["submit", "cluster", "-k6", "--view=mean", "--scheduler", "slurm", "--queue", "cpu", "--", "d", "r"],
    ],
)
def test_options_of_submit_may_stand_anywhere(line, tsclust, tmp_path):
    code, out, _ = tsclust(*line, "--json") if "--" not in line else tsclust(*line[:1], "--json", *line[1:])
    assert code == 0
    done = json.loads(out)
    words = load_words(Path(done["folder"]) / done["arguments"])
    assert words == ["cluster", str(tmp_path / "d"), str(tmp_path / "r"), "--clusters=6", "--view=mean"]
    assert [(job["role"], job["id"]) for job in done["jobs"]] == [("cluster", "101")]


def test_names_that_begin_with_a_dash_come_after_two(tsclust, tmp_path):
    code, out, _ = tsclust("submit", "distances", "--scheduler", "slurm", "--json", "--", "-d", "--out")
    done = json.loads(out)
    assert code == 0
    assert load_words(Path(done["folder"]) / done["arguments"])[1:] == [str(tmp_path / "-d"), str(tmp_path / "--out")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["cluster", "d", "r", "--scheduler", "slurm"], "requires an argument"),
        (["cluster", "d", "r", "-k", "six", "--scheduler", "slurm"], "six"),
        (["cluster", "d", "r", "-k", "6", "--veiw", "mean", "--scheduler", "slurm"], "--veiw"),
        (["cluster", "d", "r", "-k", "6", "--view", "maen", "--scheduler", "slurm"], "maen"),
        (["cluster", "d", "r", "-k", "6"], "--scheduler was not given"),
        (["cluster", "d", "r", "-k", "6", "--scheduler", "local"], "--inner-scheduler"),
        (["consolidate", "s", "d", "--scheduler", "slurm", "--dry-run"], "--dry-run"),
        (["verify", "d", "--scheduler", "slurm"], "verify"),
        (["cluster", "d", "r", "-k", "6", "--scheduler", "slurm", "--queue", "a b"], "--queue"),
    ],
)
def test_a_mistake_is_found_now_and_not_in_the_queue(line, said, tsclust, tmp_path, shelf):
    before = tree(tmp_path)
    code, out, err = tsclust("submit", *line)
    assert (code, out) == (2, "")
    assert said in err
    assert (tree(tmp_path), shelf.calls()) == (before, [])


def test_what_is_printed_can_be_pasted(tsclust, tmp_path, shelf):
    name = "it's; $(touch pwned)"
    code, out, _ = tsclust("submit", "distances", "d", f"{name}/out", "--scheduler", "slurm", "--print")
    assert code == 0
    assert shelf.calls() == []
    scripts = out.partition("# ---- distances-")[2]
    text, _, commands = scripts.partition("\n# ---- submit\n")
    assert text.partition("\n")[2].startswith("#!/bin/bash\n#SBATCH --job-name=tsclust-distances\n")
    enter, line = commands.splitlines()
    assert enter == f"""cd -- '{tmp_path}/it'"'"'s; $(touch pwned)/.out.jobs'"""
    assert line.startswith("sbatch --parsable distances-")


def test_the_config_file_reaches_submit_and_the_command(tsclust, tmp_path):
    (tmp_path / "f.toml").write_text('[submit]\nscheduler = "slurm"\nqueue = "cpu"\n[cluster]\nview = "mean"\n')
    code, out, _ = tsclust("submit", "cluster", "d", "r", "-k", "2", "--json", "--config", "f.toml")
    done = json.loads(out)
    assert code == 0
    assert load_words(tmp_path / ".r.jobs" / done["arguments"])[-1] == "--view=mean"
    assert "--partition=cpu" in (tmp_path / ".r.jobs" / done["jobs"][0]["script"]).read_text()


def test_the_real_plan_is_used_for_print(tsclust, tmp_path):
    demo, plan = ["demo", "src", "--quiet"], ["consolidate", "src", "d", "--dry-run", "--json"]
    assert tsclust(*demo)[0] == 0
    n_partitions = json.loads(tsclust(*plan)[1])["n_partitions"]
    code, out, _ = tsclust("submit", "consolidate", "src", "d", "--scheduler", "lsf", "--print", "--json")
    done = json.loads(out)
    assert code == 0
    assert done["n_partitions"] == n_partitions
    assert not list(tmp_path.glob(".d*"))
