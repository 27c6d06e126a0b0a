"""A folder seen through `far.py`: mounted for the length of a block, whatever happens in it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_SERVER = Path(__file__).with_name("far.py")
_DEADLINE_SECONDS = 30.0


@dataclass
class Mount:
    """A mounted folder at `path`; `served` has the server's counters once the block has ended."""

    path: Path
    counters: Path
    process: subprocess.Popen[bytes]
    served: dict[str, Any] = field(default_factory=dict)

    def so_far(self) -> dict[str, Any]:
        """The counters now."""
        self.counters.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR1)
        _wait(self.counters.exists, self.process)
        return dict(json.loads(self.counters.read_text()))


@contextmanager
def far_away(source: Path, place: Path, **options: object) -> Iterator[Mount]:
    """`source` mounted below `place`; `options` are those of far.py (delay_ms=2, fail_every=50, errno='EIO', ...)."""
    mountpoint, counters = place / "far", place / "counters.json"
    mountpoint.mkdir(parents=True, exist_ok=True)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    process = subprocess.Popen([sys.executable, str(_SERVER), str(source), str(mountpoint), str(counters), *words])
    mount = Mount(mountpoint, counters, process)
    try:
        _wait(lambda: os.path.ismount(mountpoint), process)
        yield mount
    finally:
        # Lazily: a test that failed may have left a file open, and its folder must be removable all the same.
        subprocess.run(["fusermount3", "-u", "-z", str(mountpoint)], check=False, stderr=subprocess.DEVNULL)
        try:
            process.wait(_DEADLINE_SECONDS)
        finally:
            process.kill()
            process.wait()
    mount.served = json.loads(counters.read_text())


def _wait(condition: Any, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _DEADLINE_SECONDS
    while not condition():
        assert process.poll() is None, "the filesystem's process ended"
        assert time.monotonic() < end, "the filesystem's process does not answer"
        time.sleep(0.005)
