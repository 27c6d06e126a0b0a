"""Tasks on a dask cluster, whoever started it: one mapper over a distributed client, its dashboard, its report."""

from __future__ import annotations

import contextlib
import getpass
import itertools
import operator
import os
import pickle
import re
import secrets
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsclust_ooc.errors import MissingExtra, TsclustError
from tsclust_ooc.extras import load
from tsclust_ooc.files import write_atomic
from tsclust_ooc.progress import Listener
from tsclust_ooc.runtime.spec import Function
from tsclust_ooc.runtime.threads import AHEAD, in_order
from tsclust_ooc.units import format_bytes, plural

DEATHS = 3
"""Workers that one task may lose before it is held to be the cause."""

CONFIG = {
    "distributed.scheduler.allowed-failures": DEATHS,
    "distributed.scheduler.idle-timeout": None,
    "distributed.scheduler.no-workers-timeout": "5 minutes",  # no worker comes back: fail rather than wait for ever
    "distributed.scheduler.worker-ttl": None,  # a long kernel that holds the GIL is not a dead worker
    "distributed.scheduler.active-memory-manager.start": False,  # it would drop copies of fn that are still wanted
    "distributed.deploy.lost-worker-timeout": "2 minutes",  # a restart may have to import from a slow filesystem
    "distributed.comm.timeouts.connect": "10s",  # calling a worker that was just killed stalls for so long
    "distributed.comm.require-encryption": True,
    "distributed.comm.tls.min-version": 1.3,
    "distributed.worker.multiprocessing-method": "spawn",
    # Workers store nothing but a finished block: there is nothing to spill, and a paused worker might never resume.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": 0.95,
    "distributed.admin.large-graph-warning-threshold": "1 GB",
}
"""dask's configuration while a cluster of ours is open."""

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Environment of a worker: tasks run side by side, so that each uses one core."""

_RELEASE = operator.methodcaller("release")  # dask forgets a result, and a task that nobody wants any more


def has_dashboard(listener: Listener) -> bool:
    """Whether bokeh is there to draw dashboards; the listener is told when it is not."""
    try:
        load("distributed.dashboard.scheduler", "hpc")
    except MissingExtra as error:
        listener.say(f"no dashboard and no dask report: {error}")
        return False
    return True


@contextlib.contextmanager
def recorded(client: Any, folder: Path) -> Iterator[Any]:
    """What the cluster does from now on, to be saved as a report; dask's own context, left only by `save_report`."""
    report = load("distributed").performance_report(filename=str(folder / "report.html"), mode="inline")
    client.sync(report.__aenter__)
    yield report


@dataclass(frozen=True)
class OnDask:
    """A runtime on the workers of a distributed client. `worker_bytes` is the memory limit of each, 0 if not known."""

    client: Any
    report: Any
    listener: Listener
    n_workers: int
    worker_bytes: int
    dashboard: str

    def mapper(self, fn: Function, items: Iterable[Any]) -> Iterator[Any]:
        """See `Runtime.mapper`."""
        stage, run = _task_name(fn), secrets.token_hex(16)
        # fn travels once, as the result of a task: a scattered copy would be lost with the worker that holds it, and
        # one in every task costs 20 ms more for 2 MB. Pickled here, so that dask does not look for graphs inside it.
        submit, dumps, count = self.client.submit, load("cloudpickle").dumps, itertools.count()
        carrier = submit(pickle.loads, dumps(fn), key=f"carry-{stage}-{run}", pure=False)

        def start(item: Any) -> Any:
            return submit(_apply, carrier, dumps(item), key=(f"{stage}-{run}", next(count)), pure=False)

        try:
            yield from in_order(start, _RELEASE, items, AHEAD * self.n_workers)
        except load("distributed").KilledWorker as error:
            raise TsclustError(
                f"{plural(DEATHS + 1, 'worker')} died over the same task ({error.task}), each allowed "
                f"{format_bytes(self.worker_bytes)} of memory. Use more memory for each, or smaller chunks."
            ) from error
        finally:
            carrier.release()

    def save_report(self, path: Path) -> None:
        """See `Runtime.save_report`."""
        if not self.dashboard:
            return  # the listener was told when the cluster was opened
        page = Path(self.report.filename)
        try:
            self.client.sync(self.report.__aexit__, None, None, None, code="tsclust")
            # Its one outside link is an icon, which a browser would fetch.
            write_atomic(path, re.sub(b'<link rel="shortcut icon"[^>]*>', b"", page.read_bytes()))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self.listener.say(f"no dask report at {path}: {reason}. The results are not affected.")


def say_dashboard(url: str, listener: Listener) -> None:
    """Tell where the dashboard is, and the ssh command that brings it to another machine."""
    if url:
        listener.say(f"dashboard {url}\n  from your own machine: {tunnel(url, os.environ)}")


def tunnel(url: str, environ: Mapping[str, str]) -> str:
    """The ssh command that makes a dashboard on this node's loopback visible as http://127.0.0.1:8787/status there.

    Inside a Slurm job the way leads over the node it was submitted from: compute nodes are rarely reached directly.
    """
    port = url.partition("://")[2].partition("/")[0].rpartition(":")[2]
    user, here = getpass.getuser(), socket.gethostname()
    over = environ.get("SLURM_SUBMIT_HOST", here)
    jump = "" if over == here else f"-J {user}@{over} "
    return f"ssh -N -L 8787:127.0.0.1:{port} {jump}{user}@{here}   then open http://127.0.0.1:8787/status"


def _apply(fn: Function, item: bytes) -> Any:
    """One task, on a worker."""
    return fn(pickle.loads(item))


def _task_name(fn: Function) -> str:
    inner = getattr(fn, "func", fn)  # functools.partial has no name of its own
    return str(getattr(fn, "task_name", "") or getattr(inner, "__name__", "") or type(fn).__name__)
