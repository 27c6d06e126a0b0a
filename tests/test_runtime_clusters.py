"""Clusters beyond this process: one that is running already, and what a Slurm job is told (slurm/ runs real ones)."""

import dataclasses
import itertools
import json
import math
import os
import re
import shlex
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed import Client, Security

from tsclust_ooc.errors import CannotWrite, TsclustError, UsageError
from tsclust_ooc.runtime import ClusterSpec, Jobs, open_runtime, worker_bytes
from tsclust_ooc.runtime.client import tunnel
from tsclust_ooc.runtime.doors import address_of
from tsclust_ooc.runtime.local import private_folder
from tsclust_ooc.runtime.slurm import KEYS, prologue, worker_command

MEMORY = 2 * 10**9
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")


def write_keys(folder):
    folder.mkdir()
    fresh = Security.temporary()
    for name, text in (
        ("ca.pem", fresh.tls_ca_file), ("cert.pem", fresh.tls_client_cert), ("key.pem", fresh.tls_client_key)
    ):  # fmt: skip
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return write_keys(tmp_path_factory.mktemp("tls") / "keys")


@pytest.fixture(scope="module")
def running(tmp_path_factory, keys):
    """A scheduler and one worker that somebody started with dask's own commands; its address."""
    place = tmp_path_factory.mktemp("cluster")
    tls = ["--tls-ca-file", keys / "ca.pem", "--tls-cert", keys / "cert.pem", "--tls-key", keys / "key.pem"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": place}
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--protocol", "tls", "--host", "127.0.0.1"]
    more = ["--port", "0", "--no-dashboard", "--scheduler-file", place / "scheduler.json"]
    scheduler = subprocess.Popen([*map(str, [*command, *more, *tls])], **quiet)
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--no-nanny", "--nthreads", "2", "--no-dashboard"]
    where = ["--host", "127.0.0.1", "--protocol", "tls", "--scheduler-file", place / "scheduler.json"]
    workers = scheduler
    try:
        written = place / "scheduler.json"
        while not (written.exists() and written.read_text().endswith("}")):
            assert scheduler.poll() is None
            time.sleep(0.05)
        address = json.loads(written.read_text())["address"]
        with pytest.raises(TsclustError, match="has no workers"), open_runtime(at(address, place, tls=keys)):
            pass
        workers = subprocess.Popen([*map(str, [*worker, *where, *tls])], **quiet)
        ca, cert, key = (str(keys / name) for name in ("ca.pem", "cert.pem", "key.pem"))
        security = Security(tls_ca_file=ca, tls_client_cert=cert, tls_client_key=key, require_encryption=True)
        with Client(address, security=security) as client:
            client.wait_for_workers(1, timeout=60)
        yield address
    finally:
        for process in (workers, scheduler):
            process.kill()
            process.wait()


def at(address, tmp_path, **jobs):
    return ClusterSpec(address, 2, MEMORY, tmp_path, Jobs(**jobs))


def test_a_running_cluster_computes_with_its_own_keys_and_is_left_running(running, keys, tmp_path):
    with open_runtime(at(running, tmp_path, tls=keys)) as runtime:
        assert runtime.n_workers == 2
        assert list(runtime.mapper(math.factorial, range(5))) == [1, 1, 2, 6, 24]
    with open_runtime(at(running, tmp_path, tls=keys)) as runtime:
        assert list(runtime.mapper(math.factorial, [5])) == [120]
    assert list(tmp_path.iterdir()) == []


def test_a_running_cluster_with_other_keys_is_named_with_what_to_give(running, tmp_path):
    other = write_keys(tmp_path / "other")
    with (
        pytest.raises(TsclustError, match=rf"no dask scheduler answered at {running} with the keys .*other.*--tls"),
        open_runtime(at(running, tmp_path, tls=other)),
    ):
        pass


def test_keys_that_are_not_there_are_named(tmp_path):
    (tmp_path / "ca.pem").touch()
    with (
        pytest.raises(UsageError, match=r"--tls .* has no cert.pem, key.pem"),
        open_runtime(at("tls://127.0.0.1:1", tmp_path, tls=tmp_path)),
    ):
        pass


def test_an_address_without_encryption_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"--scheduler tcp://there:8786 is not known.*tls://HOST:PORT"):
        at("tcp://there:8786", tmp_path)


def test_the_tunnel_leads_to_the_port_over_the_node_a_job_was_submitted_from():
    here = socket.gethostname()
    plain = tunnel("http://127.0.0.1:40001/status", {})
    assert "-L 8787:127.0.0.1:40001 " in plain
    assert f"@{here} " in plain
    assert "-J" not in plain
    assert "-J " not in tunnel("http://127.0.0.1:40001/status", {"SLURM_SUBMIT_HOST": here})
    words = shlex.split(tunnel("http://127.0.0.1:40001/status", {"SLURM_SUBMIT_HOST": "login1"}))
    assert words[words.index("-J") + 1].endswith("@login1")


def test_an_interface_is_found_by_name_and_without_one_those_there_are_are_named():
    assert address_of("lo") == "127.0.0.1"
    for asked, words in ((None, "none was given"), ("ib9", "'ib9' has no IPv4 address here")):
        with pytest.raises(UsageError, match=rf"{words}.*--interface.*lo \(127.0.0.1\)"):
            address_of(asked)


def test_a_job_script_runs_its_worker_and_nothing_a_name_says(tmp_path):
    """The script is really run, with a stand-in for Python that writes down what it was given."""
    keys = tmp_path / "it's; $(touch pwned) `touch pwned`\nend"
    keys.mkdir()
    spec = ClusterSpec("slurm", 4, MEMORY, tmp_path, Jobs(interface="lo", job_cores=2))
    stand_in = tmp_path / "py thon"
    stand_in.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "if sys.argv[2] == 'tsclust_ooc.scratch': print('/some/where else')\n"
        "else: open('told.json', 'w').write(json.dumps([sys.argv[1:], dict(os.environ)]))\n"
    )
    stand_in.chmod(0o755)
    lines = [*prologue(keys, "c29tZQ=="), worker_command(spec, "tls://10.0.0.1:1", "W-1", 10**9)]
    script = "\n".join(lines).replace(shlex.quote(sys.executable), shlex.quote(str(stand_in)))
    subprocess.run(["bash", "-c", script], check=True, cwd=tmp_path, env=os.environ | {"SLURM_JOB_ID": "7"})
    words, environment = json.loads((keys / "told.json").read_text())
    assert words[:3] == ["-m", "distributed.cli.dask_worker", "tls://10.0.0.1:1"]
    given = dict(itertools.pairwise(words))
    assert given["--local-directory"] == "/some/where else"
    assert (given["--nworkers"], given["--nthreads"], given["--memory-limit"]) == ("2", "1", "1000000000")
    assert (given["--interface"], given["--dashboard-address"]) == ("lo", "127.0.0.1:0")
    assert environment["DASK_INTERNAL_INHERIT_CONFIG"] == "c29tZQ=="
    assert environment["OPENBLAS_NUM_THREADS"] == "1"
    assert not list(tmp_path.rglob("pwned"))


def test_the_scratch_module_prints_a_private_directory_for_job_scripts(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "tsclust_ooc.scratch"], capture_output=True, text=True, check=True,
        env={k: v for k, v in os.environ.items() if k != "SLURM_TMPDIR"} | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    made = ran.stdout.rstrip("\n")
    assert stat.S_IMODE(os.stat(made).st_mode) == 0o700


def test_each_worker_of_a_job_gets_its_share_and_too_little_is_refused(tmp_path):
    spec = ClusterSpec("slurm", 8, MEMORY, tmp_path, Jobs(job_memory="8GB", job_cores=4))
    assert worker_bytes(spec) == (8 * 10**9 - 120 * 10**6) // 4
    small = dataclasses.replace(spec, jobs=Jobs(job_memory="1GB", job_cores=4))
    with pytest.raises(
        CannotWrite, match=r"a job of 4 workers needs 350 MB .* allows 1.00 GB. Use: --job-memory 1.54GB"
    ):
        worker_bytes(small)
    assert worker_bytes(dataclasses.replace(spec, jobs=Jobs(job_memory="1.54GB", job_cores=4))) > 350 * 10**6


@pytest.mark.parametrize(("n", "least"), [(2, 3), (2, 0)])
def test_fewest_and_most_workers_must_fit_each_other(tmp_path, n, least):
    with pytest.raises(UsageError, match=f"--min-workers {least} is not between 1 and --workers {n}"):
        ClusterSpec("slurm", n, MEMORY, tmp_path, Jobs(min_workers=least))


def test_slurm_without_sbatch_says_where_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    spec = ClusterSpec("slurm", 1, MEMORY, tmp_path, Jobs(interface="lo"))
    with pytest.raises(TsclustError, match="needs sbatch, and it is not on the PATH"), open_runtime(spec):
        pass


def test_names_of_key_directories_are_those_that_are_swept():
    assert re.fullmatch(KEYS, f"{os.urandom(6).hex()}.keys")


def test_what_a_killed_driver_left_in_scratch_is_swept_by_the_next(tmp_path):
    code = "import sys; from pathlib import Path; from tsclust_ooc.runtime.local import private_folder\n"
    code += "with private_folder(Path(sys.argv[1])) as folder:\n print(folder, flush=True); sys.stdin.read()"
    driver = [subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=-1, stdin=-1, text=True) for _ in "ab"]
    killed, alive = [Path(one.stdout.readline().strip()) for one in driver]
    driver[0].kill()
    driver[0].communicate()
    others = tmp_path / f"dask-elsewhere-{driver[0].pid}-x"
    others.mkdir()
    assert killed.exists()
    with private_folder(tmp_path) as mine:
        assert {path.name for path in tmp_path.iterdir()} == {alive.name, others.name, mine.name}
    driver[1].communicate()
    assert [path.name for path in tmp_path.iterdir()] == [others.name]
