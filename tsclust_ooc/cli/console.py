"""What a command shows: progress on stderr, its result on stdout, as text or as one line of JSON."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar

from cyclopts import Parameter, Token
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tsclust_ooc import provenance, records
from tsclust_ooc.cli.escaping import clean
from tsclust_ooc.errors import CannotWrite, TsclustError, UsageError
from tsclust_ooc.remote import is_url, plain_path, shown
from tsclust_ooc.units import format_bytes, format_count, format_seconds

_URL_AS_PATH, _AS_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(?=[^/])"), r"\1://"
_MINUTE = 60.0


@dataclass(frozen=True)
class OutputOptions:
    """What is printed.

    Attributes
    ----------
    json
        One line of JSON on stdout, nothing else there.
    quiet
        No progress and no result text; errors only.
    log_file
        Also append progress lines and messages, with times, to this file.
    """

    json: bool = False
    quiet: bool = False
    log_file: Path | None = None


Output = Annotated[OutputOptions, Parameter(name="*")]
Options = TypeVar("Options", bound=Any)


class Session:
    """One command's output: a Listener for the work, and `result` for its end."""

    def __init__(self, options: OutputOptions, progress: Progress | None, log: TextIO | None) -> None:
        self._options, self._progress, self._log = options, progress, log
        self._tasks: dict[str, Any] = {}
        self._guard = threading.Lock()
        self._last_line = self._began = time.monotonic()

    def advance(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is: a bar on a terminal, a line a minute elsewhere."""
        with self._guard:
            if self._progress is not None:
                if stage not in self._tasks:
                    self._tasks[stage] = self._progress.add_task(stage, total=total)
                self._progress.update(self._tasks[stage], completed=done, total=total)
            now = time.monotonic()
            if now - self._last_line >= _MINUTE:
                self._last_line = now
                self._line(_progress_line(stage, done, total, now - self._began), terminal=self._progress is None)

    def say(self, message: str) -> None:
        """One line for a person."""
        with self._guard:
            self._line(message, terminal=True)

    def _line(self, text: str, *, terminal: bool) -> None:
        text = clean(text)
        if self._log is not None:
            self._log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n")
            self._log.flush()
        if terminal and not self._options.quiet:
            if self._progress is not None:
                self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                sys.stderr.write(f"{text}\n")
                sys.stderr.flush()

    def result(self, result: Any, lines: Sequence[str]) -> None:
        """Show a result: as JSON, or as the given lines."""
        if self._progress is not None:
            self._progress.stop()
        if self._options.json:
            sys.stdout.write(records.dumps(result) + "\n")
        elif not self._options.quiet:
            sys.stdout.write("".join(f"{clean(line)}\n" for line in lines))


@contextlib.contextmanager
def session(options: OutputOptions) -> Iterator[Session]:
    """The output of one command; with --json an error is one JSON object too."""
    with contextlib.ExitStack() as stack:
        log = None if options.log_file is None else stack.enter_context(_open_log(expand(options.log_file)))
        progress = stack.enter_context(_bars()) if sys.stderr.isatty() and not options.quiet else None
        try:
            with _naming_files():
                yield Session(options, progress, log)
        except TsclustError as error:
            if options.json:
                problems = [vars(p) for p in getattr(error, "problems", ())]
                body = {"error": str(error), "exit_code": error.exit_code, "problems": problems}
                sys.stdout.write(json.dumps(body) + "\n")
            raise


def _open_log(path: Path) -> TextIO:
    try:
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise CannotWrite(f"--log-file {path}: {error.strerror}. Give a file that can be written.") from error


@contextlib.contextmanager
def _naming_files() -> Iterator[None]:
    """A file that the system refuses (permission, a file where a folder should be) is no bug of ours: name it."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise TsclustError(
            f"{error.filename}: {error.strerror}. Check the path, then run the same command again."
        ) from error


def _as_place(_: Any, tokens: Sequence[Token]) -> str | Path:
    text = plain_path(tokens[0].value)
    return text if is_url(text) else Path(text)


Place = Annotated[str | Path, Parameter(converter=_as_place, n_tokens=1)]
"""An argument that is a path, or a URL as text."""


def expand_place(place: str | Path) -> str | Path:
    """A path expanded; a URL as it is."""
    return place if isinstance(place, str) and is_url(place) else expand(place)


def expand(path: str | Path) -> Path:
    """A path argument with ~ and $VARS expanded; UsageError for a URL, which has one slash as a Path."""
    if _URL_AS_PATH.match(str(path)):
        raise UsageError(
            f"{shown(_URL_AS_PATH.sub(_AS_URL, str(path)))} is a URL, and this takes a path of this machine. Copy what "
            "is there first, for instance by 'aws s3 sync'; zarr, dask and xarray open a dataset where it is."
        )
    return Path(os.path.expandvars(os.path.expanduser(path)))  # a ~user nobody knows is left as it is


def expanded(options: Options) -> Options:
    """Options with every path in them expanded."""
    given = {field.name: getattr(options, field.name) for field in fields(options)}
    paths: dict[str, Any] = {name: expand(value) for name, value in given.items() if isinstance(value, Path)}
    paths |= {
        name: tuple(map(expand, value)) for name, value in given.items()
        if isinstance(value, tuple) and value and isinstance(value[0], Path)
    }  # fmt: skip
    nested = {name: expanded(value) for name, value in given.items() if is_dataclass(value)}
    return replace(options, **paths, **nested)


def _bars() -> Progress:
    return Progress(
        TextColumn("  {task.description:<10}"), MofNCompleteColumn(), BarColumn(bar_width=28), TimeElapsedColumn(),
        TimeRemainingColumn(), console=Console(stderr=True), transient=True,
    )  # fmt: skip


def _progress_line(stage: str, done: int, total: int, seconds: float) -> str:
    rate = done / max(seconds, 1e-9)
    left = format_seconds((total - done) / rate) if rate > 0 else "unknown"
    memory = format_bytes(provenance.tree_bytes(os.getpid()))
    return (
        f"{stage}   {format_count(done)} of {format_count(total)}   {rate:,.0f}/s   "
        f"{format_seconds(seconds)} gone, {left} left   memory {memory}"
    )


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of a plain table, columns padded; those in `right` are right-aligned. The first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
