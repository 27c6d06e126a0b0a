"""tsclust submit."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from tsclust_ooc.cli import build_app
from tsclust_ooc.cli.console import Output, OutputOptions, expand, session
from tsclust_ooc.errors import UsageError
from tsclust_ooc.pipeline.submitting import DEFAULTS, SubmitOptions, Submitted, Task, enter
from tsclust_ooc.pipeline.submitting import submit as run_submit
from tsclust_ooc.remote import is_url, shown
from tsclust_ooc.runtime import Jobs
from tsclust_ooc.submission import BATCHES
from tsclust_ooc.units import plural

_IN_THE_JOB = ("scratch",)  # directories of the node that runs the job: their $VARS mean what they mean there
_RESULT = {"consolidate": "dataset", "cluster": "run", "distances": "out"}


def submit(
    command: Literal["consolidate", "cluster", "distances"],
    /,
    *words: Annotated[str, Parameter(allow_leading_hyphen=True)],
    config: Path | None = None,
    options: Annotated[SubmitOptions, Parameter(name="*")] = DEFAULTS,
    jobs: Annotated[Jobs, Parameter(name="*", group="Batch jobs")] = Jobs(),
    output: Output = OutputOptions(),
) -> None:
    """Submit a command to a batch system: tsclust submit consolidate SRC DATASET --scheduler slurm

    Write the command as always; the options listed here are of submit wherever they stand, all others of the command.
    A consolidation is surveyed now, written by an array of jobs and published by a last one; any other command is one
    job. The command's options, environment and config file are settled now: nothing that changes later has a say.

    Parameters
    ----------
    command
        What to submit.
    words
        Its arguments and options. Paths are made absolute; $VARS in --scratch are left to the job.
    config
        TOML file with the options of the command and of submit.
    """
    with session(output) as show:
        task = settle(build_app(None if config is None else str(config)), command, words, options, jobs)
        done = run_submit(task, options, jobs)
        show.result(done, lines(done))


def settle(app: App, command: str, words: tuple[str, ...], options: SubmitOptions, jobs: Jobs) -> Task:
    """The command with every option that is not at its default, wherever it was given, and absolute paths.

    Raises CycloptsError or UsageError for what the command itself would refuse; nothing is called.
    """
    known = {name for argument in app[command].assemble_argument_collection() for name in argument.names}
    inner = [command, *_for_the_command(options, jobs, known), *words]
    function, bound, _ = app.parse_args(inner, print_error=False, exit_on_error=False)
    bound.apply_defaults()
    given = dict(_flat(inspect.signature(function), bound.arguments))
    settled = [command]
    for argument in app[command].assemble_argument_collection():
        name = argument.field_info.name
        if name in given:
            value, default = given[name]
            if argument.index is not None:
                settled.append(_text(name, value))
            elif value != default:
                settled += _option(argument.names, argument.negatives, name, value)
    return Task(tuple(settled), _absolute(bound.arguments[_RESULT[command]]))


def _for_the_command(options: SubmitOptions, jobs: Jobs, known: set[str]) -> list[str]:
    """Words that submit took and the command needs: where its work runs, and what workers of its own are asked for."""
    inner = options.inner_scheduler
    if inner is not None and "--scheduler" not in known:
        raise UsageError("--inner-scheduler is for commands that are one job. Leave it away: partitions need none.")
    words = [f"--scheduler={inner or 'threads'}"] if "--scheduler" in known else []
    asked = dataclasses.fields(jobs) if inner in BATCHES else ()
    for name in {field.name for field in asked} | {"min_workers", "interface", "tls"}:
        value = getattr(jobs, name, None)
        if value not in (None, ()):
            words += [f"--{name.replace('_', '-')}={v}" for v in (value if isinstance(value, tuple) else (value,))]
    return sorted(words)


def _flat(signature: inspect.Signature, arguments: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(name, (value, default)) of every argument and of every field of the dataclasses among them."""
    for name, value in arguments.items():
        if isinstance(value, OutputOptions):
            continue  # what a job prints is its log
        if dataclasses.is_dataclass(value):
            yield from _fields(value)
        else:
            yield name, (value, signature.parameters[name].default)


def _fields(record: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value)
        else:
            yield field.name, (value, field.default)


def _option(names: tuple[str, ...], negatives: tuple[str, ...], name: str, value: Any) -> list[str]:
    """The words that give an option this value, each with its value in the same word: values may begin with a dash."""
    long = next(n for n in names if n.startswith("--"))
    if isinstance(value, bool):
        return [long] if value else [negatives[0]]
    return [f"{long}={_text(name, v)}" for v in (value if isinstance(value, tuple | list) else (value,))]


def _text(name: str, value: Any) -> str:
    if is_url(value) and shown(value) != value.rstrip("/"):
        raise UsageError(f"{shown(value)} was given with a password or a token, which no file of a job may hold.")
    if not isinstance(value, Path):
        return str(value)
    return str(value) if name in _IN_THE_JOB and "$" in str(value) else str(_absolute(value))


def _absolute(path: Path) -> Path:
    return expand(path).absolute()


def lines(done: Submitted) -> list[str]:
    """What was submitted, or with --print the files and the commands."""
    if done.texts:
        return _printed(done)
    if not done.jobs:
        return ["nothing to submit: the dataset is there already, made from these shards and options"]
    rows = [f"  {job.role:<11} job {job.id}   logs {done.folder}/{job.logs}" for job in done.jobs]
    after = [f"  watch       {done.watch}", f"  cancel      {done.cancel}"]
    return [f"submitted to {done.scheduler}: {_what(done)}", *rows, *after]


def _what(done: Submitted) -> str:
    if not done.n_partitions:
        return done.command
    tasks = plural(done.n_tasks, "task")
    return f"{done.command}, {plural(done.n_partitions, 'partition')} written by {tasks}, then finalize"


def _printed(done: Submitted) -> list[str]:
    parts = [f"# {_what(done)}; nothing was written or submitted", f"# job folder: {done.folder!a}"]
    for name, text in done.texts.items():
        parts += ["", f"# ---- {name}", text.rstrip("\n")]
    parts += ["", "# ---- submit"]
    if done.command == "consolidate":
        parts.append("# (first the plan: the same command with --init)")
    return [*parts, enter(done.folder), *(job.submit for job in done.jobs)]
