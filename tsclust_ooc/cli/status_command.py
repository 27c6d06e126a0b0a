"""tsclust status."""

from __future__ import annotations

from tsclust_ooc.cli.console import Output, OutputOptions, Place, expand_place, session, table
from tsclust_ooc.pipeline.progressing import FRESH_SECONDS, InWork, PublishedThing, Status
from tsclust_ooc.pipeline.progressing import status as look
from tsclust_ooc.units import format_bytes, format_count, format_seconds, plural

_SHOWN_PROBLEMS = 20


def status(
    name: Place,
    /,
    *,
    output: Output = OutputOptions(),
) -> None:
    """Say whether a result is published, or how far the work for it is: done, running, missing, rate, time left.

    Parameters
    ----------
    name
        The name of a dataset, run or matrix of distances, as its command was given it; also a dataset's URL. From any
        node.
    """
    with session(output) as show:
        found = look(expand_place(name))
        show.result(found, _lines(found))


def _lines(found: Status) -> list[str]:
    lines = [] if found.published is None else _published(found.path, found.published)
    for one in found.work:
        lines += _work(found.path, one, again=found.published is not None)
    return lines


def _published(path: str, found: PublishedThing) -> list[str]:
    left_out = f" · {plural(found.n_left_out, 'shard')} left out" if found.n_left_out else ""
    rows = ", ".join(f"{name} {format_count(n)}" for name, n in found.n_rows.items())
    return [
        f"{path} is published: {found.kind} · {rows} · {format_bytes(found.bytes)}{left_out}",
        f"  made {found.created} on {found.host}   digest {found.digest}",
    ]


def _work(path: str, one: InWork, *, again: bool) -> list[str]:
    kind = "unfinished work" if one.kind == "unknown" else one.kind
    lines = [f"{path} is {'being made again' if again else 'not published yet'}: {kind}{_far(one)}"]
    lines += [f"  {said}" for said in (_speed(one), _activity(one), one.note) if said]
    if one.n_missing:
        more = ", ..." if one.n_missing > len(one.missing) else ""
        lines.append(f"  missing: {', '.join(one.missing)}{more}   (counted from 0)")
    return lines + _bad(one) + _next(one)


def _far(one: InWork) -> str:
    if one.last_pass is not None:
        p = one.last_pass
        inertia = "" if p.inertia is None else f" · inertia {p.inertia:.4e}"
        moved = "" if p.moved is None else f" · moved {100 * p.moved:.2g} %"
        return f", {format_count(p.n_passes)} {'pass' if p.n_passes == 1 else 'passes'} done{inertia}{moved}"
    if not one.n_units:
        return ""
    return (
        f", {format_count(one.n_done)} of {plural(one.n_units, one.unit)} done, "
        f"{format_count(one.n_running)} being written, {format_count(one.n_missing)} missing"
    )


def _speed(one: InWork) -> str:
    said = []
    if one.n_samples:
        said.append(f"{format_count(one.n_samples_done)} of {plural(one.n_samples, 'sample')}")
    if one.rate is not None:
        said.append(f"{one.rate:,.3g} {one.rate_unit}" if one.rate < 100 else f"{one.rate:,.0f} {one.rate_unit}")
    if one.seconds_left and one.n_done < one.n_units:
        said.append(f"about {format_seconds(one.seconds_left)} left at that rate")
    return " · ".join(said)


def _activity(one: InWork) -> str:
    if one.seconds_idle is None:
        return ""
    ago = f"last file written {format_seconds(one.seconds_idle)} ago"
    return ago if one.seconds_idle < FRESH_SECONDS else f"{ago}: nobody seems to be at it"


def _bad(one: InWork) -> list[str]:
    n = len(one.bad)
    shown = [(ascii(p.path)[1:-1], p.code, p.detail) for p in one.bad[:_SHOWN_PROBLEMS]]
    lines = [f"  {plural(one.n_left_out, 'shard')} left out by the survey"] if one.n_left_out else []
    if n:
        lines += [f"  {plural(n, 'bad shard')} met while reading", *(f"  {line}" for line in table(shown))]
    if n > len(shown):
        lines.append(f"    ... and {n - len(shown):,} more (--json lists all)")
    return lines


def _next(one: InWork) -> list[str]:
    if one.n_units and one.n_done == one.n_units:
        return ["  all is written. To publish it run the same command again, or its step --finalize"]
    idle = one.seconds_idle is not None and one.seconds_idle >= FRESH_SECONDS
    if not idle or one.kind == "unknown":
        return []
    if one.missing_array:
        return [f"  To go on run the same command again, or its step --partition for {one.missing_array}"]
    return ["  To go on run the same command again"]
