"""Job scripts: the same text as agreed, clean, and they run exactly what was meant, whatever a path is called.

After an intended change of a template or of what a script is made from, write the golden files again:

    python tests/test_submission.py
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from standins import NASTY, WORST, shelf_of

from tsclust_ooc.arguments import load_words, save_words, with_file_read
from tsclust_ooc.errors import BadInput, TsclustError, UsageError
from tsclust_ooc.runtime import Jobs
from tsclust_ooc.runtime.asking import check_jobs, walltime_seconds
from tsclust_ooc.submission import (
    BATCHES,
    JobScript,
    check_batch,
    check_present,
    quote,
    render,
    submit_script,
)

GOLDEN = Path(__file__).parent / "golden"
WORKFLOWS = Path(__file__).parent.parent / "workflows" / "slurm"
ASKED = Jobs(queue="cpu", account="p-1234", walltime="04:00:00", job_memory="8GB", job_cores=4)
TASK_ENV = {
    "slurm": {"SLURM_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "{0}"},
    "pbs": {"PBS_JOBID": "77[{0}].server", "PBS_ARRAY_INDEX": "{0}"},
    "sge": {"JOB_ID": "77", "SGE_TASK_ID": "{1}"},
    "lsf": {"LSB_JOBID": "77", "LSB_JOBINDEX": "{1}"},
}
SINGLE_ENV = {
    "slurm": {"SLURM_JOB_ID": "77"},
    "pbs": {"PBS_JOBID": "77.server"},
    "sge": {"JOB_ID": "77", "SGE_TASK_ID": "undefined"},
    "lsf": {"LSB_JOBID": "77", "LSB_JOBINDEX": "0"},
}
REQUEUED = {"slurm": 75, "pbs": 75, "sge": 99, "lsf": 99}


def job_of(batch, role, **changes):
    job = JobScript(
        BATCHES[batch], role, "/home/ada/it's here/.ettm1.jobs", "args-0123456789ab.json",
        ("/opt/venv/bin/python", "-m", "tsclust_ooc"), ASKED,
    )  # fmt: skip
    return replace(job, **changes)


def golden_jobs():
    """Name of each golden file, and the job whose script it is."""
    for batch in BATCHES:
        yield f"{batch}-partitions.sh", job_of(batch, "partitions", n_partitions=2500, n_tasks=100)
        yield f"{batch}-finalize.sh", job_of(batch, "finalize")
        yield f"{batch}-cluster.sh", job_of(batch, "cluster", jobs=replace(ASKED, directives=("--later=1", "-x y")))


ALL = dict(golden_jobs())


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """Stand-ins first on the PATH; squeue says that the job runs."""
    shelf = shelf_of(tmp_path, monkeypatch)
    shelf.say("squeue", "RUNNING")
    return shelf


def run_script(job, folder, cwd, **env):
    """Run the script of `job` as a batch system would: from elsewhere, with what it sets."""
    (folder / "script.sh").write_text(render(job), encoding="ascii")
    env = {**os.environ, **env}
    return subprocess.run(
        ["bash", str(folder / "script.sh")], cwd=cwd, env=env, capture_output=True, text=True, timeout=30, check=False
    )


# ---- the text


@pytest.mark.parametrize("name", ALL)
def test_a_script_is_the_one_that_was_agreed(name):
    assert render(ALL[name]) == (GOLDEN / name).read_text(encoding="ascii")


def test_no_golden_file_is_left_over():
    assert {path.name for path in GOLDEN.glob("*.sh")} == set(ALL)


@pytest.mark.parametrize(
    "path", [*sorted(GOLDEN.glob("*.sh")), *sorted(WORKFLOWS.glob("*.sbatch"))], ids=lambda p: p.name
)
def test_bash_and_shellcheck_have_nothing_to_say(path):
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    done = subprocess.run(["shellcheck", "--shell=bash", path], capture_output=True, text=True, check=False)
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("batch", "role", "changes", "there", "not_there"),
    [
        ("slurm", "partitions", {"n_tasks": 1}, ["readonly task=0"], ["--array"]),
        ("pbs", "partitions", {"n_tasks": 1}, ["readonly task=0"], ["#PBS -J"]),
        ("sge", "partitions", {"n_tasks": 1}, ["readonly task=0"], ["#$ -t"]),
        ("lsf", "partitions", {"n_tasks": 1}, ["readonly task=0"], ["[1-"]),
        ("slurm", "cluster", {"jobs": Jobs()}, ["B:TERM@300"], ["--mem", "--time", "--partition", "--account", "cpus"]),
        ("pbs", "cluster", {"jobs": Jobs()}, [], ["-l ", "-q ", "-A "]),
        ("sge", "cluster", {"jobs": Jobs()}, ["-notify"], ["-l ", "-pe "]),
        ("lsf", "cluster", {"jobs": Jobs()}, ["-wa TERM"], ["-W ", "-M ", "-n "]),
        ("slurm", "cluster", {"jobs": Jobs(walltime="1-00:00:30")}, ["--time=24:00:30"], []),
        ("slurm", "cluster", {"jobs": Jobs(walltime="00:10:00")}, ["B:TERM@150"], []),
        ("lsf", "cluster", {"jobs": Jobs(walltime="01:00:01")}, ["-W 1:01"], []),
        ("sge", "cluster", {"jobs": Jobs(job_memory="8GiB", job_cores=3)}, ["h_vmem=2731M", "-pe smp 3"], []),
        ("pbs", "finalize", {}, ["ncpus=1:mem=7630mb"], []),
    ],
)  # fmt: skip
def test_what_was_not_asked_for_stands_in_no_directive(batch, role, changes, there, not_there):
    text = render(job_of(batch, role, **({"n_partitions": 7} | changes if role == "partitions" else changes)))
    directives = "".join(re.findall(r"^#(?:SBATCH|PBS|BSUB|\$).*\n", text, re.MULTILINE))
    assert [part for part in there if part not in text] == []
    assert [part for part in not_there if part in directives] == []


@pytest.mark.parametrize(("batch", "by_itself"), [("slurm", False), ("pbs", True), ("sge", True), ("lsf", False)])
def test_a_script_watches_the_clock_only_where_the_batch_system_does_not(batch, by_itself):
    assert ("STOP_AFTER=14100" in render(job_of(batch, "cluster"))) == by_itself
    assert "STOP_AFTER" not in render(job_of(batch, "cluster", jobs=Jobs()))


@pytest.mark.parametrize("name", ["100%j", "back\\slash"])
def test_a_folder_that_slurm_would_take_for_a_pattern_is_kept_from_it(name, tmp_path, shelf):
    folder = tmp_path / name
    folder.mkdir()
    program = shelf.put("tsclust", "echo progress\n")
    job = job_of("slurm", "cluster", folder=str(folder), program=(str(program),))
    assert "#SBATCH --output=/dev/null\n" in render(job)
    assert run_script(job, tmp_path, tmp_path, **SINGLE_ENV["slurm"]).stdout == ""
    assert (folder / "cluster-77.log").read_text() == "progress\n"


# ---- what a user gives


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(max_size=30).map(lambda b: os.fsdecode(b.replace(b"\0", b"0"))), min_size=1, max_size=20))
def test_bash_reads_every_quoted_word_back(words):
    line = " ".join(map(quote, words))
    assert line.isascii()
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    assert [os.fsdecode(word) for word in done.stdout.split(b"\0")[:-1]] == words


@pytest.mark.parametrize("name", [*NASTY, WORST])
def test_no_name_reaches_a_directive_or_begins_a_line(name):
    for batch in BATCHES:
        harmless = "/f" if {"%", "\\"}.isdisjoint(name) else "/%"
        plain = render(job_of(batch, "cluster", folder=harmless, program=("/p",))).splitlines()
        nasty = render(job_of(batch, "cluster", folder=f"/{name}", program=(f"/{name}",))).splitlines()
        changed = [line for line in nasty if line not in plain]
        assert len(nasty) == len(plain)
        assert [line.partition("=")[0] for line in changed] == ["readonly folder", "readonly program"]


@pytest.mark.parametrize(
    "jobs",
    [
        Jobs(queue="cpu\n#SBATCH --exclusive"),
        Jobs(queue="a b"),
        Jobs(queue=""),
        Jobs(queue="-x"),
        Jobs(account="$(id)"),
        Jobs(interface="$(id)"),
        Jobs(queue="cpu; rm -rf"),
        Jobs(queue="cpu\n#SBATCH --uid=0"),
        Jobs(account='p"q'),
        Jobs(account="é"),
        Jobs(walltime="soon"),
        Jobs(walltime="4"),
        Jobs(walltime="04:00:00\n"),
        Jobs(walltime="00:00:00"),
        Jobs(walltime="00:60:00"),
        Jobs(walltime="\N{ARABIC-INDIC DIGIT FOUR}4:00:00"),
        Jobs(job_memory="much"),
        Jobs(job_memory="1kB"),
        Jobs(job_cores=0),
        Jobs(directives=("-x\n#SBATCH -y",)),
        Jobs(directives=("constraint=avx512",)),
        Jobs(directives=("-x\r",)),
        Jobs(directives=("-é",)),
        Jobs(directives=("",)),
    ],
    ids=repr,
)
def test_what_must_not_stand_in_a_directive_is_refused(jobs):
    with pytest.raises(UsageError):
        check_jobs(jobs)


def test_what_may_stand_in_a_directive_is_taken():
    check_jobs(ASKED)
    check_jobs(Jobs(queue="gpu-long,cpu", walltime="2-00:00:00", interface="ib0", directives=("-C a",)))
    check_jobs(Jobs(queue="gpu,cpu@site:1", account="a+b.c_d", directives=('--comment="two words"', "-x")))


@pytest.mark.parametrize(("text", "seconds"), [("04:00:00", 14400), ("2-01:00:05", 176405), ("100:00:00", 360000)])
def test_a_time_limit_is_read(text, seconds):
    assert walltime_seconds(text) == seconds


@pytest.mark.parametrize("name", [None, "threads", "local", "Slurm", "tls://host:1"])
def test_what_is_no_batch_system_is_refused_with_those_that_are(name):
    with pytest.raises(UsageError, match=r"slurm, pbs, sge, lsf.*--inner-scheduler"):
        check_batch(name)


# ---- the arguments file


def test_words_come_back_from_the_arguments_file(tmp_path):
    save_words(tmp_path / "args.json", ["cluster", *NASTY, WORST, "", "base64:x"])
    assert load_words(tmp_path / "args.json") == ["cluster", *NASTY, WORST, "", "base64:x"]


def test_the_words_of_the_file_stand_in_place_of_the_option(tmp_path):
    save_words(tmp_path / "args.json", ["consolidate", "/a b", "/c"])
    line = ["--args-file", str(tmp_path / "args.json"), "--partition", "5"]
    assert with_file_read(line) == ["consolidate", "/a b", "/c", "--partition", "5"]
    assert with_file_read(["cluster", "--args-file", "x"]) == ["cluster", "--args-file", "x"]
    assert with_file_read([]) == []


@pytest.mark.parametrize(
    "body",
    [
        "", "[]", "{}", '{"format_version": 2, "words": ["x"]}', '{"format_version": 1, "words": []}',
        '{"format_version": 1, "words": "x"}', '{"format_version": 1, "words": [1]}',
        '{"format_version": 1, "words": ["x"], "more": 1}',
    ],
)  # fmt: skip
def test_a_damaged_arguments_file_is_refused_by_name(tmp_path, body):
    path = tmp_path / "args.json"
    path.write_text(body)
    with pytest.raises(BadInput, match=r"args\.json"):
        load_words(path)


def test_a_missing_arguments_file_is_refused(tmp_path):
    with pytest.raises(BadInput, match="No such file"):
        with_file_read(["--args-file", str(tmp_path / "none.json")])
    with pytest.raises(UsageError, match="needs a file"):
        with_file_read(["--args-file"])


# ---- the scripts run


@pytest.mark.parametrize(("batch", "name"), [("slurm", name) for name in NASTY] + [(b, WORST) for b in BATCHES])
def test_a_script_runs_the_program_and_nothing_else_whatever_the_paths_are_called(batch, name, tmp_path, shelf):
    folder, elsewhere = tmp_path / name / f".{name}.jobs", tmp_path / "elsewhere"
    folder.mkdir(parents=True)
    elsewhere.mkdir()
    program = shelf.put(name)
    save_words(folder / "args-1.json", ["cluster", f"/data/{name}"])
    job = job_of(batch, "cluster", folder=str(folder), arguments="args-1.json", program=(str(program), "-m", name))
    done = run_script(job, folder, elsewhere, **SINGLE_ENV[batch])
    assert (done.returncode, done.stderr) == (0, "")
    assert shelf.calls() == [[name, "-m", name, "--args-file", "args-1.json"]]
    assert load_words(folder / "args-1.json") == ["cluster", f"/data/{name}"]
    assert [path for path in tmp_path.rglob("*") if path.name == "pwned"] == []
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("batch", BATCHES)
def test_the_tasks_of_an_array_write_every_partition_once(batch, tmp_path, shelf):
    program = shelf.put("tsclust")
    job = job_of(batch, "partitions", folder=str(tmp_path), program=(str(program),), n_partitions=7, n_tasks=3)
    for task in range(3):
        env = {name: value.format(task, task + 1) for name, value in TASK_ENV[batch].items()}
        assert run_script(job, tmp_path, tmp_path, **env).returncode == 0
    calls = shelf.calls()
    assert [call[1:-1] for call in calls] == [["--args-file", "args-0123456789ab.json", "--partition"]] * 7
    assert [call[-1] for call in calls] == ["0", "3", "6", "1", "4", "2", "5"]


@pytest.mark.parametrize("batch", BATCHES)
def test_one_task_writes_them_all(batch, tmp_path, shelf):
    program = shelf.put("tsclust")
    job = job_of(batch, "partitions", folder=str(tmp_path), program=(str(program),), n_partitions=3, n_tasks=1)
    assert run_script(job, tmp_path, tmp_path, **SINGLE_ENV[batch]).returncode == 0
    assert [call[-1] for call in shelf.calls()] == ["0", "1", "2"]


@pytest.mark.parametrize(("code", "end", "written"), [(65, 65, 3), (1, 1, 2), (73, 73, 2)])
def test_a_bad_shard_does_not_keep_the_other_partitions_from_being_written(code, end, written, tmp_path, shelf):
    program = shelf.put("tsclust", f'[[ "${{@: -1}}" != 1 ]] || exit {code}\n')
    job = job_of("slurm", "partitions", folder=str(tmp_path), program=(str(program),), n_partitions=3, n_tasks=1)
    assert run_script(job, tmp_path, tmp_path, **SINGLE_ENV["slurm"]).returncode == end
    assert len(shelf.calls()) == written


def test_options_of_the_environment_do_not_reach_the_command(tmp_path, shelf):
    program = shelf.put("tsclust", "[[ -z ${TSCLUST_MEMORY:-}${TSCLUST_SCHEDULER:-} ]]\n")
    job = job_of("slurm", "cluster", folder=str(tmp_path), program=(str(program),))
    env = {**SINGLE_ENV["slurm"], "TSCLUST_MEMORY": "1GB", "TSCLUST_SCHEDULER": "slurm"}
    assert run_script(job, tmp_path, tmp_path, **env).returncode == 0


@pytest.mark.parametrize("batch", ["pbs", "sge", "lsf"])
def test_what_a_job_says_can_be_read_while_it_runs(batch, tmp_path, shelf):
    program = shelf.put("tsclust", "echo progress; echo trouble >&2\n")
    job = job_of(batch, "cluster", folder=str(tmp_path), program=(str(program),))
    assert run_script(job, tmp_path, tmp_path, **SINGLE_ENV[batch]).stdout == ""
    assert (tmp_path / "cluster-77.log").read_text() == "progress\ntrouble\n"


# ---- the end of a job

WAITS = """
trap 'echo saved >"$RECORD/../saved"; exit ${STATUS:-75}' TERM
touch "$RECORD/../started"
for ((i = 0; i < 300; i++)); do sleep 0.1; done
"""


def stop(script, started, number, whole_group=False):
    """Send a running script a signal once its child has started; returns the script's exit code."""
    deadline = time.monotonic() + 20
    while not started.exists():
        assert time.monotonic() < deadline
        assert script.poll() is None
        time.sleep(0.01)
    (os.killpg if whole_group else os.kill)(script.pid, number)
    return script.wait(timeout=20)


def start_script(job, folder, **env):
    (folder / "script.sh").write_text(render(job), encoding="ascii")
    words = ["bash", str(folder / "script.sh")]
    return subprocess.Popen(words, cwd=folder, env={**os.environ, **env}, start_new_session=True)


@pytest.mark.parametrize("batch", BATCHES)
def test_sigterm_reaches_the_command_which_saves_and_the_job_goes_on_later(batch, tmp_path, shelf):
    program = shelf.put("tsclust", WAITS)
    shelf.put("scontrol")
    shelf.put("qrerun")
    job = job_of(batch, "cluster", folder=str(tmp_path), program=(str(program),))
    with start_script(job, tmp_path, **SINGLE_ENV[batch]) as script:
        assert stop(script, tmp_path / "started", signal.SIGTERM) == REQUEUED[batch]
    assert (tmp_path / "saved").exists()
    # PBS sends SIGTERM only when it ends the job for good, or brings it back itself.
    assert shelf.calls()[1:] == ([["scontrol", "requeue", "77"]] if batch == "slurm" else [])


@pytest.mark.parametrize("state", ["COMPLETING", "PENDING", ""])
def test_a_job_that_was_cancelled_does_not_bring_itself_back(state, tmp_path, shelf):
    program = shelf.put("tsclust", WAITS)
    shelf.put("scontrol")
    shelf.say("squeue", state)
    job = job_of("slurm", "cluster", folder=str(tmp_path), program=(str(program),))
    with start_script(job, tmp_path, **SINGLE_ENV["slurm"]) as script:
        assert stop(script, tmp_path / "started", signal.SIGTERM) == 75
    assert [call[0] for call in shelf.calls()] == ["tsclust"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_the_notice_of_sge_goes_to_all_processes_and_the_command_gets_to_save(number, tmp_path, shelf):
    program = shelf.put("tsclust", WAITS)
    job = job_of("sge", "cluster", folder=str(tmp_path), program=(str(program),))
    with start_script(job, tmp_path, **SINGLE_ENV["sge"]) as script:
        assert stop(script, tmp_path / "started", number, whole_group=True) == 99
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("batch", ["pbs", "sge"])
def test_a_job_stops_itself_before_its_time_limit_where_nobody_tells_it(batch, tmp_path, shelf):
    program = shelf.put("tsclust", WAITS)
    shelf.put("qrerun")
    job = job_of(batch, "cluster", folder=str(tmp_path), program=(str(program),), jobs=Jobs(walltime="00:00:02"))
    assert run_script(job, tmp_path, tmp_path, **SINGLE_ENV[batch]).returncode == REQUEUED[batch]
    assert (tmp_path / "saved").exists()
    assert shelf.calls()[1:] == ([["qrerun", "77.server"]] if batch == "pbs" else [])


def test_a_command_that_ends_well_in_spite_of_the_signal_ends_the_job(tmp_path, shelf):
    program = shelf.put("tsclust", WAITS)
    job = job_of("slurm", "cluster", folder=str(tmp_path), program=(str(program),))
    with start_script(job, tmp_path, STATUS="0", **SINGLE_ENV["slurm"]) as script:
        assert stop(script, tmp_path / "started", signal.SIGTERM) == 0


@pytest.mark.parametrize("batch", BATCHES)
def test_a_job_that_never_gets_anywhere_stops_coming_back(batch, tmp_path, shelf):
    program = shelf.put("tsclust", "exit 75\n")
    shelf.put("scontrol")
    shelf.put("qrerun")
    job = job_of(batch, "cluster", folder=str(tmp_path), program=(str(program),))
    (tmp_path / "restarts-77").write_text("once\n" * 49)
    env = {**SINGLE_ENV[batch], "SLURM_RESTART_COUNT": "49"}
    assert run_script(job, tmp_path, tmp_path, **env).returncode == REQUEUED[batch]
    n_calls = len(shelf.calls())
    assert run_script(job, tmp_path, tmp_path, **env | {"SLURM_RESTART_COUNT": "50"}).returncode == 75
    assert [call[0] for call in shelf.calls()[n_calls:]] == ["tsclust"]


@pytest.mark.parametrize("batch", BATCHES)
def test_finalize_does_not_wait_for_partitions_that_nobody_writes(batch, tmp_path, shelf):
    program = shelf.put("tsclust", "exit 75\n")
    shelf.put("scontrol")
    job = job_of(batch, "finalize", folder=str(tmp_path), program=(str(program),))
    assert run_script(job, tmp_path, tmp_path, **SINGLE_ENV[batch]).returncode == 75
    assert shelf.calls() == [["tsclust", "--args-file", "args-0123456789ab.json", "--finalize"]]


def test_a_requeue_that_is_refused_is_said(tmp_path, shelf):
    program = shelf.put("tsclust", "exit 75\n")
    shelf.put("scontrol", "exit 1\n")
    job = job_of("slurm", "cluster", folder=str(tmp_path), program=(str(program),))
    done = run_script(job, tmp_path, tmp_path, **SINGLE_ENV["slurm"])
    assert done.returncode == 75
    assert "submit the same work again" in done.stderr


@pytest.mark.parametrize("name", ["cluster", "consolidate"])
def test_the_script_to_copy_passes_sigterm_on_and_goes_back_into_the_queue(name, tmp_path, shelf):
    shelf.put("tsclust", WAITS)
    shelf.put("scontrol")
    env = {**os.environ, "SLURM_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"}
    words = ["bash", str(WORKFLOWS / f"{name}.sbatch"), "a b", "c;d"]
    with subprocess.Popen(words, cwd=tmp_path, env=env) as script:
        assert stop(script, tmp_path / "started", signal.SIGTERM) == 75
    more = ["--partition", "3"] if name == "consolidate" else []
    assert shelf.calls() == [["tsclust", name, "a b", "c;d", *more], ["scontrol", "requeue", "77"]]


def test_the_script_to_copy_stays_cancelled(tmp_path, shelf):
    shelf.put("tsclust", WAITS)
    shelf.put("scontrol")
    shelf.say("squeue", "COMPLETING")
    env = {**os.environ, "SLURM_JOB_ID": "77"}
    with subprocess.Popen(["bash", str(WORKFLOWS / "cluster.sbatch")], cwd=tmp_path, env=env) as script:
        assert stop(script, tmp_path / "started", signal.SIGTERM) == 75
    assert shelf.calls() == [["tsclust", "cluster"]]


def test_the_script_to_copy_gives_up_in_the_end(tmp_path, shelf):
    shelf.put("tsclust", WAITS)
    shelf.put("scontrol")
    env = {**os.environ, "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "50"}
    with subprocess.Popen(["bash", str(WORKFLOWS / "cluster.sbatch")], cwd=tmp_path, env=env) as script:
        assert stop(script, tmp_path / "started", signal.SIGTERM) == 75
    assert shelf.calls() == [["tsclust", "cluster"]]


# ---- the batch systems' programs

ANSWERS = {
    "slurm": [("123", "123"), ("123;cluster-1", "123")],
    "pbs": [("123.server.site", "123.server.site"), ("123[].server", "123[].server")],
    "sge": [("123", "123"), ("123.1-40:1", "123")],
    "lsf": [
        ("Job <123> is submitted to queue <normal>.", "123"),
        ("Job <123> is submitted to default queue <normal>.", "123"),
    ],
}  # fmt: skip
SUBMITTED = {
    "slurm": ["sbatch", "--parsable", "--dependency=afterany:9", "job.sh"],
    "pbs": ["qsub", "-W", "depend=afterany:9", "job.sh"],
    "sge": ["qsub", "-terse", "-hold_jid", "9", "job.sh"],
    "lsf": ["bsub", "-w", "ended(9)"],
}


@pytest.mark.parametrize(("batch", "said", "job_id"), [(b, *pair) for b in ANSWERS for pair in ANSWERS[b]])
def test_a_job_is_submitted_from_its_folder_and_its_id_is_understood(batch, said, job_id, tmp_path, shelf):
    program = SUBMITTED[batch][0]
    shelf.put(program, f"pwd >cwd; cat >stdin; echo 'a note of the site'; echo '{said}'\n")
    (tmp_path / "job.sh").write_text("the script\n")
    assert submit_script(BATCHES[batch], tmp_path, "job.sh", after="9") == job_id
    assert shelf.calls() == [SUBMITTED[batch]]
    assert (tmp_path / "cwd").read_text() == f"{tmp_path}\n"
    assert (tmp_path / "stdin").read_text() == ("the script\n" if batch == "lsf" else "")


@pytest.mark.parametrize("said", ["", "Submitted batch job 123", "123 456", "error", "0x12"])
def test_an_answer_that_is_no_job_id_is_refused(said, tmp_path, shelf):
    shelf.put("sbatch", f"echo '{said}'\n")
    (tmp_path / "job.sh").touch()
    with pytest.raises(TsclustError, match="names no job"):
        submit_script(BATCHES["slurm"], tmp_path, "job.sh")


def test_a_refusal_is_passed_on_in_the_words_of_the_batch_system(tmp_path, shelf):
    shelf.put("sbatch", "echo 'sbatch: error: invalid partition specified: cpu' >&2; exit 1\n")
    (tmp_path / "job.sh").touch()
    with pytest.raises(TsclustError, match="invalid partition specified: cpu"):
        submit_script(BATCHES["slurm"], tmp_path, "job.sh")


def test_a_batch_system_that_is_not_here_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TsclustError, match=r"bsub is not on the PATH.*--print"):
        check_present(BATCHES["lsf"])


def test_the_arguments_file_has_the_format_that_is_documented(tmp_path):
    save_words(tmp_path / "args.json", ["cluster", "/a b"])
    body = json.loads((tmp_path / "args.json").read_text())
    assert body == {"format_version": 1, "words": ["cluster", "/a b"]}


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for golden_name, golden_job in golden_jobs():
        (GOLDEN / golden_name).write_text(render(golden_job), encoding="ascii")
