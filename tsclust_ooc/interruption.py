"""What ends a command from outside: SIGINT (Ctrl-C), SIGTERM (kill, a scheduler) and SIGHUP (a closed session).

Invariant: inside `listening` the first of them raises `Interrupted` in the main thread, again if somebody swallowed
it, and all further ones are ignored; but a second SIGINT, or `GRACE_SECONDS` gone by, ends the process at once with
all that it started, whatever its threads are doing. A signal that was ignored when the process started (nohup) stays
ignored. Work must be safe from SIGKILL anyway, so ending at once loses what is not finished and nothing else.

Python runs its handlers between two bytecodes of the main thread, which may be deep in a library or wait for a dead
file server. So a thread of our own hears the signals too, through the wakeup descriptor, which needs no main thread.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NoReturn

from tsclust_ooc.errors import TryAgain

GRACE_SECONDS = 8.0
"""How long an interrupted command may take to end by itself; schedulers kill after 10 to 30."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that are listened to."""

Farewell = Callable[[int], Mapping[int, str]]
"""What to say when a signal (its number) ends the process: file descriptor -> text."""

_LOOK_SECONDS = 0.02  # between two looks whether an interrupt was swallowed
_SAY_SECONDS = 0.5  # last words to a pipe that nobody reads are dropped after this
_CLOSE = 0  # what `close` writes into the pipe; no signal has this number
_TRACKER = b"multiprocessing.resource_tracker"  # it cleans up after us, and ends by itself


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to end; `number` says which. The exit code is that of TryAgain."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


@contextlib.contextmanager
def listening(farewell: Farewell, grace_seconds: float = GRACE_SECONDS) -> Iterator[None]:
    """The block ends with `Interrupted` when a signal asks for it; signals are as before when it has ended.

    Whatever else an interrupted block ends with (the terminal is gone, a pool is closed) is its cause. A block that
    comes to its end in spite of a signal has done its work, and nothing is raised. Outside the main thread signals
    cannot be listened to, and nothing changes.

    Parameters
    ----------
    farewell
        Gives what to say when the process is ended at once; it must not wait for any lock.
    grace_seconds
        From the first signal until the process is ended at once, if it is still in the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ear = _Ear(farewell, grace_seconds)
    try:
        ear.open()
        yield
    except Exception as error:
        if ear.number:
            raise Interrupted(ear.number) from error
        raise
    finally:
        ear.close()


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Signals take effect when the block has ended, to start what cannot be half started; a second SIGINT does at once.

    SIGINT stays blocked in threads and processes born inside: a terminal sends Ctrl-C to the whole process group, and
    workers have to live until this process has saved its progress.
    """
    waiting: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if waiting and number == signal.SIGINT:
            before[number](number, frame)
        waiting.append(number)

    # Only the main thread may set handlers; a signal that is ignored, or fatal, has none to put off.
    numbers = SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before: dict[int, Any] = {n: handler for n in numbers if callable(handler := signal.getsignal(n))}
    for number in before:
        signal.signal(number, note)
    try:
        with kept_from_children(signal.SIGINT):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if waiting:
        before[waiting[0]](waiting[0], None)


@contextlib.contextmanager
def kept_from_children(*numbers: int) -> Iterator[None]:
    """Threads and processes born in the block never get these signals, nor does this thread until it has ended.

    A child inherits what is blocked, from its first instruction on and through exec; what it could set for itself
    would come after its imports.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave(code: int) -> NoReturn:
    """End the process with exit status `code`; from here on no signal changes that, or shows a traceback.

    What was interrupted (`TryAgain.exit_code`) ends without waiting for anybody, and its children end with it.
    """
    listened = _listened()
    for number in listened:
        signal.signal(number, lambda *_: None)
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)
    for number in listened:
        signal.signal(number, lambda *_: os._exit(code))
    if code == TryAgain.exit_code:
        _end(code)
    # When Python takes itself apart it would give the signals their deadly defaults back, but not to ignored ones.
    atexit.register(_ignore)
    sys.exit(code)


def descendants() -> list[int]:
    """Process ids of all that this process started and what that started, the nearest first."""
    found = [os.getpid()]
    for pid in found:  # grows while we go
        with contextlib.suppress(OSError):  # it may end while we look
            for task in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children", "rb") as children:
                    found += map(int, children.read().split())
    return found[1:]


class _Ear:
    """What `listening` holds: handlers in the main thread, and the thread that hears every signal."""

    def __init__(self, farewell: Farewell, grace_seconds: float) -> None:
        self.number = 0  # the first signal
        self._farewell, self._grace_seconds = farewell, grace_seconds
        self._main = threading.get_ident()
        self._raised: weakref.ref[Interrupted] | None = None
        self._closed = False
        self._repeats = 0  # signals under way that we sent ourselves
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None

    def open(self) -> None:
        listened = _listened()
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._thread = threading.Thread(target=self._watch, args=(self._pipe[0],), name="signals", daemon=True)
        self._thread.start()
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in listened:
            self._before[number] = signal.signal(number, self._hear)

    def close(self) -> None:
        self._closed = True
        if self._pipe is None:
            return
        os.write(self._pipe[1], bytes([_CLOSE]))
        self._thread.join()
        signal.set_wakeup_fd(self._wakeup)
        sys.unraisablehook = self._hook
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for end in self._pipe:
            os.close(end)

    def _hear(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature of handlers
        if self._closed or (self._raised is not None and self._raised() is not None):
            return
        self.number = self.number or number
        raise self._interrupt()  # held by no variable here: its traceback would keep it alive

    def _interrupt(self) -> Interrupted:
        error = Interrupted(self.number)
        self._raised = weakref.ref(error)
        return error

    def _swallowed(self) -> bool:
        """Whether the interrupt was raised and is gone: in a callback of C code, or caught by a bare except."""
        return self._raised is not None and self._raised() is None

    def _unraisable(self, told: sys.UnraisableHookArgs) -> None:
        # Raised where nobody can catch it, in a callback of a weak reference: it is raised again, so nothing is said.
        if not isinstance(told.exc_value, Interrupted):
            self._hook(told)

    def _watch(self, pipe: int) -> None:
        poller = select.poll()
        poller.register(pipe, select.POLLIN)
        deadline = float("inf")
        while True:
            waited = poller.poll(None if deadline == float("inf") else 1000 * _LOOK_SECONDS)
            for number in os.read(pipe, 64) if waited else b"":
                if number == _CLOSE:
                    return
                deadline = self._heard(number, deadline)
            if time.monotonic() >= deadline:
                self._end_at_once()
            if self._swallowed() and not self._repeats:
                self._repeats += 1
                signal.pthread_kill(self._main, self.number)

    def _heard(self, number: int, deadline: float) -> float:
        """Take note of a signal; returns when the process has to be over."""
        if number not in SIGNALS:
            return deadline
        if deadline == float("inf"):
            self.number = self.number or number
            return time.monotonic() + self._grace_seconds
        if self._repeats and number == self.number:
            self._repeats -= 1
        elif number == signal.SIGINT:
            self._end_at_once()
        return deadline

    def _end_at_once(self) -> NoReturn:
        try:
            for descriptor, text in self._farewell(self.number).items():
                _say(descriptor, text)
        finally:
            _end(TryAgain.exit_code)


def _listened() -> list[int]:
    """Signals that were not ignored when the process started."""
    return [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]


def _end(code: int) -> NoReturn:
    """End the children, then this process, before any thread of it can take the end of a child for a fault."""
    children = [pid for pid in descendants() if not _is_tracker(pid)]
    sys.setswitchinterval(1.0)  # the other threads stand still from here on
    for pid in children:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    os._exit(code)


def _is_tracker(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as line:
            return _TRACKER in line.read()
    except OSError:
        return False


def _say(descriptor: int, text: str) -> None:
    """Write past all buffers and their locks; on a terminal on a line of its own, with the cursor shown."""
    with contextlib.suppress(OSError):
        if os.isatty(descriptor):
            text = f"\r\x1b[2K\x1b[?25h{text}"
        data = text.encode("utf-8", "backslashreplace")
        while data and select.select([], [descriptor], [], _SAY_SECONDS)[1]:
            data = data[os.write(descriptor, data[: select.PIPE_BUF]) :]  # so much a pipe that is ready takes at once


def _flush(stream: Any) -> None:
    """Write out what is buffered; where nobody takes it (a closed pipe or terminal) it is dropped without a word."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
    except AttributeError:  # Python was started without it
        pass


def _ignore() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
