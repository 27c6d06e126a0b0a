"""Where work runs: same results as `map` on threads and on a real local cluster, and nothing open or left behind."""

import asyncio
import functools
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from listeners import Heard

from tsclust_ooc.errors import CannotWrite, TsclustError, UsageError
from tsclust_ooc.runtime import (
    LEAST_WORKER_BYTES,
    ClusterSpec,
    open_doors,
    open_runtime,
    refuse_open_doors,
    worker_bytes,
)

MEMORY = 2 * 10**9

# distributed leaves a connection that was being made to a worker when that was killed to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")


@dataclass(frozen=True)
class Nearest:
    """Like a pass's kernel: a picklable callable with an array inside and a name for its tasks."""

    centers: np.ndarray
    task_name: str = "lloyd-pass"

    def __call__(self, seed):
        rows = np.random.default_rng(seed).standard_normal((50, self.centers.shape[1]))
        return seed, ((rows[:, None] - self.centers) ** 2).sum(2).argmin(1)


def slow_square(x):
    time.sleep(0.05)
    return x * x


def die_once(mark, x):
    """Kills its own worker at item 5 when the file `mark` does not exist yet."""
    if x == 5 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return np.full(1000, x, dtype=np.float64).sum()


def fail_at_three(x):
    if x == 3:
        raise ValueError(f"row {x} is not finite")
    return x


def surroundings(x):
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    interrupts_blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    return {name: os.environ.get(name) for name in names}, tempfile.gettempdir(), interrupts_blocked


@pytest.fixture(scope="module")
def heard():
    return Heard()


@pytest.fixture(scope="module")
def before():
    """What listened before the cluster: servers that other tests have started."""
    return listening_sockets()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, heard, before):
    spec = ClusterSpec("local", 2, MEMORY, tmp_path_factory.mktemp("scratch"))
    with open_runtime(spec, heard) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def threads(tmp_path_factory):
    with open_runtime(ClusterSpec("threads", 2, MEMORY, tmp_path_factory.mktemp("scratch"))) as runtime:
        yield runtime


@pytest.fixture(params=["threads", "cluster"])
def runtime(request):
    return request.getfixturevalue(request.param)


# one contract for both


def test_results_are_those_of_builtin_map_in_order(runtime):
    work = Nearest(np.random.default_rng(0).standard_normal((5, 8)))
    found = list(runtime.mapper(work, range(30)))
    assert [seed for seed, _ in found] == list(range(30))
    for (_, labels), (_, expected) in zip(found, map(work, range(30)), strict=True):
        np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("items", [[], [7], [(0, "a"), (1, None)], ["x", np.arange(3).tolist()]], ids=str)
def test_items_of_any_kind_arrive_as_they_are(runtime, items):
    assert list(runtime.mapper(repr, items)) == list(map(repr, items))


def test_at_most_two_items_a_worker_are_taken_ahead_of_the_consumer(runtime):
    taken, most = 0, 0

    def items():
        nonlocal taken
        for i in range(40):
            taken += 1
            yield i

    for done, result in enumerate(runtime.mapper(slow_square, items())):
        assert result == done * done
        most = max(most, taken - done)
    assert taken == 40
    assert most <= 2 * runtime.n_workers


def test_an_error_is_raised_at_its_place_and_the_work_goes_on_after_it(runtime):
    results = runtime.mapper(fail_at_three, range(100))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="row 3 is not finite"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)
    assert list(runtime.mapper(fail_at_three, [4, 5])) == [4, 5]


def test_a_mapper_that_is_abandoned_cancels_what_it_started(runtime):
    results = runtime.mapper(slow_square, range(1000))
    assert next(results) == 0
    results.close()
    assert list(runtime.mapper(slow_square, [9])) == [81]


def test_a_mapper_that_outlives_its_runtime_ends_quietly(tmp_path):
    with open_runtime(ClusterSpec("threads", 1, MEMORY, tmp_path)) as runtime:
        results = runtime.mapper(slow_square, range(10))
        assert next(results) == 0
    results.close()


def test_an_unknown_scheduler_is_refused_with_those_that_are_known(tmp_path):
    with pytest.raises(
        UsageError, match=r"--scheduler sge is not known. Use one of: threads, local, slurm, or the add"
    ):
        ClusterSpec("sge", 2, MEMORY, tmp_path)
    with pytest.raises(UsageError, match="--workers 0"):
        ClusterSpec("threads", 0, MEMORY, tmp_path)


def test_threads_open_no_socket_and_write_no_report(threads, tmp_path):
    assert threads.dashboard == ""
    threads.save_report(tmp_path / "dask-report.html")
    assert list(tmp_path.iterdir()) == []


# the local cluster


def test_traffic_is_tls_and_a_client_without_the_key_is_turned_away(cluster):
    distributed = sys.modules["distributed"]
    address = cluster.client.scheduler.address
    assert address.startswith("tls://127.0.0.1:")
    workers = cluster.client.scheduler_info()["workers"]
    assert all(worker.startswith("tls://127.0.0.1:") for worker in workers)
    assert all(worker["nanny"].startswith("tls://127.0.0.1:") for worker in workers.values())

    async def connect(url, **arguments):
        comm = await distributed.comm.connect(url, timeout=2, **arguments)
        await comm.close()

    other = distributed.Security.temporary().get_connection_args("client")
    plain = address.replace("tls://", "tcp://")
    for url, arguments in ((plain, {}), (address, other)):
        with pytest.raises(OSError, match=r"(?i)handshake|timed out|closed|certificate|ssl"):
            asyncio.run(connect(url, **arguments))


def listening_sockets():
    me = psutil.Process()
    processes = [me, *me.children(recursive=True)]
    sockets = [s for p in processes for s in p.net_connections(kind="inet") if s.status == psutil.CONN_LISTEN]
    return {(s.laddr.ip, s.laddr.port) for s in sockets}


def test_every_socket_of_the_process_tree_is_on_loopback(cluster, before):
    found = listening_sockets() - before
    # scheduler and dashboard; nanny, worker and worker's http server twice
    assert len(found) == 8
    assert {ip for ip, _ in found} == {"127.0.0.1"}
    assert open_doors() == frozenset()
    assert cluster.dashboard.startswith("http://127.0.0.1:")


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")])
def test_a_socket_that_other_machines_reach_is_found_and_refused(family, address):
    with socket.socket(family) as door:
        door.bind((address, 0))
        door.listen()
        port = door.getsockname()[1]
        assert open_doors() == {f"{address} port {port} (process {os.getpid()})"}
        with pytest.raises(TsclustError, match=rf"{re.escape(address)} port {port} "):
            refuse_open_doors()
        refuse_open_doors(open_doors())
    refuse_open_doors()


def test_workers_get_an_equal_share_of_what_this_process_leaves(cluster, tmp_path):
    limits = [worker["memory_limit"] for worker in cluster.client.scheduler_info()["workers"].values()]
    assert limits == [(MEMORY - 450 * 10**6) // 2] * 2
    spec = ClusterSpec("local", 2, MEMORY, tmp_path)
    assert worker_bytes(spec) == limits[0]


def test_a_cluster_that_does_not_fit_the_memory_is_refused_with_one_that_does(tmp_path):
    with (
        pytest.raises(
            CannotWrite, match=r"4 workers needs 350 MB .* allows 1.60 GB. Use: --memory 1.85GB, --workers 3"
        ),
        open_runtime(ClusterSpec("local", 4, 1_600_000_000, tmp_path)),
    ):
        pass
    assert worker_bytes(ClusterSpec("local", 4, 1_850_000_000, tmp_path)) >= LEAST_WORKER_BYTES
    assert worker_bytes(ClusterSpec("local", 3, 1_600_000_000, tmp_path)) >= LEAST_WORKER_BYTES


def test_workers_compute_on_one_thread_keep_keys_in_scratch_and_leave_interrupts_to_this_process(cluster):
    variables, temporaries, interrupts_blocked = next(cluster.mapper(surroundings, [0]))
    assert set(variables.values()) == {"1"}
    assert Path(temporaries).parent.name.startswith("scratch")
    assert Path(temporaries).stat().st_mode & 0o777 == 0o700
    assert interrupts_blocked


def test_tasks_carry_the_name_of_their_stage(cluster):
    list(cluster.mapper(Nearest(np.ones((2, 3))), range(3)))
    list(cluster.mapper(functools.partial(slow_square), range(3)))
    prefixes = cluster.client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.task_prefixes))
    assert {"lloyd-pass", "slow_square", "carry-lloyd-pass"} <= set(prefixes)


def test_results_leave_the_workers_once_they_are_consumed(cluster):
    list(cluster.mapper(slow_square, range(10)))
    tasks = None
    for _ in range(100):  # the scheduler is told asynchronously
        tasks = cluster.client.run_on_scheduler(lambda dask_scheduler: list(map(str, dask_scheduler.tasks)))
        if not tasks:
            break
        time.sleep(0.05)
    assert tasks == []


def test_a_killed_worker_changes_no_result(cluster, heard, tmp_path):
    found = list(cluster.mapper(functools.partial(die_once, tmp_path / "mark"), range(12)))
    assert (tmp_path / "mark").exists()
    assert found == [1000.0 * x for x in range(12)]
    assert any("Restarting worker" in message for message in heard.messages)
    gc.collect()


def test_the_report_is_one_page_that_opens_offline(cluster, tmp_path):
    list(cluster.mapper(slow_square, range(4)))
    cluster.save_report(tmp_path / "dask-report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["dask-report.html"]
    page = (tmp_path / "dask-report.html").read_text()
    assert "Dask Performance Report" in page
    assert "slow_square" in page
    assert not re.findall(r"<script[^>]+src=", page)
    assert not re.findall(r"<link[^>]+href=", page)


def test_a_report_that_cannot_be_written_costs_a_message_and_not_the_run(cluster, heard, tmp_path):
    (tmp_path / "taken").touch()
    cluster.save_report(tmp_path / "taken" / "dask-report.html")
    assert "no dask report" in heard.messages[-1]
    assert str(tmp_path / "taken") in heard.messages[-1]
    assert list(cluster.mapper(slow_square, [3])) == [9]


# whole processes: what a user sees, and what is left


SCRIPT = """
    import json, logging, os, signal, sys, tempfile
    from pathlib import Path
    from tsclust_ooc import runtime
    from tsclust_ooc.runtime import client
    from tsclust_ooc.errors import TsclustError

    client.CONFIG["distributed.scheduler.allowed-failures"] = 0  # each death costs a restart, seconds
    keys = []

    def watch(event, args):
        if event == "open" and str(args[0]).endswith(".pem"):
            keys.append(str(args[0]))

    sys.addaudithook(watch)

    def square(x):
        return x * x

    def die(x):
        os.kill(os.getpid(), signal.SIGKILL)

    if __name__ == "__main__":
        import psutil

        scratch, end = Path(sys.argv[1]), None
        before, temporaries = dict(os.environ), tempfile.gettempdir()
        try:
            with runtime.open_runtime(runtime.ClusterSpec("local", 2, 2 * 10**9, scratch)) as here:
                for name in ("distributed", "distributed.client", "distributed.scheduler", "tornado.application"):
                    logging.getLogger(name).error("nobody reads this")
                squares = list(here.mapper(square, range(5)))
                try:
                    list(here.mapper(die, [0]))
                except TsclustError as error:
                    killed = str(error)
                left = here.mapper(square, range(100))
                next(left)
                for _ in here.mapper(square, range(100)):
                    os.killpg(0, signal.SIGINT)
        except KeyboardInterrupt:
            end = "interrupted"
        left.close()
        children = [" ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)]
        print(json.dumps({
            "end": end, "squares": squares, "killed": killed, "scratch": os.listdir(scratch), "keys": keys,
            "children": [c for c in children if "resource_tracker" not in c],
            "sockets": [s.laddr.port for s in psutil.Process().net_connections() if s.status == "LISTEN"],
            "environment": dict(os.environ) == before, "temporaries": tempfile.gettempdir() == temporaries,
        }))
"""


def run_script(tmp_path, text, *arguments, **environment):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(text))
    command = [sys.executable, "-W", "error", script, *arguments]
    package = str(Path(__file__).parent.parent)
    everything = os.environ | {"PYTHONPATH": package} | environment
    return subprocess.run(command, capture_output=True, text=True, start_new_session=True, env=everything, timeout=100)


def test_nothing_is_printed_and_nothing_is_left_after_a_lost_task_and_ctrl_c(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    ran = run_script(tmp_path, SCRIPT, str(scratch))
    assert (ran.returncode, ran.stderr) == (0, "")
    told = json.loads(ran.stdout)
    assert told["end"] == "interrupted"
    assert told["squares"] == [0, 1, 4, 9, 16]
    assert "died over the same task" in told["killed"]
    assert (told["scratch"], told["children"], told["sockets"]) == ([], [], [])
    assert told["environment"]
    assert told["temporaries"]
    assert told["keys"]
    assert all(Path(key).is_relative_to(scratch) for key in told["keys"])


def test_a_cluster_that_listens_beyond_loopback_is_stopped_before_it_gets_work(tmp_path):
    (tmp_path / "listens.py").write_text(
        "import socket\ndoor = socket.socket()\ndoor.bind(('0.0.0.0', 0))\ndoor.listen()\n"
    )
    script = """
        import os, psutil, sys, tempfile
        from pathlib import Path
        from tsclust_ooc.errors import TsclustError
        from tsclust_ooc.runtime import ClusterSpec, open_runtime

        if __name__ == "__main__":
            try:
                with open_runtime(ClusterSpec("local", 1, 10**9, Path(sys.argv[1]))):
                    print("open")
            except TsclustError as error:
                print(error)
            print(len(psutil.Process().children(recursive=True)))
    """
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    ran = run_script(tmp_path, script, str(scratch), DASK_DISTRIBUTED__WORKER__PRELOAD=str(tmp_path / "listens.py"))
    message, n_children = ran.stdout.splitlines()
    assert re.search(r"listens beyond what was asked for, on 0\.0\.0\.0 port \d+ \(process \d+\)", message)
    assert n_children == "1"  # Python's own resource tracker
    assert list(scratch.iterdir()) == []


def test_importing_the_module_loads_neither_dask_nor_numpy():
    code = "import sys, tsclust_ooc.runtime; print({'dask', 'distributed', 'numpy', 'bokeh'} & set(sys.modules))"
    package = Path(__file__).parent.parent
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=package)
    assert ran.stdout.strip() == "set()"
