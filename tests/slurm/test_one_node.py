"""The Slurm of the tests does what a real cluster does with our jobs: arrays, requeues, signals, memory limits."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from one_node import CPUS, SlurmTrouble, environment, one_node, parse_jobs, processes_of, tail

OUTLIVES_ITS_PARENTS = "setsid sleep 1000 & sleep 1000"
ALL = {"munged", "slurmctld", "slurmd", "slurmstepd", "sleep"}
TAKES_400_MB = "x = b'x' * (400 << 20); import time; time.sleep(60)"
ARRIVED = "touch arrived-$SLURM_ARRAY_TASK_ID; until [ $(ls arrived-* | wc -l) = 4 ]; do sleep 0.1; done; echo together"
STAYS_THE_FIRST_TIME = 'echo "run ${SLURM_RESTART_COUNT:-0}"; test -n "$SLURM_RESTART_COUNT" || sleep 1000'
WARNED = """#!/bin/bash
trap 'echo heard TERM; exit 0' TERM
echo listening
sleep 1000 &
wait
"""


def until(condition, seconds=30):
    """Wait for what another process does; fails when it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def output(folder, job):
    path = folder / f"slurm-{job}.out"
    return path.read_text() if path.exists() else ""


def programs(conf):
    """The names of what runs of the Slurm of a slurm.conf."""
    return {tail(Path(f"/proc/{pid}/comm")) for pid in processes_of(conf)}


@pytest.fixture(scope="module", autouse=True)
def warned(slurm, tmp_path_factory):
    """A job of one minute to be warned a minute before its end: submitted first, as slurmctld looks every 30 s."""
    folder = tmp_path_factory.mktemp("warned")
    (folder / "job.sh").write_text(WARNED)
    return folder, slurm.sbatch("--mem=50M", "--time=1", "--signal=B:TERM@60", "job.sh", cwd=folder)


def test_a_job_runs_where_it_was_submitted_and_sees_what_it_was_given(slurm, tmp_path):
    job = slurm.sbatch("--mem=100M", "--cpus-per-task=2", "--wrap=env; pwd; type sbatch", cwd=tmp_path)
    (ended,) = slurm.wait(job, "COMPLETED")
    lines = output(tmp_path, job).splitlines()
    assert {"SLURM_MEM_PER_NODE=100", "SLURM_CPUS_ON_NODE=2", f"SLURM_JOB_ID={job}", str(tmp_path)} <= set(lines)
    assert ended["StdOut"] == str(tmp_path / f"slurm-{job}.out")
    assert [line["State"] for line in slurm.sacct() if line["JobID"] == job] == ["COMPLETED"]


def test_without_a_memory_option_a_job_is_told_the_default_per_cpu(slurm, tmp_path):
    job = slurm.sbatch("--wrap=echo $SLURM_MEM_PER_CPU of $SLURM_MEM_PER_NODE", cwd=tmp_path)
    slurm.wait(job, "COMPLETED")
    assert output(tmp_path, job) == "1000 of\n"


def test_four_tasks_of_an_array_run_side_by_side(slurm, tmp_path):
    job = slurm.sbatch("--array=0-3", "--mem=50M", f"--wrap={ARRIVED}", cwd=tmp_path)
    assert len(slurm.wait(job, "COMPLETED")) == 4
    assert [output(tmp_path, f"{job}_{task}") for task in range(4)] == ["together\n"] * 4
    assert slurm.job(f"{job}_2")["ArrayTaskId"] == "2"
    with pytest.raises(SlurmTrouble, match="array of 4 parts"):
        slurm.job(job)


def test_what_depends_on_an_array_waits_for_all_of_it(slurm, tmp_path):
    array = slurm.sbatch("--array=1-2", "--mem=50M", "--wrap=sleep 1; touch done-$SLURM_ARRAY_TASK_ID", cwd=tmp_path)
    last = slurm.sbatch(f"--dependency=afterok:{array}", "--mem=50M", "--wrap=echo done-*", cwd=tmp_path)
    assert slurm.job(last)["Reason"] == "Dependency"
    slurm.wait(last, "COMPLETED")
    assert output(tmp_path, last) == "done-1 done-2\n"


def test_a_requeued_job_runs_again_and_knows_it(slurm, tmp_path):
    job = slurm.sbatch("--mem=50M", "--requeue", "--open-mode=append", f"--wrap={STAYS_THE_FIRST_TIME}", cwd=tmp_path)
    slurm.wait(job, "RUNNING")
    until(lambda: "run 0\n" in output(tmp_path, job))
    slurm.requeue(job)
    slurm.wait(job, "COMPLETED")
    assert [line for line in output(tmp_path, job).splitlines() if line.startswith("run")] == ["run 0", "run 1"]
    assert slurm.job(job)["Restarts"] == "1"


def test_a_job_over_its_memory_is_killed_and_says_so(slurm, tmp_path):
    (tmp_path / "take.py").write_text(TAKES_400_MB)
    job = slurm.sbatch("--mem=200M", f"--wrap={sys.executable} take.py", cwd=tmp_path)
    (ended,) = slurm.wait(job, "FAILED", "OUT_OF_MEMORY")
    assert ended["ExitCode"] == "0:9"
    assert "exceeded memory limit" in output(tmp_path, job)
    with pytest.raises(SlurmTrouble, match=r"(?s)FAILED.*exceeded memory limit.*slurmctld.log"):
        slurm.wait(job, "COMPLETED")


def test_a_cancelled_job_gets_sigterm_and_is_gone(slurm, tmp_path):
    (tmp_path / "job.sh").write_text(WARNED)
    job = slurm.sbatch("--mem=50M", "job.sh", cwd=tmp_path)
    slurm.wait(job, "RUNNING")
    until(lambda: "listening" in output(tmp_path, job))
    slurm.scancel(job)
    slurm.wait(job, "CANCELLED")
    assert "CANCELLED" in slurm.squeue(f"--jobs={job}", "--format=%T")


def test_the_warning_before_the_time_limit_reaches_the_batch_shell(slurm, warned):
    folder, job = warned
    slurm.wait(job, "COMPLETED")
    assert "heard TERM\n" in output(folder, job)


def test_after_the_block_no_daemon_and_no_job_is_left(slurm_installed, tmp_path):
    with one_node(tmp_path) as slurm:
        slurm.sbatch(f"--wrap={OUTLIVES_ITS_PARENTS}", cwd=tmp_path)
        conf = slurm.env["SLURM_CONF"]
        until(lambda: programs(conf) >= ALL)
    assert processes_of(conf) == []


def test_no_daemon_and_no_job_outlives_a_killed_owner(slurm_installed, tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], cwd=Path(__file__).parent)
    conf = str(tmp_path / "slurm.conf")
    until(lambda: programs(conf) >= ALL)
    os.kill(owner.pid, signal.SIGKILL)
    assert owner.wait() == -signal.SIGKILL
    until(lambda: not processes_of(conf))


OWNER = f"""
import pathlib, sys, time
from one_node import one_node
folder = pathlib.Path(sys.argv[1])
with one_node(folder) as slurm:
    slurm.sbatch("--wrap={OUTLIVES_ITS_PARENTS}", cwd=folder)
    time.sleep(1000)
"""


def test_a_daemon_that_does_not_start_is_named_with_its_log(slurm_installed, tmp_path):
    wrong = pytest.raises(SlurmTrouble, match=r"(?s)slurmctld -D exited 1.*NoSuchKey")
    with wrong, one_node(tmp_path, "NoSuchKey=1\n"):
        pass
    assert processes_of(str(tmp_path / "slurm.conf")) == []


def test_a_directory_too_long_for_sockets_is_refused(tmp_path):
    with pytest.raises(SlurmTrouble, match="--basetemp"), one_node(tmp_path / ("x" * 70)):
        pass


def test_jobs_with_odd_names_are_told_apart():
    first = "JobId=7 JobName=a b\n;$(x) UserId=me(1) Command=/tmp/a b ExitCode=0:9\n"
    second = "JobId=8 ArrayJobId=7 JobName=c Power=\n"
    assert parse_jobs(first + second) == [
        {"JobId": "7", "JobName": "a b\n;$(x)", "UserId": "me(1)", "Command": "/tmp/a b", "ExitCode": "0:9"},
        {"JobId": "8", "ArrayJobId": "7", "JobName": "c", "Power": ""},
    ]


def test_an_outer_job_is_not_inherited(monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "99")
    monkeypatch.setenv("SBATCH_PARTITION", "other")
    env = environment(tmp_path / "slurm.conf")
    assert {name for name in env if name.startswith(("SLURM", "SBATCH"))} == {"SLURM_CONF"}
    assert env["PATH"].startswith(str(Path(sys.executable).parent))


def test_the_node_has_more_processors_than_a_small_machine(slurm):
    assert slurm.run("sinfo", "--noheader", "--format=%c %m %T").split()[0] == str(CPUS)
