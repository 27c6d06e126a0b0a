"""Where it runs: threads here, a dask cluster of processes here, Slurm jobs, a running dask cluster; one `mapper`.

Invariant: the results of `mapper(fn, items)` are those of builtin `map`, in its order, whoever computed them and
however many workers died meanwhile; at most two tasks a worker are in flight. Nothing that is started here listens
beyond loopback and the named interface or speaks without TLS, and nothing of it is left when the block ends: no
process, no job, no socket, no file.

dask and distributed take a second to import: they, and what only they need, are loaded when a cluster is asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tsclust_ooc.progress import Listener, silent
from tsclust_ooc.runtime.address import open_address
from tsclust_ooc.runtime.doors import open_doors, refuse_open_doors
from tsclust_ooc.runtime.local import open_local
from tsclust_ooc.runtime.slurm import open_slurm
from tsclust_ooc.runtime.spec import LEAST_WORKER_BYTES, SCHEDULERS, ClusterSpec, Jobs, Runtime, worker_bytes
from tsclust_ooc.runtime.threads import open_threads

__all__ = [
    "LEAST_WORKER_BYTES",
    "SCHEDULERS",
    "ClusterSpec",
    "Jobs",
    "Runtime",
    "open_doors",
    "open_runtime",
    "refuse_open_doors",
    "worker_bytes",
]

_OPENERS = {"threads": open_threads, "local": open_local, "slurm": open_slurm}


@contextlib.contextmanager
def open_runtime(spec: ClusterSpec, listener: Listener = silent) -> Iterator[Runtime]:
    """The runtime that `spec` asks for, closed with everything it started when the block ends, however it ends.

    While a cluster is open its client is dask's default, so dask collections computed in the block run on it; the
    listener is told where its dashboard is. Raises CannotWrite when the memory does not hold its workers, UsageError
    for options that do not fit, TsclustError when the cluster does not start or would listen where it should not.
    """
    with _OPENERS.get(spec.scheduler, open_address)(spec, listener) as runtime:
        yield runtime
