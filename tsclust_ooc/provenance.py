"""Where, when and with what something was made, and how much memory it took.

Invariant: no secrets and no environment: only the names listed here ever reach a record.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import socket
import sys
import threading
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tsclust_ooc import __version__

_PACKAGES = ("numpy", "zarr", "h5py", "dask", "distributed", "dask-ml", "numba", "scikit-learn", "pyarrow")
_JOB_VARIABLES = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "PBS_JOBID", "JOB_ID", "LSB_JOBID")
_SAMPLE_SECONDS = 0.1


@dataclass(frozen=True)
class Provenance:
    """Who made a record: versions, host, job and the time (UTC, ISO 8601)."""

    tsclust_version: str
    python: str
    platform: str
    host: str
    job: dict[str, str]
    packages: dict[str, str]
    created: str


def here_and_now() -> Provenance:
    """The provenance of what this process makes now."""
    return Provenance(
        tsclust_version=__version__,
        python=platform.python_version(),
        platform=f"{sys.platform}-{platform.machine()}",
        host=socket.gethostname(),
        job={name: os.environ[name] for name in _JOB_VARIABLES if name in os.environ},
        packages={name: version for name in _PACKAGES if (version := _version(name))},
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


class Meter:
    """Measures a block of work: seconds, and peak resident bytes of the whole process tree.

    Sampled ten times a second. Pages shared between processes count once for each, so the figure is an upper bound.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory meter", daemon=True)

    def __enter__(self) -> Meter:
        self._started = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.seconds = time.perf_counter() - self._started
        self._stop.set()
        self._thread.join()
        self._sample()

    @property
    def peak_bytes(self) -> int:
        """Peak so far: inside the block it looks once more, so that work of less than a sample is measured too."""
        if self._thread.is_alive():
            self._sample()
        return self._peak

    def elapsed(self) -> float:
        """Seconds since the block was entered."""
        return time.perf_counter() - self._started

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        self._peak = max(self._peak, tree_bytes(os.getpid()))


def tree_bytes(pid: int) -> int:
    """Resident bytes of process `pid` and all its descendants now."""
    total = 0
    with contextlib.suppress(OSError, ValueError, IndexError):  # processes may end while we look
        total = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # threads too
                total += sum(tree_bytes(int(child)) for child in (task / "children").read_text().split())
    return total
