"""Child processes that run libhdf5, so that this one never does.

Invariant: a file that crashes its parser, or keeps it longer than the deadline, costs that file (codes 'parser-crash'
and 'timeout'); the parser is replaced and the next file is parsed as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tsclust_ooc.interruption import SIGNALS, kept_from_children
from tsclust_ooc.shards.schema import Member, Schema, ShardError, Structure
from tsclust_ooc.shards.templates import Template

DEADLINE_SECONDS = 60.0


@dataclass(frozen=True)
class Probed:
    """What a parser found in a file, and the template it makes of it (when asked, and when it makes one)."""

    structure: Structure
    template: Template | None


class Parsers:
    """Up to `n` parser processes, started when first needed; use from any thread, close when done."""

    def __init__(self, n: int, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        self.n = n
        self._deadline = deadline_seconds
        self._free: queue.LifoQueue[_Parser] = queue.LifoQueue()
        for _ in range(n):
            self._free.put(_Parser())

    def __enter__(self) -> Parsers:
        return self

    def __exit__(self, *exc: object) -> None:
        for _ in range(self.n):
            self._free.get().stop()

    def warm_up(self) -> None:
        """Start one parser now; it imports while the caller does something else."""
        with self._borrowed() as parser:
            parser.start()

    def probe(self, path: str, *, learn: bool = False) -> Probed:
        """The structure of the file at `path`; ShardError when it is not one to read."""
        with self._borrowed() as parser:
            answer = parser.ask({"do": "learn" if learn else "probe", "path": path}, self._deadline)
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
        with self._borrowed() as parser:
            answer = parser.ask(request, self._deadline)
            if answer["n_bytes"] != len(out):
                parser.stop()
                raise ShardError("unstable", f"gave {answer['n_bytes']:,} bytes where the survey saw {len(out):,}")
            parser.receive_into(out, self._deadline)
        return list(answer["names"])

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[_Parser]:
        parser = self._free.get()
        try:
            yield parser
        finally:
            self._free.put(parser)


class _Parser:
    """One child process and its pipes; restarted by the next request after it died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pending = b""
        self._until = 0.0

    def start(self) -> subprocess.Popen[bytes]:
        """The running child; a fresh one when there is none."""
        if self._process is not None and self._process.poll() is not None:
            self.stop()
        if self._process is None:
            self._pending = b""
            # Ctrl-C and a scheduler's SIGTERM reach every process of a job: a parser that died of them would make its
            # shard a bad one. It ends when its stdin does.
            with kept_from_children(*SIGNALS):
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "tsclust_ooc.shards.child"],
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

    def ask(self, request: dict[str, Any], deadline_seconds: float) -> dict[str, Any]:
        """Send a request and wait for the line that answers it; ShardError for a problem, a crash or no answer."""
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
        if "problem" in answer:
            raise ShardError(*answer["problem"])
        return answer

    def receive_into(self, out: memoryview, deadline_seconds: float) -> None:
        """The raw bytes that follow an answer, straight into `out`."""
        self._until = time.monotonic() + deadline_seconds
        done = min(len(self._pending), len(out))
        out[:done] = self._pending[:done]
        self._pending = self._pending[done:]
        process = self.start()
        assert process.stdout is not None
        while done < len(out):
            self._wait(process)
            n = os.readv(process.stdout.fileno(), [out[done:]])
            if n == 0:
                self._crashed()
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
        raise ShardError("parser-crash", f"the process that parsed it died with {how}")


def _structure(body: list[Any]) -> Structure:
    members = tuple(Member(m[0], tuple(m[1]), *m[2:]) for m in body[0])
    return Structure(members, tuple(body[1]))
