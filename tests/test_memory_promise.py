"""--memory is kept by whole commands: every process they start, in a cgroup of just that much where one can be made.

The shards are holes in files: large, and made in no time. A command that takes more than it was allowed fails here
twice over: by its peak as an outsider sees it, and, as root, by the kernel, which kills it.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from confined import Taken, group, run

MEMORY = 620 * 10**6
"""Little more than the libraries alone need: one worker with a chunk of 64 MiB, where eight are asked for."""
ASKED = ("--workers", "8", "--stage", "never")
WIDTH, ROWS, CHUNK_ROWS, N_SHARDS = 4096, 16_384, 256, 4

NOT_HEEDED = """
from tsclust_ooc.budget import Budget
Budget.workers_that_fit = lambda self, bytes_each, what, besides=0: self.n_workers
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """1 GiB of contiguous shards (holes but for their last row), and half of it in gzip chunks (one, again and again).

    The folder 'half' has as many of the contiguous ones.
    """
    made = tmp_path_factory.mktemp("memory")
    squeezed = zlib.compress(np.ones((CHUNK_ROWS, WIDTH), "<f4").tobytes())
    for name, n in (("plain", N_SHARDS), ("half", N_SHARDS // 2), ("gzip", N_SHARDS // 2)):
        (made / name).mkdir()
        for i in range(n):
            with h5py.File(made / name / f"{i}.h5", "w") as file:
                if name == "gzip":
                    layout = {"chunks": (CHUNK_ROWS, WIDTH), "compression": "gzip"}
                    stored = file.create_dataset("embeddings", shape=(ROWS, WIDTH), dtype="<f4", **layout)
                    for at in range(0, ROWS, CHUNK_ROWS):
                        stored.id.write_direct_chunk((at, 0), squeezed)
                else:
                    file.create_dataset("embeddings", shape=(ROWS, WIDTH), dtype="<f4")[-1] = 1 + i
    return made


def tsclust(*arguments: object, before: str = "", memory: int = MEMORY) -> Taken:
    """The command in a process of its own, allowed `memory` bytes, with the code `before` it."""
    code = f"{before}\nfrom tsclust_ooc.cli import script\nscript()"
    words = [sys.executable, "-c", code, *map(str, arguments), "--memory", str(memory), "--json", "--quiet"]
    return run(words, memory, {**os.environ, "PYTHONDONTWRITEBYTECODE": ""})


def kept(taken: Taken, memory: int = MEMORY) -> bool:
    """Whether a command ended well and within `memory`."""
    return taken.returncode == 0 and taken.n_killed == 0 and max(taken.resident, taken.anonymous) <= memory


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("plain", ["--chunk-bytes", "64MiB"]),
        ("half", ["--chunk-bytes", "32MiB", "--compress", "zstd", "--sharding", "256MiB"]),
        ("gzip", ["--chunk-bytes", "64MiB", "--sharding", "256MiB"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_consolidate_stays_within_its_memory(folder, tmp_path, source, options):
    taken = tsclust("consolidate", folder / source, tmp_path / "ds", *ASKED, *options, "--scratch", tmp_path)
    assert kept(taken), taken
    told = json.loads(taken.out)
    assert told["n_samples"] == ROWS * len(list((folder / source).iterdir()))
    assert told["peak_bytes"] <= MEMORY


def test_a_consolidate_that_does_not_heed_the_budget_is_caught(folder, tmp_path):
    options = (*ASKED, "--chunk-bytes", "64MiB", "--compress", "zstd", "--scratch", tmp_path)
    taken = tsclust("consolidate", folder / "plain", tmp_path / "ds", *options, before=NOT_HEEDED)
    assert not kept(taken)
    assert taken.resident > MEMORY or taken.n_killed > 0
    assert taken.n_killed > 0 or not taken.confined


def test_a_group_can_be_made_where_we_are_root_and_the_kernel_has_the_controller():
    if os.geteuid() == 0 and Path("/sys/fs/cgroup/memory/cgroup.procs").exists():
        with group(10**8) as made:
            assert made is not None
    taken = run([sys.executable, "-c", "print(len(b'x' * 300_000_000))"], 10**8)
    assert (taken.n_killed > 0) == taken.confined == (taken.returncode != 0)
    assert taken.confined or taken.resident > 3 * 10**8
