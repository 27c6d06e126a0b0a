"""tsclust run."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from tsclust_ooc.cli import cluster_command, distances_command, inspect_command
from tsclust_ooc.cli.console import Output, OutputOptions, expand, session
from tsclust_ooc.cli.escaping import clean
from tsclust_ooc.pipeline.consolidating import Consolidated
from tsclust_ooc.pipeline.distancing import Distanced
from tsclust_ooc.pipeline.flowing import Flow, Flowed, Intent, flowed, intent, naming_the_step, read_flow
from tsclust_ooc.pipeline.looking import Inspection
from tsclust_ooc.pipeline.steps import AllPublished
from tsclust_ooc.units import format_bytes, format_count, format_seconds, plural

_STATES = {"absent": "", "unfinished": "   begun: goes on", "there": "   there already: kept if it is this very result"}


def run(
    flow: Path,
    /,
    *,
    changes: Annotated[tuple[str, ...], Parameter(name="--set")] = (),
    dry_run: bool = False,
    output: Output = OutputOptions(),
) -> None:
    """Run a workflow from a TOML file: inspect, consolidate, distances, cluster, publish. Interrupted? Run it again.

    Only steps with a section run. The keys of a section are the options of its command, and run = and k = of cluster,
    out = of distances, to = and what = of publish. [flow] has source =, dataset = and options of all steps.

    Parameters
    ----------
    flow
        The file. Relative paths in it start in its folder; ~, $VAR and ${VAR:-default} are expanded.
    changes
        SECTION.KEY=VALUE instead of what the file says, like flow.source=/data/shards; may be given several times.
    dry_run
        Check the file and the source and say what would be done: each step's own command, and what is there already.
    """
    began = time.perf_counter()
    with session(output) as show:
        read = read_flow(expand(flow), changes)
        if dry_run:
            intents = [intent(step, show) for step in read.steps]
            found = {"steps": intents, "seconds": round(time.perf_counter() - began, 3)}
            show.result(found, [line for i, one in enumerate(intents) for line in _intended(read, i, one)])
            return
    done = []
    for i, step in enumerate(read.steps):
        done.append((step, _run_step(read, i, output)))
    _finish(flowed(done, time.perf_counter() - began), output)


def _run_step(flow: Flow, index: int, output: OutputOptions) -> Any:
    """One step with progress of its own; its lines under a heading, as soon as there are any."""
    began, text = time.perf_counter(), not (output.json or output.quiet)
    if text:
        sys.stdout.write(f"{clean(flow.title(index))}\n")
        sys.stdout.flush()
    with session(output) as show, naming_the_step(flow, index):
        found = flow.steps[index].work(show)
        if text:
            show.result(found, [f"  {line}" for line in _lines(found, time.perf_counter() - began)])
    return found


def _finish(done: Flowed, output: OutputOptions) -> None:
    with session(output) as show:
        show.result(done, [f"{plural(len(done.steps), 'step')} done in {format_seconds(done.seconds)}"])


def _lines(found: Any, seconds: float) -> Sequence[str]:
    """The result of a step for a person, without the commands that would come next."""
    match found:
        case Consolidated():
            return _consolidated(found)
        case AllPublished():
            return [_published(one.target, one.reused, one.n_files, one.bytes) for one in found.published]
        case Inspection():
            return inspect_command.lines(found, seconds)[:-1]
        case Distanced():
            return distances_command.lines(found)
    return cluster_command.lines(found)


def _consolidated(done: Consolidated) -> list[str]:
    left_out = f" · {plural(done.n_rejected, 'shard')} left out (rejected.json)" if done.n_rejected else ""
    splits = ", ".join(f"{name} {format_count(n)}" for name, n in done.splits.items())
    what = f"{plural(done.n_samples, 'sample')} {done.item_shape} · {splits} · {format_bytes(done.bytes)}{left_out}"
    if done.reused:
        return [f"{done.dataset} is there already, made from these shards and options: {what}"]
    return [
        f"published {done.dataset}   {what}",
        f"  {format_seconds(done.seconds)}, peak {format_bytes(done.peak_bytes)}",
    ]


def _published(target: str, reused: bool, n_files: int, n_bytes: int) -> str:
    if reused:
        return f"{target} is there already, with the same content"
    return f"published {target}   {plural(n_files, 'file')}, {format_bytes(n_bytes)}, each checked"


def _intended(flow: Flow, index: int, one: Intent) -> list[str]:
    """What a step would do, for a person."""
    lines = [flow.title(index), *([f"  {one.command}"] if one.command else [])]
    lines += [f"  -> {path}{_STATES[state]}" for path, state in one.state.items()]
    if one.plan is not None:
        problems = f", {plural(one.plan.n_rejected, 'problem')}" if one.plan.n_rejected else ""
        lines.append(
            f"  {plural(one.plan.n_samples, 'sample')} of {plural(one.plan.n_shards, 'shard')}{problems} · "
            f"{plural(one.plan.n_chunks, 'chunk')}, {format_bytes(one.plan.disk_bytes)} on disk · at most "
            f"{format_bytes(one.plan.memory_bytes)} of memory with {plural(one.plan.n_workers, 'worker')}"
        )
    return lines
