"""Shards on a slow network: ours against one at a time, through a mount that adds a delay to every open and every read.

    python benchmarks/latency.py [--shards 20000] [--delay-ms 2] [--rounds 3] [--dir /var/tmp]

The mount (tests/fuse/far.py) is FUSE; the kernel caches its names and attributes as it does those of NFS. Each way runs
in a process of its own on a mount of its own, so no page is cached; its time is from after its imports to the end. One
at a time, bytes: open, read, close of each file, the least that anything can do that has one shard in flight. The last
row is what the mount itself can serve: 64 threads that only read, without any delay. Those that go one at a time read
the first 2,000 shards, for each of them takes as long as the others; what is compared is shards a second.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ways import in_turn, make_shards, options, place, run, timed

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from fuse.mounting import far_away

ALONE = 2_000
"""Shards that those read who go one at a time."""


@dataclass(frozen=True)
class Took:
    """Seconds of one way, and how many opens and reads the mount saw under way: the most, and in the mean."""

    seconds: float
    most: int
    mean: float


def ours(source: Path, target: Path) -> None:
    """Survey, plan, write, digests, fsync, publish."""
    from tsclust_ooc.pipeline.consolidating import consolidate  # noqa: PLC0415

    with timed():
        consolidate(source, target / "dataset")


def survey(source: Path, _target: Path) -> None:
    """Look into every shard, as inspect and --init do."""
    from tsclust_ooc.shards.parsers import Parsers  # noqa: PLC0415
    from tsclust_ooc.shards.survey import survey as look  # noqa: PLC0415

    with timed(), Parsers(2) as parsers:
        assert not look(source, parsers).problems


def loop(source: Path, _target: Path) -> None:
    """An h5py loop: what people write, without the writing."""
    import h5py  # noqa: PLC0415

    with timed():
        for entry in _entries(source)[:ALONE]:
            with h5py.File(entry.path, "r") as file:
                file["embeddings"][...]


def one_at_a_time(source: Path, _target: Path) -> None:
    """Open, read, close of each file."""
    with timed():
        _read_all(_entries(source)[:ALONE])


def ceiling(source: Path, _target: Path) -> None:
    """The same by 64 threads."""
    with timed(), ThreadPoolExecutor(64) as pool:
        entries = _entries(source)
        for _ in pool.map(_read_all, (entries[i : i + 16] for i in range(0, len(entries), 16))):
            pass


def _entries(source: Path) -> list[os.DirEntry[str]]:
    return list(os.scandir(source / "train"))


def _read_all(entries: list[os.DirEntry[str]]) -> None:
    for entry in entries:
        fd = os.open(entry.path, os.O_RDONLY)
        os.read(fd, entry.stat().st_size)
        os.close(fd)


WAYS = {
    "one at a time, bytes": one_at_a_time,
    "one at a time, h5py": loop,
    "ours: consolidate": ours,
    "ours: survey of every shard": survey,
    "the mount's ceiling (no delay)": ceiling,
}


def measure(way: str, source: Path, here: Path, delay_ms: float) -> Took:
    """One way in a fresh process on a fresh mount."""
    mount = Path(tempfile.mkdtemp(dir=here))
    with far_away(source, mount, delay_ms=0 if WAYS[way] is ceiling else delay_ms) as far:
        seconds, _ = run(__file__, way, far.path, here)
    return Took(seconds, far.served["most_in_flight"], far.served["mean_in_flight"])


def main() -> None:
    """Measure every way in turn, a few rounds, and print the table."""
    parser = options(__doc__, WAYS)
    parser.add_argument("--shards", type=int, default=20_000)
    parser.add_argument("--delay-ms", type=float, default=2.0)
    given = parser.parse_args()
    if given.way:
        WAYS[given.way](given.source, given.dir)
        return
    with place(given.dir) as here:
        source = here / "source"
        make_shards(source / "train", given.shards)
        took = in_turn(WAYS, given.rounds, lambda way: measure(way, source, here, given.delay_ms))
        show(took, given.shards, given.delay_ms)


def show(took: dict[str, list[Took]], n: int, delay_ms: float) -> None:
    """The table: medians, rate, and how many times one at a time."""
    rates = {way: _read_by(way, n) / statistics.median(one.seconds for one in rows) for way, rows in took.items()}
    rounds = len(next(iter(took.values())))
    print(f"{n:,} shards, {delay_ms:g} ms an open and a read, {os.cpu_count()} cores, median of {rounds}")
    print(f"{'way':<34}{'shards':>8}{'seconds':>9}{'shards/s':>10}{'x one':>8}{'most in flight':>16}{'mean':>7}")
    for way, rows in took.items():
        seconds = statistics.median(one.seconds for one in rows)
        flight = f"{max(one.most for one in rows):>16}{statistics.median(one.mean for one in rows):>7.1f}"
        ratio = rates[way] / rates["one at a time, bytes"]
        print(f"{way:<34}{_read_by(way, n):>8,}{seconds:>9.2f}{rates[way]:>10,.0f}{ratio:>8.1f}{flight}")


def _read_by(way: str, n: int) -> int:
    return min(n, ALONE) if WAYS[way] in (one_at_a_time, loop) else n


if __name__ == "__main__":
    main()
