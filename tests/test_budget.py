"""What this process may use: the least of all limits that bind it, and refusals that say what would fit."""

import os
import resource

import pytest

from tsclust_ooc import budget
from tsclust_ooc.budget import BASE_BYTES, Budget, available_cores, memory_limit, resolve
from tsclust_ooc.errors import CannotWrite, UsageError
from tsclust_ooc.units import parse_bytes

GIB = 2**30
SLURM = ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A pretended machine of 64 GiB and 64 cores without cgroups; returns a function that writes its files."""

    def put(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    put({"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:   {64 * 2**20} kB\nSwapFree: 5 kB\n"})
    monkeypatch.setattr(budget, "_ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(resource, "getrlimit", lambda what: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for name in SLURM:
        monkeypatch.delenv(name, raising=False)
    return put


def test_without_any_limit_the_available_memory_and_all_cores_count(machine):
    assert memory_limit() == 64 * GIB
    assert available_cores() == 64


def test_the_affinity_mask_binds(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert available_cores() == 2


V2 = {"proc/self/cgroup": "0::/user.slice/job_7/step\n"}
V1 = {"proc/self/cgroup": "9:name=systemd:/x\n4:memory:/slurm/job_7\n1:cpu,cpuacct:/slurm/job_7\n0::/\n"}


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (V2, {"user.slice/job_7/step/memory.max": f"{4 * GIB}\n"}, 4 * GIB),
        (V2, {"user.slice/job_7/step/memory.max": "max\n", "user.slice/job_7/memory.max": f"{3 * GIB}\n"}, 3 * GIB),
        (V2, {"memory.max": f"{2 * GIB}\n"}, 2 * GIB),
        (V2, {"user.slice/job_7/step/memory.max": f"{5 * GIB}\n", "memory.max": f"{2 * GIB}\n"}, 2 * GIB),
        (V2, {"user.slice/job_7/step/memory.max": "max\n"}, 64 * GIB),
        (V1, {"memory/slurm/job_7/memory.limit_in_bytes": f"{4 * GIB}\n"}, 4 * GIB),
        (V1, {"memory/slurm/memory.limit_in_bytes": f"{3 * GIB}\n"}, 3 * GIB),
        (V1, {"memory/slurm/job_7/memory.limit_in_bytes": "9223372036854771712\n"}, 64 * GIB),
        (V1, {"memory/memory.limit_in_bytes": f"{6 * GIB}\n"}, 6 * GIB),  # a container sees no more
        ({"proc/self/cgroup": "0::/../other\n"}, {"memory.max": f"{2 * GIB}\n"}, 2 * GIB),
    ],
)
def test_the_least_memory_limit_of_the_cgroup_and_its_ancestors_binds(machine, groups, files, expected):
    machine(groups | {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert memory_limit() == expected


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        (V2, {"user.slice/job_7/step/cpu.max": "400000 100000\n"}, 4),
        (V2, {"user.slice/job_7/step/cpu.max": "50000 100000\n"}, 1),
        (V2, {"user.slice/job_7/step/cpu.max": "max 100000\n"}, 64),
        (V2, {"user.slice/cpu.max": "250000 100000\n"}, 2),
        (V1, {"cpu/slurm/job_7/cpu.cfs_quota_us": "300000\n", "cpu/slurm/job_7/cpu.cfs_period_us": "100000\n"}, 3),
        (V1, {"cpu/slurm/job_7/cpu.cfs_quota_us": "-1\n", "cpu/slurm/job_7/cpu.cfs_period_us": "100000\n"}, 64),
        (V1, {"cpu/slurm/job_7/cpu.cfs_quota_us": "300000\n"}, 64),
    ],
)
def test_a_cpu_quota_of_either_cgroup_version_binds(machine, groups, files, cores):
    machine(groups | {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert available_cores() == cores


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SLURM_MEM_PER_NODE": "4096"}, 4 * GIB),
        ({"SLURM_MEM_PER_CPU": "1024", "SLURM_CPUS_ON_NODE": "3"}, 3 * GIB),
        ({"SLURM_MEM_PER_CPU": "1024"}, 64 * GIB),
        ({"SLURM_MEM_PER_NODE": "0"}, 64 * GIB),  # --mem=0 asks for the whole node
        ({"SLURM_MEM_PER_NODE": "0", "SLURM_MEM_PER_CPU": "512", "SLURM_CPUS_ON_NODE": "2"}, GIB),
        ({"SLURM_MEM_PER_NODE": "plenty"}, 64 * GIB),
        ({"SLURM_MEM_PER_NODE": str(2**20)}, 64 * GIB),  # a grant above what is there
    ],
)
def test_a_slurm_grant_binds(machine, monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert memory_limit() == expected


def test_a_limit_on_the_address_space_binds(machine, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda what: (5 * GIB, resource.RLIM_INFINITY))
    assert memory_limit() == 5 * GIB


def test_the_default_is_half_of_the_limit_and_every_core(machine):
    assert resolve() == Budget(32 * GIB, 64)


def test_options_are_taken_as_given(machine):
    assert resolve("4GB", 3) == Budget(4 * 10**9, 3)


def test_the_real_machine_gives_a_budget_within_its_memory():
    found = memory_limit()
    assert 0 < found <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 1 <= available_cores() <= os.cpu_count()


@pytest.mark.parametrize("workers", [0, -2])
def test_no_workers_are_refused(workers):
    with pytest.raises(UsageError, match=f"--workers {workers} .* Use 1 or more"):
        resolve("4GB", workers)


@pytest.mark.parametrize("memory", ["100MB", 0, -5, BASE_BYTES])
def test_memory_below_what_the_libraries_need_is_refused_with_an_amount_that_works(memory):
    with pytest.raises(UsageError, match=r"--memory .* less than the libraries alone need") as caught:
        resolve(memory, 1)
    suggested = str(caught.value).rsplit("at least ", 1)[1].rstrip(".")
    assert resolve(suggested, 1).memory_bytes > BASE_BYTES


@pytest.mark.parametrize(
    ("free_bytes", "bytes_each", "expected"), [(1000, 100, 8), (799, 100, 7), (100, 100, 1), (1000, 0, 8)]
)
def test_as_many_workers_run_as_fit_and_never_more_than_asked(free_bytes, bytes_each, expected):
    assert Budget(BASE_BYTES + free_bytes, 8).workers_that_fit(bytes_each, "x") == expected


@pytest.mark.parametrize("bytes_each", [10**8 + 1, 7 * 10**8, 123_456_789_012])
def test_a_plan_that_cannot_fit_is_refused_and_the_suggested_memory_is_enough(bytes_each):
    with pytest.raises(CannotWrite) as caught:
        Budget(BASE_BYTES + 10**8, 4).workers_that_fit(bytes_each, "a pass over 64 MiB chunks")
    text = str(caught.value)
    assert "a pass over 64 MiB chunks needs" in text
    assert "--memory allows 550 MB" in text
    suggested = text.rsplit("--memory ", 1)[1].split(",")[0]
    assert Budget(parse_bytes(suggested), 4).workers_that_fit(bytes_each, "x") == 1
