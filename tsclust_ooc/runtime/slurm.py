"""A dask cluster whose workers are Slurm jobs, by dask-jobqueue: TLS with a fresh key, one named interface.

Invariant: nothing the user wrote stands in a job script unquoted; keys and logs lie in a 0700 directory that workers
of all nodes can read (beside the result) and that is gone when the block ends; jobs that are left are cancelled then.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tsclust_ooc.errors import TsclustError
from tsclust_ooc.extras import load
from tsclust_ooc.files import naming_the_place, siblings
from tsclust_ooc.interruption import postponed
from tsclust_ooc.progress import Listener
from tsclust_ooc.runtime.asking import check_jobs
from tsclust_ooc.runtime.client import CONFIG, ONE_THREAD, OnDask, has_dashboard, recorded, say_dashboard
from tsclust_ooc.runtime.doors import LOOPBACK, address_of, open_doors, refuse_open_doors
from tsclust_ooc.runtime.local import private_folder
from tsclust_ooc.runtime.spec import ClusterSpec, Runtime, worker_bytes
from tsclust_ooc.runtime.surroundings import environment, temporaries_in, told, unheard
from tsclust_ooc.units import plural

KEYS = r"[0-9a-f]{12}\.keys"
"""Directories of keys and logs beside a result: `.NAME.` and a match of this."""

_MINUTE = 60
_DEATH_SECONDS = 120  # a worker that cannot reach its scheduler for so long ends itself and its job
_FILES = {"ca.pem": "tls_ca_file", "cert.pem": "tls_worker_cert", "key.pem": "tls_worker_key"}


@contextlib.contextmanager
def open_slurm(spec: ClusterSpec, listener: Listener) -> Iterator[Runtime]:
    """A cluster of Slurm jobs, as many as hold `spec.n_workers` worker processes; its client is dask's default.

    Blocks until the first worker has come out of the queue, telling the listener once a minute.
    """
    limit, address = worker_bytes(spec), address_of(spec.jobs.interface)
    check_jobs(spec.jobs)
    if shutil.which("sbatch") is None:
        raise TsclustError(
            "--scheduler slurm needs sbatch, and it is not on the PATH. Run this on a node of the cluster."
        )
    distributed, dask, jobqueue = load("distributed"), load("dask"), load("dask_jobqueue", "hpc")
    known = open_doors([address])
    with contextlib.ExitStack() as stack:
        keys, folder = stack.enter_context(_shared_folder(spec)), stack.enter_context(private_folder(spec.scratch))
        config = CONFIG | {"distributed.scheduler.no-workers-timeout": None}  # a requeued job may wait for hours
        stack.enter_context(dask.config.set(config))
        stack.enter_context(environment({"DASK_LOGGING__DISTRIBUTED": "critical"}))
        stack.enter_context(unheard())
        dashboard = has_dashboard(listener)
        with postponed(), temporaries_in(folder):
            security = distributed.Security.temporary(tls_min_version=load("ssl").TLSVersion.TLSv1_3)
            _write_keys(security, keys)
            cluster = _start(jobqueue, security, spec, limit, keys)
            stack.callback(cluster.close)
            client = distributed.Client(cluster)
            stack.callback(client.close)
        refuse_open_doors(known, [address])
        listener.say(f"scheduler {cluster.scheduler_address} (TLS, interface {spec.jobs.interface})")
        _ask_for_workers(cluster, spec)
        url = cluster.dashboard_link if dashboard else ""
        say_dashboard(url, listener)
        _wait_for_workers(client, cluster, keys, listener)
        _refuse_doors_of_workers(client, spec.jobs.interface)
        report = stack.enter_context(recorded(client, folder))
        stack.enter_context(told(("distributed.scheduler",), listener))
        yield OnDask(client, report, listener, spec.n_workers, limit, url)


def worker_command(spec: ClusterSpec, address: str, name: str, limit: int) -> str:
    """The line of a job script that runs its workers; keys are found by relative names, in the job's directory."""
    words = [
        sys.executable, "-m", "distributed.cli.dask_worker", address, "--name", name,
        "--nworkers", str(spec.jobs.n_cores), "--nthreads", "1", "--memory-limit", str(limit), "--nanny",
        "--death-timeout", str(_DEATH_SECONDS), "--interface", spec.jobs.interface or "", "--protocol", "tls://",
        "--dashboard-address", f"{LOOPBACK}:0", "--tls-ca-file", "ca.pem", "--tls-cert", "cert.pem",
        "--tls-key", "key.pem",
    ]  # fmt: skip
    return f'exec {shlex.join(words)} --local-directory "$place"'


def prologue(keys: Path, config: str) -> list[str]:
    """The lines of a job script before its command: log, environment, a private directory on the node's own disk."""
    python = shlex.quote(sys.executable)
    return [
        f"cd -- {shlex.quote(str(keys))} || exit 1",
        'exec > "worker-$SLURM_JOB_ID.log" 2>&1',
        f"export DASK_INTERNAL_INHERIT_CONFIG={shlex.quote(config)}",
        *(f"export {name}={value}" for name, value in (ONE_THREAD | {"NUMBA_NUM_THREADS": "1"}).items()),
        f"place=$({python} -m tsclust_ooc.scratch) || exit 1",
    ]


@contextlib.contextmanager
def _shared_folder(spec: ClusterSpec) -> Iterator[Path]:
    """A 0700 directory that all nodes see, beside the result; what dead runs of this node left there goes first."""
    beside = spec.shared or Path.cwd() / "tsclust"
    for old in siblings(beside, KEYS):
        host, _, pid = (old / "owner").read_text().partition(" ") if (old / "owner").is_file() else ("", "", "")
        if host == socket.gethostname() and not Path("/proc", pid).exists():
            shutil.rmtree(old, ignore_errors=True)
    name = beside.name if beside.name.startswith(".") else f".{beside.name}"
    with naming_the_place(beside):
        beside.parent.mkdir(parents=True, exist_ok=True)
        folder = beside.with_name(f"{name}.{os.urandom(6).hex()}.keys")
        folder.mkdir(mode=0o700)
        (folder / "owner").write_text(f"{socket.gethostname()} {os.getpid()}")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_keys(security: Any, folder: Path) -> None:
    for name, attribute in _FILES.items():
        with open(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(getattr(security, attribute))


def _start(jobqueue: Any, security: Any, spec: ClusterSpec, limit: int, keys: Path) -> Any:
    jobs, config = spec.jobs, load("dask.config").serialize(CONFIG)
    refusals: list[str] = []

    class WorkerJob(jobqueue.slurm.SLURMJob):  # type: ignore[misc]
        """dask-jobqueue pastes words into the script as they are; this one quotes them."""

        def __init__(self, scheduler: Any = None, name: Any = None, **kwargs: Any) -> None:
            super().__init__(scheduler=scheduler, name=name, **kwargs)
            self._command_template = worker_command(spec, str(scheduler), str(name), limit)

        async def _submit_job(self, script_filename: str) -> Any:
            try:
                return await super()._submit_job(script_filename)
            except RuntimeError as error:  # dask would try again for ever, and tell nobody
                refusals.append(str(error).partition("stderr:")[2].strip() or str(error))
                self.status = load("distributed").Status.failed  # or the cluster cannot be closed
                raise

    class SlurmCluster(jobqueue.SLURMCluster):  # type: ignore[misc]
        job_cls = WorkerJob
        refused = refusals

        def _get_worker_security(self, security: Any) -> None:  # noqa: ARG002 - its files are written already
            return None

    try:
        return SlurmCluster(
            cores=jobs.n_cores, processes=jobs.n_cores, memory=f"{jobs.memory_bytes}B", queue=jobs.queue,
            account=jobs.account, walltime=jobs.walltime, job_name="tsclust-worker", python=shlex.quote(sys.executable),
            job_mem=f"{math.ceil(jobs.memory_bytes / 2**20)}M",
            job_extra_directives=["--output=/dev/null", *jobs.directives],
            job_script_prologue=prologue(keys, config),
            interface=jobs.interface, protocol="tls://", security=security, silence_logs=logging.CRITICAL,
            scheduler_options={"interface": jobs.interface, "port": 0, "dashboard_address": f"{LOOPBACK}:0"},
        )  # fmt: skip
    except Exception as error:
        raise TsclustError(
            f"the scheduler of the Slurm cluster did not start ({error}). Check --interface {jobs.interface}, or use "
            "--scheduler threads inside one job."
        ) from error


def _refuse_doors_of_workers(client: Any, interface: str | None) -> None:
    """TsclustError when a worker that is there listens beyond the interface; one that comes later ends itself."""
    found = client.run(_open_doors_of_worker, interface, on_error="return")
    opened = [door for doors in found.values() if isinstance(doors, list) for door in doors]
    if opened:
        raise TsclustError(
            f"workers listen beyond interface {interface}, on {', '.join(opened)}; the cluster was stopped. "
            "Look for preloads and addresses in your dask configuration (dask config list)."
        )
    client.register_plugin(_door_check(interface))


def _open_doors_of_worker(interface: str | None) -> list[str]:
    return sorted(open_doors([address_of(interface)], parent=True))


def _door_check(interface: str | None) -> Any:
    class DoorCheck(load("distributed").WorkerPlugin):  # type: ignore[misc]
        """Ends a worker that listens where it should not, and its job, before it gets work.

        Not by an error: dask notes one of a plugin in its log and goes on.
        """

        name = "door-check"

        def setup(self, worker: Any) -> None:  # noqa: ARG002 - dask's signature
            if opened := _open_doors_of_worker(interface):
                sys.stderr.write(f"listens beyond interface {interface}, on {', '.join(opened)}\n")
                sys.stderr.flush()
                os.kill(os.getppid(), signal.SIGKILL)
                os._exit(1)

    return DoorCheck()


def _ask_for_workers(cluster: Any, spec: ClusterSpec) -> None:
    """sbatch, now for as many as are kept, later for more when there is more to do."""
    if spec.least_workers < spec.n_workers:
        cluster.adapt(minimum=spec.least_workers, maximum=spec.n_workers)
    else:
        cluster.scale(spec.n_workers)


def _wait_for_workers(client: Any, cluster: Any, keys: Path, listener: Listener) -> None:
    """Until the first worker is there; TsclustError when all jobs are gone without one."""
    waited = 0
    while not client.scheduler_info(n_workers=-1)["workers"]:
        with contextlib.suppress(TimeoutError):
            client.wait_for_workers(1, timeout=2)
        waited += 2
        if cluster.refused:
            raise TsclustError(f"sbatch did not take the jobs of the workers: {cluster.refused[0]}")
        jobs = [str(job.job_id) for job in cluster.workers.values() if getattr(job, "job_id", None)]
        queued = _squeue(jobs)
        if jobs and not queued and not client.scheduler_info(n_workers=-1)["workers"]:
            tails = [f"{log.name}: {log.read_text(errors='replace')[-500:]}" for log in keys.glob("worker-*.log")]
            raise TsclustError(
                f"{plural(len(jobs), 'job')} ended before a worker was ready ({', '.join(jobs)}). "
                f"{' | '.join(tails) or 'They left no log.'} See: scontrol show job {jobs[0]}"
            )
        if waited % _MINUTE == 0:
            listener.say(f"waiting for workers: {', '.join(queued) or 'no job yet'}")
    listener.say(f"{plural(len(client.scheduler_info(n_workers=-1)['workers']), 'worker')} ready")


def _squeue(jobs: list[str]) -> list[str]:
    """Those of our jobs that are queued or running, as 'ID STATE REASON'."""
    if not jobs:
        return []
    command = ["squeue", "--noheader", "--format=%i %T %R", "--jobs", ",".join(jobs)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return ran.stdout.splitlines()
