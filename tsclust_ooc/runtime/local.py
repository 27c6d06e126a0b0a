"""A dask cluster of processes on this machine: TLS with a fresh key, loopback only, gone when its block ends."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tsclust_ooc.errors import TsclustError
from tsclust_ooc.extras import load
from tsclust_ooc.files import naming_the_place
from tsclust_ooc.interruption import postponed
from tsclust_ooc.progress import Listener
from tsclust_ooc.runtime.client import CONFIG, ONE_THREAD, OnDask, has_dashboard, recorded, say_dashboard
from tsclust_ooc.runtime.doors import LOOPBACK, open_doors, refuse_open_doors
from tsclust_ooc.runtime.spec import ClusterSpec, Runtime, worker_bytes
from tsclust_ooc.runtime.surroundings import environment, temporaries_in, told, unheard
from tsclust_ooc.units import plural


@contextlib.contextmanager
def open_local(spec: ClusterSpec, listener: Listener) -> Iterator[Runtime]:
    """A LocalCluster of `spec.n_workers` single-threaded processes; its client is dask's default meanwhile."""
    limit = worker_bytes(spec)
    distributed, dask = load("distributed"), load("dask")
    known = open_doors()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(private_folder(spec.scratch))
        stack.enter_context(dask.config.set(CONFIG))
        stack.enter_context(environment(ONE_THREAD | {"DASK_LOGGING__DISTRIBUTED": "critical"}))
        stack.enter_context(unheard())
        dashboard = has_dashboard(listener)
        # The first spawn would start it, and leave SIGINT unblocked in the thread that spawns.
        load("multiprocessing.resource_tracker").ensure_running()
        with postponed(), temporaries_in(folder):
            cluster = _start(distributed, spec.n_workers, limit, folder)
            stack.callback(cluster.close)
            client = distributed.Client(cluster, direct_to_workers=True)
            stack.callback(client.close)
        refuse_open_doors(known)
        report = stack.enter_context(recorded(client, folder))
        # Not before, nor when the end begins: workers that were lost and restarted, and why.
        stack.enter_context(told(("distributed.nanny", "distributed.nanny.memory"), listener))
        url = cluster.dashboard_link if dashboard else ""
        say_dashboard(url, listener)
        yield OnDask(client, report, listener, spec.n_workers, limit, url)


@contextlib.contextmanager
def private_folder(place: Path) -> Iterator[Path]:
    """A fresh 0700 directory in `place` for keys and whatever a cluster leaves lying, removed when the block ends.

    Those of processes of this node that were killed are removed, too.
    """
    _sweep(place)
    with naming_the_place(place):
        folder = Path(tempfile.mkdtemp(prefix=f"{_prefix()}{os.getpid()}-", dir=place))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _prefix() -> str:
    return f"dask-{socket.gethostname()}-"


def _sweep(place: Path) -> None:
    for folder in place.glob("dask-*"):
        pid = folder.name.removeprefix(_prefix()).partition("-")[0]
        if folder.name.startswith(_prefix()) and pid.isdecimal() and not Path("/proc", pid).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _start(distributed: Any, n_workers: int, limit: int, folder: Path) -> Any:
    """A LocalCluster of single-threaded processes; TsclustError with the likely cause when it does not come up."""
    try:
        return distributed.LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,
            processes=True,
            host=LOOPBACK,
            protocol="tls://",
            security=distributed.Security.temporary(tls_min_version=load("ssl").TLSVersion.TLSv1_3),
            # Given even where there is no dashboard: without it the scheduler asks for port 8787 and warns when taken.
            dashboard_address=f"{LOOPBACK}:0",
            memory_limit=limit,
            local_directory=str(folder),
            silence_logs=logging.CRITICAL,
            # After the spawn: numba in this process would notice the variable and refuse to change its threads.
            env=ONE_THREAD | {"NUMBA_NUM_THREADS": "1", "TMPDIR": str(folder)},
        )
    except Exception as error:
        raise TsclustError(
            f"the local cluster of {plural(n_workers, 'worker')} did not start ({error}). Worker processes import the "
            "main script again: in a script of your own, call this under `if __name__ == '__main__':`. "
            "Or use --scheduler threads."
        ) from error
