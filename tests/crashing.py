"""Kills a command at the 1st, 2nd, ... n-th file event it makes, each time runs it again, and reports what it saw.

    python crashing.py '{"place": ..., "target": ..., "prepare": [], "words": [...], "after": [], "first": 1, ...}'

With "exchange": false the filesystem seems unable to exchange two names, as NFS is.

Run as a script by `test_crashes.py`. The hook sits in the child alone (sys.addaudithook); the code under test has none.
Everything is imported once; each run is a fork. An event is a file opened for writing, a rename, link, removal, or a
directory made or removed, below the place.
"""

import hashlib
import itertools
import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import numpy as np

from tsclust_ooc import checkpoint, files
from tsclust_ooc.cli import build_app, cluster_command, consolidate_command, distances_command, main  # noqa: F401
from tsclust_ooc.dataset import open_dataset
from tsclust_ooc.dataset import verify as verify_dataset
from tsclust_ooc.distance.pairwise import pairwise
from tsclust_ooc.matrix import changed_files, open_matrix
from tsclust_ooc.pipeline import arrays, clustering, consolidating, distancing, verifying  # noqa: F401 - imported before the forks
from tsclust_ooc.results import open_run

KILLED = 137
NAMES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}


def is_event(event, args, world):
    """Whether an audit event changes files below `world`."""
    if event == "open":
        path, _, flags = args
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        return bool(writes) and below(path, world)
    return event in NAMES and any(below(arg, world) for arg in args[:2])


def below(path, world):
    try:
        return os.fspath(path).startswith(world)
    except TypeError:
        return False


def in_fork(action):
    """Exit status of `action` run in a fork of this process."""
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            status = action() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(n, world, words):
    """Run a command that dies at its n-th event; returns its status."""

    def action():
        count = 0

        def hook(event, args):
            nonlocal count
            if is_event(event, args, world):
                count += 1
                if count == n:
                    os._exit(KILLED)

        sys.addaudithook(hook)
        return main(words)

    return in_fork(action)


def tree_digest(root, parts):
    """Digest of names and bytes of everything below the `parts` of `root`."""
    digest = hashlib.sha256()
    for part in parts:
        for path in sorted((root / part).rglob("*")):
            if path.is_file():
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def state_of(target):
    """'absent', or the digest of a dataset, a run or a matrix that is whole. Raises when it is neither."""
    if not target.exists():
        return "absent"
    if (target / "data.zarr").exists():
        dataset = open_dataset(target)
        damage = verify_dataset(dataset)
        if damage:
            raise SystemExit(f"published and damaged: {damage}")
        return tree_digest(target, ["data.zarr", "index"])
    if (target / "distances.zarr").exists():
        changed = changed_files(open_matrix(target))
        if changed:
            raise SystemExit(f"published and damaged: {changed}")
        return tree_digest(target, ["distances.zarr"])
    open_run(target)
    return tree_digest(target, ["labels", "model"])


def reported_state(target, box):
    """`state_of`, in a fork: this process stays free of threads."""
    if in_fork(lambda: box.write_text(state_of(target)) * 0) != 0:
        return "broken"
    return box.read_text()


def sweep(place, target, prepare, words, after, first, step):
    """Reset the place, kill at n, look, run again and the commands after it, look; n = first, first + step, ...

    Until the command completes.
    """
    box, seen, prepared = place.with_name(f"{place.name}.state"), [], place.with_name(f"{place.name}.prepared")
    quiet = [*words, "--quiet"]
    place.mkdir()
    for before in prepare:
        assert in_fork(lambda before=before: main([*before, "--quiet"])) == 0
    place.rename(prepared)
    for n in itertools.count(first, step):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(prepared, place)
        old = reported_state(target, box)
        status = killed_at(n, str(place), quiet)
        after_kill = reported_state(target, box)
        again = in_fork(lambda: main(quiet)) if status == KILLED else status
        for then in after:
            again = again or in_fork(lambda then=then: main([*then, "--quiet"]))
        end = reported_state(target, box)
        left = sorted(p.name for p in place.iterdir() if p.name.startswith("."))
        seen.append(
            {"n": n, "status": status, "old": old, "after_kill": after_kill, "again": again, "end": end, "left": left}
        )
        if status != KILLED:
            return seen


if __name__ == "__main__":
    build_app()  # loads what every command line needs
    checkpoint.LEAST_SECONDS = 0.0  # after each pass: by the clock the events would not be the same each time
    spec = json.loads(sys.argv[1])
    if not spec["exchange"]:
        files.exchange = lambda a, b: False
    if spec["words"][0] == "distances":
        pairwise(np.eye(3, dtype=np.float32), metric="cityblock")  # kernels are loaded once, not in each fork
    places = Path(spec["place"]), Path(spec["target"])
    found = sweep(*places, spec["prepare"], spec["words"], spec["after"], spec["first"], spec["step"])
    print(json.dumps(found))
