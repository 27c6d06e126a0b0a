"""Shards on an object store: one at a time against many at once, and the whole way from URL to URL.

    python benchmarks/objects.py [--shards 1000] [--milliseconds 20]

moto's S3 server runs on loopback, a process of its own; a proxy before it makes each request wait, as a network does.
Both take cores from what is measured: the figures say what waiting costs, not what a store can do.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ways import make_shards

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from objects import bucket, environment, s3_server  # noqa: E402

from tsclust_ooc.mirror import Mirror  # noqa: E402
from tsclust_ooc.pipeline.consolidating import ConsolidateOptions, consolidate  # noqa: E402
from tsclust_ooc.remote import Remote, at_once  # noqa: E402

PROXY = """
import sys, time
sys.path.insert(0, sys.argv[1])
from objects import Proxy
with Proxy(int(sys.argv[2]), delay_seconds=float(sys.argv[3])) as proxy:
    print(proxy.port, flush=True)
    sys.stdin.read()
"""


@contextmanager
def slow(port, seconds):
    """The port of a proxy before `port` that makes each request wait."""
    command = [sys.executable, "-c", PROXY, str(TESTS), str(port), str(seconds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as proxy:
        yield int(proxy.stdout.readline())
        proxy.stdin.close()


def timed(what, n, function):
    """Run it, and say how long it took."""
    began, worked = time.perf_counter(), time.process_time()
    function()
    seconds = time.perf_counter() - began
    worked = time.process_time() - worked
    print(f"{what:<38} {seconds:7.2f} s {n / seconds:8.0f} a second   {worked:6.2f} s of CPU here", flush=True)


def main():
    """Measure."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--shards", type=int, default=1000)
    asked.add_argument("--milliseconds", type=float, default=20.0)
    given = asked.parse_args()
    n, few = given.shards, min(given.shards, 100)
    with tempfile.TemporaryDirectory() as scratch, s3_server() as port:
        folder = Path(scratch)
        source = folder / "source"
        make_shards(source, n)
        with slow(port, given.milliseconds / 1000) as behind, environment(behind):
            where, _ = bucket(port)
            remote = Remote(f"s3://{where}/source")
            paths = [f"{i}.h5" for i in range(n)]
            print(f"{n:,} shards of 23.5 kB, each request waits {given.milliseconds:g} ms")
            timed("send, many at once", n, lambda: list(at_once(lambda p: remote.send(source / p, p), paths)))
            found = []
            timed("list", n, lambda: found.extend(remote.objects()))
            timed(f"fetch {few} of them, one at a time", few, lambda: [remote.read(one.path) for one in found[:few]])
            with Mirror(remote, folder) as mirror:
                timed("fetch to scratch, many at once", n, lambda: mirror.bring(found).__enter__())
            options = replace(ConsolidateOptions(), scratch=folder)
            timed("consolidate URL to URL", n, lambda: consolidate(str(remote), f"s3://{where}/dataset", options))
            timed("consolidate the same files on disk", n, lambda: consolidate(source, folder / "local", options))


if __name__ == "__main__":
    main()
