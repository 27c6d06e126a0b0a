"""Child processes that run libhdf5, so that this one never does.

Invariant: a file that crashes its parser, or keeps it longer than the deadline, costs that file (codes 'parser-crash'
and 'timeout'); the parser is replaced and the next file is parsed as if nothing had happened. One that was killed from
outside is no fault of the file: it is tried again.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tsclust_ooc.interruption import SIGNALS, kept_from_children
from tsclust_ooc.patience import Patience
from tsclust_ooc.shards.schema import Member, Schema, ShardError, Structure
from tsclust_ooc.shards.templates import Template

DEADLINE_SECONDS = 60.0


@dataclass(frozen=True)
class Probed:
    """What a parser found in a file, and the template it makes of it (when asked, and when it makes one)."""

    structure: Structure
    template: Template | None


class Parsers:
    """Up to `n` parser processes, started when first needed; use from any thread, close when done.

    `patience` says how often they try again what the disk or the network fails at, and counts it.
    """

    def __init__(self, n: int, deadline_seconds: float = DEADLINE_SECONDS, *, patience: Patience | None = None) -> None:
        self.n, self.patience = n, patience or Patience()
        self._deadline = deadline_seconds
        self._free = [_Parser() for _ in range(n)]
        self._returned = threading.Condition()

    def __enter__(self) -> Parsers:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._returned:
            self._returned.wait_for(lambda: len(self._free) == self.n)
            for parser in self._free:
                parser.close()

    def warm_up(self) -> None:
        """Start one parser now; it imports while the caller does something else."""
        with self._borrowed() as parser:
            parser.start()

    def probe(self, path: str, *, learn: bool = False) -> Probed:
        """The structure of the file at `path`; ShardError when it is not one to read."""
        with self._borrowed() as parser:
            answer = self._ask(parser, {"do": "learn" if learn else "probe", "path": path})
        template = answer["template"]
        if template is not None:
            template = Template(**{**template, "shape": tuple(template["shape"])})
        return Probed(_structure(answer["structure"]), template)

    def read(
        self, path: str, stamp: tuple[int, int], schema: Schema, start: int, stop: int, out: memoryview
    ) -> list[str]:
        """Fill `out` (bytes) with samples `start` to `stop` of the file; returns the names it has for them, if any.

        Raises ShardError when the file cannot be read or changed since `stamp` (size, mtime_ns).
        """
        request = {"do": "read", "path": path, "stamp": stamp, "schema": asdict(schema), "start": start, "stop": stop}
        with self._borrowed(path) as parser:
            parser.make_room(len(out))
            answer = self._ask(parser, request)
            parser.path = path
            parser.take(out)
        return list(answer["names"])

    def _ask(self, parser: _Parser, request: dict[str, Any]) -> dict[str, Any]:
        request = {**request, "tries": self.patience.tries}
        try:
            answer = parser.ask(request, self._deadline)
        except _Killed:
            answer = parser.ask(request, self._deadline)
        self.patience.add(answer["n_retries"])
        if "problem" in answer:
            raise ShardError(*answer["problem"])
        return answer

    @contextlib.contextmanager
    def _borrowed(self, path: str = "") -> Iterator[_Parser]:
        """A parser that nobody uses: the one that has `path` open if it is free, else the one used last."""
        with self._returned:
            self._returned.wait_for(lambda: self._free)
            parser = next((one for one in self._free if path and one.path == path), self._free[-1])
            self._free.remove(parser)
        try:
            yield parser
        finally:
            with self._returned:
                self._free.append(parser)
                self._returned.notify_all()


class _Killed(ShardError):
    """The parser was killed from outside: by somebody, or for want of memory."""


class _Parser:
    """One child process, its pipes and the memory it shares with us; restarted by the next request after it died.

    `path` is the file that it read from last and keeps open, '' if there is none.
    """

    def __init__(self) -> None:
        self.path = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._samples = -1  # a file in memory: a pipe would carry its bytes in pieces, and copy them twice
        self._pending = b""
        self._until = 0.0

    def start(self) -> subprocess.Popen[bytes]:
        """The running child; a fresh one when there is none."""
        if self._process is not None and self._process.poll() is not None:
            self.stop()
        if self._process is None:
            self._pending = b""
            if self._samples < 0:
                self._samples = os.memfd_create("tsclust-samples")
            # Ctrl-C and a scheduler's SIGTERM reach every process of a job: a parser that died of them would make its
            # shard a bad one. It ends when its stdin does.
            with kept_from_children(*SIGNALS):
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "tsclust_ooc.shards.child", str(self._samples)], pass_fds=[self._samples],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
                )  # fmt: skip
        return self._process

    def stop(self) -> None:
        """End the child, if there is one, and reap it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None
            self.path = ""

    def close(self) -> None:
        """End the child for good, and give back the memory."""
        self.stop()
        if self._samples >= 0:
            os.close(self._samples)
            self._samples = -1

    def make_room(self, n_bytes: int) -> None:
        """Let the memory that is shared hold `n_bytes`."""
        self.start()
        if n_bytes > os.fstat(self._samples).st_size:
            os.ftruncate(self._samples, n_bytes)

    def ask(self, request: dict[str, Any], deadline_seconds: float) -> dict[str, Any]:
        """Send a request and wait for the line that answers it; ShardError for a crash or no answer."""
        process = self.start()
        assert process.stdin is not None
        self._until = time.monotonic() + deadline_seconds
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            self._crashed()
        while b"\n" not in self._pending:
            self._pending += self._some()
        line, self._pending = self._pending.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def take(self, out: memoryview) -> None:
        """The samples that the last answer is about, into `out`."""
        done = 0
        while done < len(out):
            n = os.preadv(self._samples, [out[done:]], done)
            if n == 0:  # no parser of ours makes it smaller
                self.stop()
                raise ShardError("parser-crash", f"the process that parsed it left {done:,} of {len(out):,} bytes")
            done += n

    def _some(self) -> bytes:
        process = self.start()
        assert process.stdout is not None
        self._wait(process)
        data = os.read(process.stdout.fileno(), 1 << 16)
        if not data:
            self._crashed()
        return data

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        left = self._until - time.monotonic()
        assert process.stdout is not None
        poller = select.poll()
        poller.register(process.stdout, select.POLLIN | select.POLLHUP)
        if left <= 0 or not poller.poll(left * 1000):
            self.stop()
            raise ShardError("timeout", "its parser gave no answer before the deadline and was ended")

    def _crashed(self) -> None:
        code = self._process.wait() if self._process else None
        self.stop()
        how = f"signal {-code}" if code is not None and code < 0 else f"status {code}"
        kind = _Killed if code == -signal.SIGKILL else ShardError
        raise kind("parser-crash", f"the process that parsed it died with {how}")


def _structure(body: list[Any]) -> Structure:
    members = tuple(Member(m[0], tuple(m[1]), *m[2:]) for m in body[0])
    return Structure(members, tuple(body[1]))
