"""Where it runs: on threads of this process, or on a local dask cluster; both give the work to the same `mapper`.

Invariant: the results of `mapper(fn, items)` are those of builtin `map`, in its order, whoever computed them and
however many workers died meanwhile; at most two tasks a worker are in flight. Nothing that is started here listens
beyond loopback or speaks without TLS, and nothing of it is left when the block ends: no process, no socket, no file.

dask and distributed take a second to import: they, and what only they need, are loaded when a cluster is asked for.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import logging
import operator
import os
import pickle
import re
import secrets
import shutil
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tsclust_ooc.budget import BASE_BYTES
from tsclust_ooc.errors import CannotWrite, MissingExtra, TsclustError, UsageError
from tsclust_ooc.extras import load
from tsclust_ooc.files import naming_the_place, write_atomic
from tsclust_ooc.progress import Listener, silent
from tsclust_ooc.units import format_bytes, plural

SCHEDULERS = ("threads", "local")
"""What `ClusterSpec.scheduler` accepts."""

LEAST_WORKER_BYTES = 350 * 10**6
"""A worker process with zarr, numba and dask.array loaded is 250 MB (measured); below this it would die at once."""

Function = Callable[[Any], Any]
_AHEAD = 2  # tasks a worker: one running, one waiting, so that no worker idles while a result is consumed
_RELEASE = operator.methodcaller("release")  # dask forgets a result, and a task that nobody wants any more
_LOOPBACK = "127.0.0.1"
_DEATHS = 3  # workers that one task may lose before it is held to be the cause
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# distributed writes these into this process's environment as well; they are put back like the others.
_LEAKED = ("MALLOC_TRIM_THRESHOLD_", "PYTHONHASHSEED", "__DASK_PARENT_PID")
_DASK_CONFIG = {
    "distributed.scheduler.allowed-failures": _DEATHS,
    "distributed.scheduler.idle-timeout": None,
    "distributed.scheduler.no-workers-timeout": "5 minutes",  # no worker comes back: fail rather than wait for ever
    "distributed.scheduler.worker-ttl": None,  # a long kernel that holds the GIL is not a dead worker
    "distributed.scheduler.active-memory-manager.start": False,  # it would drop copies of fn that are still wanted
    "distributed.deploy.lost-worker-timeout": "2 minutes",  # a restart may have to import from a slow filesystem
    "distributed.comm.timeouts.connect": "10s",  # calling a worker that was just killed stalls for so long
    "distributed.worker.multiprocessing-method": "spawn",
    # Workers store nothing but a finished block: there is nothing to spill, and a paused worker might never resume.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": 0.95,
    "distributed.admin.large-graph-warning-threshold": "1 GB",
}


@dataclass(frozen=True)
class ClusterSpec:
    """What to run on: `scheduler` ("threads" or "local"), workers, bytes of the process tree, a private directory.

    Raises UsageError for a scheduler that is not known or for less than one worker.
    """

    scheduler: str
    n_workers: int
    memory_bytes: int
    scratch: Path

    def __post_init__(self) -> None:
        if self.scheduler not in SCHEDULERS:
            raise UsageError(f"--scheduler {self.scheduler} is not known. Use one of: {', '.join(SCHEDULERS)}.")
        if self.n_workers < 1:
            raise UsageError(f"--workers {self.n_workers} leaves nobody to work. Use 1 or more.")


class Runtime(Protocol):
    """Somewhere to run tasks, open until its block ends."""

    @property
    def n_workers(self) -> int:
        """Tasks that run side by side."""

    @property
    def dashboard(self) -> str:
        """URL of the live dashboard, '' where there is none."""

    def mapper(self, fn: Function, items: Iterable[Any]) -> Iterator[Any]:
        """`fn` of each item, in order, like builtin `map`; at most two tasks a worker run ahead of the consumer.

        An error of a task is raised at its place and the tasks behind it are cancelled. Tasks are named after
        `fn.task_name` or else `fn.__name__`.
        """

    def save_report(self, path: Path) -> None:
        """Write what the cluster did as one HTML page that opens offline; never fails, tells the listener instead."""


@contextlib.contextmanager
def open_runtime(spec: ClusterSpec, listener: Listener = silent) -> Iterator[Runtime]:
    """The runtime that `spec` asks for, closed with everything it started when the block ends, however it ends.

    While a local cluster is open its client is dask's default, so dask collections computed in the block run on it.
    Raises CannotWrite when `spec.memory_bytes` does not hold its workers, TsclustError when the cluster does not start
    or would listen beyond this machine.
    """
    opener = {"threads": _open_threads, "local": _open_local}[spec.scheduler]
    with opener(spec, listener) as runtime:
        yield runtime


def worker_bytes(spec: ClusterSpec) -> int:
    """Memory limit of each worker process: an equal share of what this process itself leaves of `memory_bytes`.

    Raises CannotWrite when that is less than a worker needs to live.
    """
    share = (spec.memory_bytes - BASE_BYTES) // spec.n_workers
    if share < LEAST_WORKER_BYTES:
        fit = (spec.memory_bytes - BASE_BYTES) // LEAST_WORKER_BYTES
        enough = format_bytes(BASE_BYTES + spec.n_workers * LEAST_WORKER_BYTES + 5 * 10**6).replace(" ", "")
        raise CannotWrite(
            f"a local cluster of {plural(spec.n_workers, 'worker')} needs {format_bytes(LEAST_WORKER_BYTES)} a worker "
            f"and {format_bytes(BASE_BYTES)} besides, and --memory allows {format_bytes(spec.memory_bytes)}. "
            f"Use: --memory {enough}, " + (f"--workers {fit}, " if fit > 0 else "") + "or --scheduler threads."
        )
    return share


def open_doors() -> frozenset[str]:
    """TCP sockets of this process and its descendants that listen on anything but loopback: address, port, process."""
    psutil = load("psutil")  # distributed brings it
    me, found = psutil.Process(), set()
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end while we look
            sockets = getattr(process, "net_connections", None) or process.connections  # psutil 6 renamed it
            found |= {(process.pid, *s.laddr) for s in sockets(kind="tcp") if s.status == psutil.CONN_LISTEN}
    beyond = (door for door in found if not ipaddress.ip_address(door[1]).is_loopback)
    return frozenset(f"{address} port {port} (process {pid})" for pid, address, port in beyond)


def refuse_open_doors(known: frozenset[str] = frozenset()) -> None:
    """TsclustError when `open_doors` finds any that are not `known`."""
    opened = sorted(open_doors() - known)
    if opened:
        raise TsclustError(
            f"the local cluster listens beyond this machine, on {', '.join(opened)}, where only loopback is wanted. "
            "It was stopped. Look for preloads and addresses in your dask configuration (dask config list), "
            "or use --scheduler threads."
        )


@contextlib.contextmanager
def _open_threads(spec: ClusterSpec, listener: Listener) -> Iterator[Runtime]:  # noqa: ARG001 - threads need no word
    pool = ThreadPoolExecutor(spec.n_workers, thread_name_prefix="tsclust")
    try:
        yield _Threads(pool, spec.n_workers)
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Threads:
    pool: ThreadPoolExecutor
    n_workers: int
    dashboard: str = ""

    def mapper(self, fn: Function, items: Iterable[Any]) -> Iterator[Any]:
        return _ahead(lambda item: self.pool.submit(fn, item), Future.cancel, items, _AHEAD * self.n_workers)

    def save_report(self, path: Path) -> None:
        """Threads leave no record of their tasks."""


@contextlib.contextmanager
def _open_local(spec: ClusterSpec, listener: Listener) -> Iterator[Runtime]:
    limit = worker_bytes(spec)
    distributed, dask = load("distributed"), load("dask")
    known = open_doors()
    with contextlib.ExitStack() as stack:
        with naming_the_place(spec.scratch):
            folder = Path(tempfile.mkdtemp(prefix="dask-", dir=spec.scratch))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.enter_context(dask.config.set(_DASK_CONFIG))
        stack.enter_context(_environment(_ONE_THREAD | {"DASK_LOGGING__DISTRIBUTED": "critical"}))
        stack.enter_context(_unheard())
        dashboard = True
        try:
            load("distributed.dashboard.scheduler", "hpc")
        except MissingExtra as error:
            dashboard = False
            listener.say(f"no dashboard and no dask report: {error}")
        with _interrupts_wait(), _temporaries_in(folder):
            cluster = _start(distributed, spec.n_workers, limit, folder)
            stack.callback(cluster.close)
            client = distributed.Client(cluster, direct_to_workers=True)
            stack.callback(client.close)
        refuse_open_doors(known)
        report = distributed.performance_report(filename=str(folder / "report.html"), mode="inline")
        client.sync(report.__aenter__)
        # Not before, nor when the end begins: workers that were lost and restarted, and why.
        stack.enter_context(_told(("distributed.nanny", "distributed.nanny.memory"), listener))
        yield _Local(client, report, listener, spec.n_workers, limit, cluster.dashboard_link if dashboard else "")


def _start(distributed: Any, n_workers: int, limit: int, folder: Path) -> Any:
    """A LocalCluster of single-threaded processes; TsclustError with the likely cause when it does not come up."""
    try:
        return distributed.LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,
            processes=True,
            host=_LOOPBACK,
            protocol="tls://",
            security=distributed.Security.temporary(tls_min_version=load("ssl").TLSVersion.TLSv1_3),
            # Given even where there is no dashboard: without it the scheduler asks for port 8787 and warns when taken.
            dashboard_address=f"{_LOOPBACK}:0",
            memory_limit=limit,
            local_directory=str(folder),
            silence_logs=logging.CRITICAL,
            # After the spawn: numba in this process would notice the variable and refuse to change its threads.
            env=_ONE_THREAD | {"NUMBA_NUM_THREADS": "1", "TMPDIR": str(folder)},
        )
    except Exception as error:
        raise TsclustError(
            f"the local cluster of {plural(n_workers, 'worker')} did not start ({error}). Worker processes import the "
            "main script again: in a script of your own, call this under `if __name__ == '__main__':`. "
            "Or use --scheduler threads."
        ) from error


@dataclass(frozen=True)
class _Local:
    client: Any
    report: Any
    listener: Listener
    n_workers: int
    worker_bytes: int
    dashboard: str

    def mapper(self, fn: Function, items: Iterable[Any]) -> Iterator[Any]:
        stage, run = _task_name(fn), secrets.token_hex(16)
        # fn travels once, as the result of a task: a scattered copy would be lost with the worker that holds it, and
        # one in every task costs 20 ms more for 2 MB. Pickled here, so that dask does not look for graphs inside it.
        submit, dumps, count = self.client.submit, load("cloudpickle").dumps, itertools.count()
        carrier = submit(pickle.loads, dumps(fn), key=f"carry-{stage}-{run}", pure=False)

        def start(item: Any) -> Any:
            return submit(_apply, carrier, dumps(item), key=(f"{stage}-{run}", next(count)), pure=False)

        try:
            yield from _ahead(start, _RELEASE, items, _AHEAD * self.n_workers)
        except load("distributed").KilledWorker as error:
            raise TsclustError(
                f"{plural(_DEATHS + 1, 'worker')} died over the same task ({error.task}), each allowed "
                f"{format_bytes(self.worker_bytes)} of memory. Use more --memory, fewer --workers, or smaller chunks."
            ) from error
        finally:
            carrier.release()

    def save_report(self, path: Path) -> None:
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


def _ahead(start: Function, drop: Function, items: Iterable[Any], limit: int) -> Iterator[Any]:
    """The results of the tasks that `start` makes of `items`, in order; never more than `limit` tasks at a time."""
    waiting: deque[Any] = deque()
    try:
        for item in items:
            waiting.append(start(item))
            if len(waiting) >= limit:
                yield waiting[0].result()
                drop(waiting.popleft())
        while waiting:
            yield waiting[0].result()
            drop(waiting.popleft())
    finally:
        for task in waiting:
            drop(task)


def _apply(fn: Function, item: bytes) -> Any:
    """One task, on a worker."""
    return fn(pickle.loads(item))


def _task_name(fn: Function) -> str:
    inner = getattr(fn, "func", fn)  # functools.partial has no name of its own
    return str(getattr(fn, "task_name", "") or getattr(inner, "__name__", "") or type(fn).__name__)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """`variables` set while the block runs, for worker processes, also restarted ones; then all as it was before."""
    names = (*variables, *_LEAKED)
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


@contextlib.contextmanager
def _temporaries_in(folder: Path) -> Iterator[None]:
    """New temporary files go to `folder`: ssl reads keys from files only, and the usual place may be a shared disk."""
    before = tempfile.gettempdir()
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """The cluster's own log is not printed: distributed, imported, gives each of these a handler on stderr."""
    names = ("distributed", "distributed.client", "distributed.gc", "tornado", "tornado.application", "bokeh")
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger, logger.handlers[:], logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers[:], logger.propagate = [logging.NullHandler()], False
    try:
        yield
    finally:
        for logger, handlers, propagate in before:
            logger.handlers[:], logger.propagate = handlers, propagate


@contextlib.contextmanager
def _told(names: tuple[str, ...], listener: Listener) -> Iterator[None]:
    """Warnings of the loggers `names` go to `listener` while the block runs."""

    def tell(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            listener.say(f"local cluster: {record.getMessage()}")
        return True

    for name in names:
        logging.getLogger(name).addFilter(tell)
    try:
        yield
    finally:
        for name in names:
            logging.getLogger(name).removeFilter(tell)


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect when the block has ended; a second one does at once.

    SIGINT stays blocked in threads and processes born inside: a terminal sends Ctrl-C to the whole process group, and
    workers have to live until this process has saved its progress.
    """
    waiting: list[int] = []

    def note(number: int, frame: Any) -> None:
        if waiting:
            before[number](number, frame)
        waiting.append(number)

    # Only the main thread may set handlers; a signal that is ignored, or fatal, has none to put off.
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {int(number): handler for number in numbers if callable(handler := signal.getsignal(number))}
    # The first spawn would start it, and leave SIGINT unblocked in the thread that spawns.
    load("multiprocessing.resource_tracker").ensure_running()
    for number in before:
        signal.signal(number, note)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
    if waiting:
        signal.raise_signal(waiting[0])
