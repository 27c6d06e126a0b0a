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
from concurrent.futures import ThreadPoolExecutor
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

_AHEAD = 2  # tasks a worker: one running, one waiting, so that no worker idles while a result is consumed
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
    "distributed.worker.multiprocessing-method": "spawn",
    "distributed.worker.use-file-locking": False,  # the folder is this cluster's own
    # Workers store nothing but a finished block: there is nothing to spill, and a paused worker might never resume.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": 0.95,
    "distributed.diagnostics.nvml": False,
    "distributed.admin.large-graph-warning-threshold": "1 GB",
    "distributed.comm.require-encryption": True,
}
_TALKERS = ("distributed", "tornado", "tornado.application", "bokeh", "asyncio")


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

    def mapper(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
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


@dataclass(frozen=True)
class Door:
    """A listening TCP socket that other machines may reach."""

    pid: int
    address: str
    port: int


def open_doors() -> frozenset[Door]:
    """TCP sockets of this process and its descendants that listen on anything but loopback."""
    psutil = load("psutil")  # distributed brings it
    me, found = psutil.Process(), set()
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end while we look
            # psutil 6 renamed it
            sockets = getattr(process, "net_connections", None) or process.connections
            found |= {Door(process.pid, *s.laddr) for s in sockets(kind="tcp") if s.status == psutil.CONN_LISTEN}
    return frozenset(door for door in found if not _is_loopback(door.address))


def refuse_open_doors(known: frozenset[Door] = frozenset()) -> None:
    """TsclustError when `open_doors` finds any that are not `known`."""
    opened = [f"{door.address} port {door.port} (process {door.pid})" for door in open_doors() - known]
    if opened:
        raise TsclustError(
            f"the local cluster listens beyond this machine, on {', '.join(sorted(opened))}, where only loopback is "
            "wanted. It was stopped. Look for preloads and addresses in your dask configuration (dask config list), "
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

    def mapper(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        return _ahead(lambda item: self.pool.submit(fn, item), items, _AHEAD * self.n_workers)

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
        dashboard = _has_dashboard(listener)
        with _interrupts_wait(), _temporaries_in(folder):
            cluster = _start(distributed, spec.n_workers, limit, folder)
            stack.callback(cluster.close)
            client = distributed.Client(cluster, direct_to_workers=True)
            stack.callback(client.close)
        refuse_open_doors(known)
        report = distributed.performance_report(filename=str(folder / "report.html"), mode="inline")
        client.sync(report.__aenter__)
        # While the block runs, not at start or end: workers that were lost and restarted, and why.
        nannies, teller = logging.getLogger("distributed.nanny"), _Teller(listener)
        nannies.addHandler(teller)
        stack.callback(nannies.removeHandler, teller)
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

    def mapper(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        stage, run = _task_name(fn), secrets.token_hex(16)
        dumps = load("cloudpickle").dumps
        # fn travels once, as the result of a task: a scattered copy would be lost with the worker that holds it, and
        # one in every task costs 20 ms more for 2 MB. Pickled here, so that dask does not look for graphs inside it.
        submit, count = self.client.submit, itertools.count()
        carrier = submit(pickle.loads, dumps(fn), key=f"carry-{stage}-{run}", pure=False)

        def start(item: Any) -> Any:
            return submit(_apply, carrier, dumps(item), key=(f"{stage}-{run}", next(count)), pure=False)

        try:
            yield from _ahead(start, items, _AHEAD * self.n_workers)
        except load("distributed").KilledWorker as error:
            raise TsclustError(
                f"{plural(_DEATHS + 1, 'worker')} died over the same task ({error.task}), each allowed "
                f"{format_bytes(self.worker_bytes)} of memory. Use more --memory, fewer --workers, or smaller chunks."
            ) from error

    def save_report(self, path: Path) -> None:
        page = Path(self.report.filename)
        try:
            self.client.sync(self.report.__aexit__, None, None, None, code="tsclust")
            # Its one outside link is an icon, which a browser would fetch.
            write_atomic(path, re.sub(b'<link rel="shortcut icon"[^>]*>', b"", page.read_bytes()))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self.listener.say(f"no dask report at {path}: {reason}. The results are not affected.")
        finally:
            page.unlink(missing_ok=True)


def _ahead(start: Callable[[Any], Any], items: Iterable[Any], limit: int) -> Iterator[Any]:
    """The results of the tasks that `start` makes of `items`, in order; never more than `limit` tasks at a time."""
    waiting: deque[Any] = deque()
    try:
        for item in items:
            waiting.append(start(item))
            if len(waiting) >= limit:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for task in waiting:
            task.cancel()


def _is_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def _apply(fn: Callable[[Any], Any], item: bytes) -> Any:
    """One task, on a worker."""
    return fn(pickle.loads(item))


def _task_name(fn: Callable[[Any], Any]) -> str:
    inner = getattr(fn, "func", fn)  # functools.partial has no name of its own
    return str(getattr(fn, "task_name", "") or getattr(inner, "__name__", "") or type(fn).__name__)


def _has_dashboard(listener: Listener) -> bool:
    try:
        load("distributed.dashboard.scheduler", "hpc")
    except MissingExtra as error:
        listener.say(f"no dashboard and no dask report: {error}")
        return False
    return True


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """`variables` set while the block runs, for worker processes, also restarted ones; then all as it was before."""
    before = {name: os.environ.get(name) for name in (*variables, *_LEAKED)}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


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
    """The cluster's own log reaches nobody: distributed prints to stderr from the moment it is imported."""
    loggers = [logging.getLogger(name) for name in _TALKERS]
    before = [(logger, logger.handlers[:], logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers[:], logger.propagate = [logging.NullHandler()], False
    try:
        yield
    finally:
        for logger, handlers, propagate in before:
            logger.handlers[:], logger.propagate = handlers, propagate


class _Teller(logging.Handler):
    """Passes warnings to the listener."""

    def __init__(self, listener: Listener) -> None:
        super().__init__(logging.WARNING)
        self._listener = listener

    def emit(self, record: logging.LogRecord) -> None:
        self._listener.say(f"local cluster: {record.getMessage()}")


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect when the block has ended; a second one does at once.

    SIGINT stays blocked in threads and processes born inside: a terminal sends Ctrl-C to the whole process group, and
    workers have to live until this process has saved its progress.
    """
    waiting: list[signal.Signals] = []
    # The first spawn would start it, and leave SIGINT unblocked in the thread that spawns.
    load("multiprocessing.resource_tracker").ensure_running()
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                _defer(number, waiting, stack)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
        yield
    if waiting:
        signal.raise_signal(waiting[0])


def _defer(number: signal.Signals, waiting: list[signal.Signals], stack: contextlib.ExitStack) -> None:
    previous = signal.getsignal(number)
    if not callable(previous):
        return  # ignored, or fatal: there is nothing to put off

    def note(signum: int, frame: Any) -> None:
        if waiting:
            previous(signum, frame)
        waiting.append(number)

    signal.signal(number, note)
    stack.callback(signal.signal, number, previous)
