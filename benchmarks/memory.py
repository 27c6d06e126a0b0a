"""The promise of --memory: peaks of whole commands, each in a cgroup of just that much.

    python benchmarks/memory.py [--memory 1GB] [--files 64] [--scale 1.0] [--only small,large] [--dir /var/tmp]

Each command runs in a fresh memory cgroup whose limit is --memory: whatever does not fit is killed by the kernel, and
the table says so. It needs root and the memory controller (version 1 or 2); elsewhere the commands run unconfined, the
peaks are measured all the same, and a line says so. "resident" sums the resident pages of all processes, shared ones
once for each; "anonymous" is what the cgroup counts without cached files. --scale shrinks the numbers of shards.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from large import make_files
from ways import KEY, SHAPE, make_shards

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from confined import Taken, run

from tsclust_ooc.units import parse_bytes

SURVEY_LIMIT = 500 * 10**6


@dataclass(frozen=True)
class Case:
    """A command on a source; `most` bytes are promised, or what --memory says."""

    name: str
    what: str
    source: str
    arguments: tuple[str, ...]
    most: int | None = None


CASES = (
    Case("small", "consolidate, {:,} shards", "20000", ()),
    Case("sharding", "the same, --sharding 512MiB", "20000", ("--sharding", "512MiB")),
    Case("zstd", "the same, --compress zstd", "20000", ("--compress", "zstd")),
    Case("local", "the same, --scheduler local", "20000", ("--scheduler", "local")),
    Case("gzip", "consolidate, {:,} gzip shards", "gzip", ()),
    Case("many", "consolidate, {:,} shards", "100000", ()),
    Case("large", "consolidate, {:,} large gzip files", "large", ()),
    Case("large-local", "the same, --scheduler local", "large", ("--scheduler", "local")),
    Case("survey", "inspect, {:,} shards", "200000", (), SURVEY_LIMIT),
)


def make_compressed(folder: Path, n: int) -> None:
    """`n` shards that h5py must decode."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        with h5py.File(folder / f"{i}.h5", "w") as file:
            file.create_dataset(KEY, data=rng.standard_normal(SHAPE, dtype=np.float32), compression="gzip")


def measure(case: Case, source: Path, place: Path, memory: str) -> Taken:
    """One whole command, imports included."""
    limit = parse_bytes(memory)
    command = [sys.executable, "-m", "tsclust_ooc", "inspect" if case.name == "survey" else "consolidate", str(source)]
    if case.name != "survey":
        command += [str(place / "dataset"), "--memory", memory, "--scratch", str(place), *case.arguments]
    return run([*command, "--json", "--quiet"], case.most or limit)


def line(case: Case, n: int, taken: Taken, most: int) -> str:
    """One line of the table; `n` is how many files the source has."""
    ended = "ok" if taken.returncode == 0 else f"exit {taken.returncode}"
    kept = "kept" if taken.returncode == 0 and taken.n_killed == 0 and taken.resident <= most else "BROKEN"
    numbers = "".join(f"{size / 1e6:>12,.0f}" for size in (most, taken.resident, taken.anonymous))
    return f"{case.what.format(n):<36}{numbers}{taken.n_killed:>8}{taken.seconds:>9.1f}  {ended}, {kept}"


def main() -> None:
    """Measure the cases, a source at a time, and print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--memory", default="1GB")
    options.add_argument("--files", type=int, default=64, help="large files, 28 MB each")
    options.add_argument("--scale", type=float, default=1.0)
    options.add_argument("--only", default="", help="names of cases: " + ",".join(case.name for case in CASES))
    options.add_argument("--dir", type=Path, default=Path("/var/tmp"))
    given = options.parse_args()
    wanted = [case for case in CASES if not given.only or case.name in given.only.split(",")]
    make: dict[str, Callable[[Path], None]] = {
        "gzip": lambda folder: make_compressed(folder, int(20_000 * given.scale)),
        "large": lambda folder: make_files(folder, given.files),
    }
    print(f"{'MB':<36}{'allowed':>12}{'resident':>12}{'anonymous':>12}{'killed':>8}{'seconds':>9}", flush=True)
    place = Path(tempfile.mkdtemp(prefix="tsclust-bench-", dir=given.dir))
    failed, confined = [], True
    try:
        for source in dict.fromkeys(case.source for case in wanted):
            folder = place / "source"
            make.get(source, lambda folder, n=source: make_shards(folder, int(int(n) * given.scale)))(folder / "train")
            for case in (case for case in wanted if case.source == source):
                taken = measure(case, folder, place, given.memory)
                confined = confined and taken.confined
                n_files = sum(1 for _ in (folder / "train").iterdir())
                text = line(case, n_files, taken, case.most or parse_bytes(given.memory))
                print(text, flush=True)
                if not text.endswith("kept"):
                    failed.append(case.name)
                    print(taken.err[-2000:], file=sys.stderr)
                shutil.rmtree(place / "dataset", ignore_errors=True)
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(place)
    if not confined:
        print("Not confined: no right to make memory cgroups here (be root, with the memory controller). Peaks only.")
    sys.exit(f"the promise was broken: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
