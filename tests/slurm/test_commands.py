"""Our commands on a real Slurm: arrays with a killed task, workers as jobs, cancelled and over their memory.

Each story ends with the result that the plain command gives in one process, compared byte for byte by its digest.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import publish, three_splits, write_source
from listeners import Heard
from one_node import processes_of

from tsclust_ooc.dataset import open_dataset
from tsclust_ooc.errors import TsclustError
from tsclust_ooc.pipeline.clustering import cluster
from tsclust_ooc.pipeline.consolidating import consolidate
from tsclust_ooc.pipeline.options import ClusterOptions
from tsclust_ooc.results import open_run
from tsclust_ooc.runtime import ClusterSpec, Jobs, open_runtime

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")

ON_SLURM = ("--scheduler", "slurm", "--queue", "main", "--walltime", "00:10:00")
NASTY = "it's a `place`; $(touch pwned)"


def tsclust(slurm, *words, cwd, expected=0):
    """Run the command as a user of the cluster does; returns its JSON."""
    command = [sys.executable, "-m", "tsclust_ooc", *map(str, words), "--json"]
    ran = subprocess.run(command, cwd=cwd, env=slurm.env, capture_output=True, text=True, timeout=170)
    assert ran.returncode == expected, f"{shlex.join(command)}: {ran.stderr}{ran.stdout}"
    return json.loads(ran.stdout.splitlines()[-1])


def until(condition, seconds=60):
    """Wait for what another process does; fails when it does not come."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)
    return found


def environment_of(pid):
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def programs_of(slurm, task):
    """The tsclust processes of task `task` of an array."""

    def ours(pid):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False
        return b"tsclust_ooc" in words and f"SLURM_ARRAY_TASK_ID={task}".encode() in environment_of(pid)

    return [pid for pid in processes_of(slurm.directory / "slurm.conf") if ours(pid)]


@pytest.fixture(scope="module")
def samples():
    return three_splits(sizes={"train": 126, "val": 42})


def test_an_array_with_a_killed_task_is_requeued_and_finalized_to_the_same_bytes(slurm, samples, tmp_path):
    place = tmp_path / NASTY
    place.mkdir()
    source = write_source(place / "source", samples)
    chunks = ("--chunk-bytes", "4096", "--scratch", tmp_path)
    submitted = tsclust(slurm, "submit", "consolidate", source, place / "ds", *chunks, *ON_SLURM, cwd=place)
    assert (submitted["n_partitions"], submitted["n_tasks"]) == (4, 4)
    array, finalize = (job["id"] for job in submitted["jobs"] if job["id"])
    (victim, *_) = until(lambda: programs_of(slurm, 2))
    os.kill(victim, signal.SIGKILL)
    ended = {job["ArrayTaskId"]: job["JobState"] for job in slurm.wait(array)}
    assert ended == {"0": "COMPLETED", "1": "COMPLETED", "2": "FAILED", "3": "COMPLETED"}
    slurm.wait(finalize, "FAILED")  # it names the missing partition, and asks to be run again
    log = next(Path(submitted["folder"]).glob("finalize-*.log")).read_text()
    assert re.search(r"1 partition of 4 not written yet: 2\b", log)
    assert not (place / "ds").exists()

    slurm.requeue(f"{array}_2")
    slurm.wait(f"{array}_2", "COMPLETED")
    slurm.requeue(finalize)
    slurm.wait(finalize, "COMPLETED")
    states = {line["JobID"]: line["State"] for line in slurm.sacct()}
    assert states[finalize] == "COMPLETED"
    alone = publish(tmp_path, samples)
    found = open_dataset(place / "ds")
    assert found.manifest.digest == open_dataset(alone).manifest.digest
    for split, x in samples.items():
        np.testing.assert_array_equal(np.asarray(found[split].array), x)
    assert not list(tmp_path.rglob("pwned"))
    print(slurm.squeue(), json.dumps(slurm.sacct(), indent=1))


@pytest.fixture
def here(slurm, monkeypatch):
    """This process as one that may submit jobs."""
    for name, value in slurm.env.items():
        monkeypatch.setenv(name, value)
    return slurm


def test_workers_in_slurm_jobs_give_the_labels_of_threads_bit_for_bit(here, samples, tmp_path):
    dataset = publish(tmp_path, samples)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    jobs = Jobs(interface="lo", job_memory="600MB", walltime="00:10:00", queue="main")
    heard = Heard()
    slurmed = cluster(
        dataset, tmp_path / "slurm", 5,
        ClusterOptions(view="variable", scheduler="slurm", workers=2, scratch=scratch, jobs=jobs), heard,
    )  # fmt: skip
    threaded = cluster(dataset, tmp_path / "threads", 5, ClusterOptions(view="variable", scratch=scratch))
    assert slurmed.digest == threaded.digest
    for split in samples:
        ours, theirs = (pq.read_table(tmp_path / name / "labels" / f"{split}.parquet") for name in ("slurm", "threads"))
        assert ours.equals(theirs)
    assert (tmp_path / "slurm" / "dask-report.html").exists()
    assert any(message.startswith("scheduler tls://127.0.0.1:") for message in heard.messages)
    assert any("ssh -N -L 8787:127.0.0.1:" in message for message in heard.messages)
    until(lambda: "tsclust-worker" not in here.run("squeue", "--noheader", "--format=%j %T", "--states=R,PD"))
    assert [path.name for path in tmp_path.glob(".*")] == []  # keys, logs, work


def test_consolidation_on_workers_in_slurm_jobs_gives_the_same_bytes(here, samples, tmp_path):
    alone = publish(tmp_path, samples)
    jobs = Jobs(interface="lo", job_memory="600MB", walltime="00:10:00")
    again = publish(tmp_path / "again", samples, workers=1, scheduler="slurm", jobs=jobs)
    assert open_dataset(again).manifest.digest == open_dataset(alone).manifest.digest


def test_an_interface_that_is_not_there_is_refused_before_a_job_is_submitted(here, samples, tmp_path):
    dataset = publish(tmp_path, samples)
    options = ClusterOptions(scheduler="slurm", scratch=tmp_path, jobs=Jobs(interface="ib7"))
    before = here.run("squeue", "--noheader", "--states=all", "--format=%i")
    with pytest.raises(TsclustError, match=r"'ib7' has no IPv4 address here.*lo \(127.0.0.1\)"):
        cluster(dataset, tmp_path / "run", 3, options)
    assert here.run("squeue", "--noheader", "--states=all", "--format=%i") == before


def test_jobs_that_slurm_will_not_take_end_the_command_with_its_words(here, samples, tmp_path):
    dataset = publish(tmp_path, samples)
    options = ClusterOptions(scheduler="slurm", scratch=tmp_path, jobs=Jobs(interface="lo", queue="nowhere"))
    with pytest.raises(TsclustError, match=r"(?s)sbatch.*invalid partition"):
        cluster(dataset, tmp_path / "run", 3, options)


def test_workers_that_listen_beyond_the_interface_get_no_work(here, tmp_path, monkeypatch):
    preload = tmp_path / "listens.py"
    preload.write_text("import socket\ndoor = socket.socket()\ndoor.bind(('0.0.0.0', 0))\ndoor.listen()\n")
    monkeypatch.setenv("DASK_DISTRIBUTED__WORKER__PRELOAD", str(preload))
    spec = ClusterSpec("slurm", 1, 2 * 10**9, tmp_path, Jobs(interface="lo", job_memory="600MB"), tmp_path / "result")
    refused = pytest.raises(TsclustError, match=r"workers listen beyond interface lo, on 0\.0\.0\.0 port \d+")
    with refused, open_runtime(spec):
        pass


def test_a_worker_that_joins_late_and_listens_beyond_the_interface_ends_before_it_gets_work(
    here, tmp_path, monkeypatch
):
    flag, preload = tmp_path / "now", tmp_path / "listens.py"
    preload.write_text(
        f"import os, socket\nif os.path.exists({str(flag)!r}):\n"
        "    door = socket.socket()\n    door.bind(('0.0.0.0', 0))\n    door.listen()\n"
    )
    monkeypatch.setenv("DASK_DISTRIBUTED__WORKER__PRELOAD", str(preload))
    spec = ClusterSpec("slurm", 1, 2 * 10**9, tmp_path, Jobs(interface="lo", job_memory="600MB"), tmp_path / "result")
    with open_runtime(spec) as runtime:
        first = set(runtime.client.scheduler_info()["workers"])
        flag.touch()
        runtime.client.cluster.scale(2)
        refusal = re.compile(r"listens beyond interface lo, on 0\.0\.0\.0 port \d+")
        until(lambda: any(refusal.search(log.read_text()) for log in tmp_path.glob(".result.*.keys/worker-*.log")))
        assert list(runtime.mapper(abs, [-3, -4])) == [3, 4]
        until(lambda: set(runtime.client.scheduler_info()["workers"]) == first)
        runtime.client.cluster.scale(1)  # or dask-jobqueue would send for another, again and again


def test_keys_are_readable_for_their_owner_alone(here, tmp_path):
    spec = ClusterSpec("slurm", 1, 2 * 10**9, tmp_path, Jobs(interface="lo", job_memory="600MB"), tmp_path / "result")
    with open_runtime(spec) as runtime:
        assert list(runtime.mapper(abs, [-3])) == [3]
        (folder,) = tmp_path.glob(".result.*.keys")
        modes = {path.name: path.stat().st_mode & 0o777 for path in (folder, folder / "key.pem", folder / "cert.pem")}
    assert modes == {folder.name: 0o700, "key.pem": 0o600, "cert.pem": 0o600}
    assert not folder.exists()


@pytest.fixture(scope="module")
def long_work(tmp_path_factory):
    """A dataset whose clustering takes hundreds of passes: points without clusters, and no tolerance."""
    place = tmp_path_factory.mktemp("long")
    x = np.random.default_rng(0).standard_normal((4000, 3, 64)).astype(np.float32)
    from sources import write_shard  # noqa: PLC0415

    write_shard(place / "source" / "all.h5", x)
    consolidate(place / "source", place / "dataset")
    return place / "dataset"


HARD = ("-k", "60", "--view", "variable", "--tol", "0", "--max-iter", "2000", "--init", "random")


def test_a_cancelled_job_goes_on_when_it_is_submitted_again(slurm, long_work, tmp_path):
    words = ("submit", "cluster", long_work, tmp_path / "run", *HARD, "--scratch", tmp_path, *ON_SLURM)
    first = tsclust(slurm, *words, cwd=tmp_path)
    (job,) = (one["id"] for one in first["jobs"])
    folder = Path(first["folder"])
    log = until(lambda: next(iter(folder.glob(f"*{job}*.log")), None))
    until(lambda: "pass 5 " in log.read_text())
    slurm.scancel(job)
    slurm.wait(job, "CANCELLED")
    until(lambda: "Go on with: tsclust" in log.read_text())
    assert not (tmp_path / "run").exists()
    again = tsclust(slurm, *words, cwd=tmp_path)
    (job,) = (one["id"] for one in again["jobs"])
    slurm.wait(job, "COMPLETED", timeout=150)
    log = next(iter(folder.glob(f"*{job}*.log"))).read_text()
    assert re.search(r"going on after pass \d+", log)
    alone = tsclust(slurm, "cluster", long_work, tmp_path / "alone", *HARD, "--scratch", tmp_path, cwd=tmp_path)
    assert open_run(tmp_path / "run").manifest.digest == alone["digest"]


def test_a_job_over_its_memory_says_so(slurm, long_work, tmp_path):
    words = ("submit", "cluster", long_work, tmp_path / "run", *HARD, *ON_SLURM, "--scratch", tmp_path)
    # What the job was given is too little even for the libraries: refused before it starts, with what would do.
    told = tsclust(slurm, *words, "--job-memory", "200MB", cwd=tmp_path)
    (job,) = (one["id"] for one in told["jobs"])
    slurm.wait(job, "FAILED")
    log = next(Path(told["folder"]).glob(f"*{job}*.log")).read_text()
    assert re.search(r"--memory \S+ \S+ is less than the libraries alone need. Use at least 600 MB", log)
    # A promise of more than the job has, which only Slurm can break.
    told = tsclust(slurm, *words, "--job-memory", "200MB", "--memory", "4GB", cwd=tmp_path)
    (job,) = (one["id"] for one in told["jobs"])
    (ended,) = slurm.wait(job, "FAILED", "OUT_OF_MEMORY")
    log = next(Path(told["folder"]).glob(f"*{job}*.log")).read_text()
    assert "exceeded memory limit" in log or ended["JobState"] == "OUT_OF_MEMORY"
    assert not (tmp_path / "run").exists()
