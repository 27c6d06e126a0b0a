"""What the benchmarks share: shards as they are written, ways that run in a process of their own, rounds of them.

A way is a function of (source, target). It runs in a fresh process, says its seconds (and whatever else) as the last
line of its output with `say` or `timed`, and leaves what it writes in target, which is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
SHAPE, KEY = (7, 768), "embeddings"


def make_shards(folder: Path, n: int, shape: Sequence[int] = SHAPE) -> None:
    """`n` contiguous shards: the bytes that h5py writes, but for the samples, which are put into a copy of them."""
    import h5py  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    folder.mkdir(parents=True)
    first = folder / "0.h5"
    with h5py.File(first, "w") as file:
        file.create_dataset(KEY, data=np.zeros(shape, "<f4"))
        offset, size = file[KEY].id.get_offset(), file[KEY].id.get_storage_size()
    whole, rng = first.read_bytes(), np.random.default_rng(0)
    for i in range(n):
        sample = rng.standard_normal(shape, dtype=np.float32).tobytes()
        (folder / f"{i}.h5").write_bytes(whole[:offset] + sample + whole[offset + size :])


def say(answer: Any) -> None:
    """The last line of a way."""
    print(json.dumps(answer))


@contextmanager
def timed() -> Iterator[None]:
    """Says the seconds of its block."""
    began = time.perf_counter()
    yield
    say(time.perf_counter() - began)


def options(doc: str | None, ways: Iterable[str], rounds: int = 3) -> argparse.ArgumentParser:
    """The options that all have: --rounds and --dir, and what a process is told that runs one way."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--way", choices=list(ways), help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    return parser


@contextmanager
def place(folder: Path) -> Iterator[Path]:
    """A fresh directory in `folder`, removed at the end."""
    made = Path(tempfile.mkdtemp(prefix="tsclust-bench-", dir=folder))
    try:
        yield made
    finally:
        shutil.rmtree(made)


def run(script: str, way: str, source: Path, target_in: Path, *more: str) -> tuple[Any, float]:
    """What one way says in a fresh process, and the seconds of that process, its start and imports included."""
    target = Path(tempfile.mkdtemp(dir=target_in))
    os.sync()
    began = time.perf_counter()
    command = [sys.executable, script, "--way", way, "--source", str(source), "--dir", str(target), *more]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return json.loads(done.stdout.splitlines()[-1]), seconds


def in_turn(ways: Iterable[str], n_rounds: int, measure: Callable[[str], T]) -> dict[str, list[T]]:
    """Each way measured once a round: what disturbs the machine for a while disturbs all of them."""
    found: dict[str, list[T]] = {way: [] for way in ways}
    for _ in range(n_rounds):
        for way, taken in found.items():
            taken.append(measure(way))
    return found
