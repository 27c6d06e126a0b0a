"""Tasks on a dask cluster that somebody else started, given as tls://HOST:PORT."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tsclust_ooc.errors import TsclustError, UsageError
from tsclust_ooc.extras import load
from tsclust_ooc.progress import Listener
from tsclust_ooc.runtime.client import CONFIG, OnDask, has_dashboard, recorded
from tsclust_ooc.runtime.local import private_folder
from tsclust_ooc.runtime.spec import ClusterSpec, Runtime
from tsclust_ooc.runtime.surroundings import environment, unheard

_KEYS = ("ca.pem", "cert.pem", "key.pem")
_CONNECT_SECONDS = 20


@contextlib.contextmanager
def open_address(spec: ClusterSpec, listener: Listener) -> Iterator[Runtime]:
    """A client of the scheduler at `spec.scheduler`; the cluster itself is left as it was found.

    Raises TsclustError when nobody answers, when it has no workers, or when they have another tsclust_ooc.
    """
    distributed, dask = load("distributed"), load("dask")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(private_folder(spec.scratch))
        stack.enter_context(dask.config.set({k: CONFIG[k] for k in CONFIG if ".comm." in k or ".admin." in k}))
        stack.enter_context(environment({}))
        stack.enter_context(unheard())
        dashboard = has_dashboard(listener)
        client = stack.enter_context(_connected(distributed, spec))
        workers = client.scheduler_info(n_workers=-1)["workers"]
        _check_workers(client, workers, spec.scheduler)
        report = stack.enter_context(recorded(client, folder))
        limit = min(int(worker["memory_limit"]) for worker in workers.values())
        url = client.dashboard_link if dashboard else ""
        if url:
            listener.say(f"dashboard {url}")
        yield OnDask(client, report, listener, sum(w["nthreads"] for w in workers.values()), limit, url)


@contextlib.contextmanager
def _connected(distributed: Any, spec: ClusterSpec) -> Iterator[Any]:
    security = distributed.Security(require_encryption=True, **_keys(spec.jobs.tls))
    try:
        client = distributed.Client(spec.scheduler, security=security, timeout=_CONNECT_SECONDS)
    except (OSError, TimeoutError, TypeError, ValueError) as error:
        where = spec.jobs.tls or "dask's configuration (distributed.comm.tls)"
        raise TsclustError(
            f"no dask scheduler answered at {spec.scheduler} with the keys of {where}: {error}. "
            "Check the address, and give the keys it was started with: --tls DIR (ca.pem, cert.pem, key.pem)."
        ) from error
    try:
        yield client
    finally:
        client.close()


def _keys(folder: Path | None) -> dict[str, str]:
    if folder is None:
        return {}
    missing = [name for name in _KEYS if not (folder / name).is_file()]
    if missing:
        raise UsageError(f"--tls {folder} has no {', '.join(missing)}. Give a directory with {', '.join(_KEYS)}.")
    ca, cert, key = (str(folder / name) for name in _KEYS)
    return {"tls_ca_file": ca, "tls_client_cert": cert, "tls_client_key": key}


def _check_workers(client: Any, workers: dict[str, Any], address: str) -> None:
    if not workers:
        raise TsclustError(
            f"the dask cluster at {address} has no workers. Start some, then run the same command again."
        )
    here = load("tsclust_ooc").__version__
    try:
        found = client.run(_version)
    except ImportError as error:
        raise TsclustError(
            f"the workers at {address} cannot import tsclust_ooc ({error}). Install it there."
        ) from error
    odd = {worker: version for worker, version in found.items() if version != here}
    if odd:
        worker, version = next(iter(odd.items()))
        raise TsclustError(
            f"{len(odd)} of {len(found)} workers at {address} have another tsclust_ooc ({worker}: {version}); "
            f"this one is {here}. Install the same there."
        )


def _version() -> str:
    """The tsclust_ooc of a worker."""
    return str(load("tsclust_ooc").__version__)
