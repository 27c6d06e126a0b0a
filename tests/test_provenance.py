"""Where, when and with what something was made: no secrets, and the memory of the whole process tree."""

import datetime
import os
import subprocess
import sys
from importlib import metadata

import psutil
import pytest

from tsclust_ooc import records
from tsclust_ooc.provenance import Meter, Provenance, here_and_now, tree_bytes

MB = 10**6
HOG = "import sys; x = bytearray(b'x') * (120 * 10**6); print('there', flush=True); sys.stdin.readline()"
PARENT = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {HOG!r}]))"


@pytest.fixture(params=[HOG, PARENT], ids=["child", "grandchild"])
def hog(request):
    """A descendant that holds 120 MB."""
    process = subprocess.Popen([sys.executable, "-c", request.param], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"there\n"
    yield process
    process.communicate(b"\n")


def test_no_environment_reaches_a_record_but_the_job_s_number(monkeypatch):
    for name, value in {"SLURM_JOB_ID": "4711", "AWS_SECRET_ACCESS_KEY": "hush", "SLURM_JOB_ACCOUNT": "hush"}.items():
        monkeypatch.setenv(name, value)
    found = here_and_now()
    assert found.job["SLURM_JOB_ID"] == "4711"
    assert "SLURM_JOB_ACCOUNT" not in found.job
    assert "hush" not in records.dumps(found)


def test_versions_are_those_installed():
    found = here_and_now()
    assert found.packages["numpy"] == metadata.version("numpy")
    assert found.packages["zarr"] == metadata.version("zarr")
    assert found.python == ".".join(map(str, sys.version_info[:3]))
    assert found.host == os.uname().nodename


def test_the_time_is_utc_and_says_so():
    created = datetime.datetime.fromisoformat(here_and_now().created)
    assert created.utcoffset() == datetime.timedelta(0)


def test_a_provenance_goes_to_disk_and_comes_back(tmp_path):
    found = here_and_now()
    records.save(tmp_path / "p.json", found, 1)
    assert records.load(tmp_path / "p.json", Provenance, 1) == found


def test_the_memory_of_descendants_counts(hog):
    me = psutil.Process()
    expected = sum(p.memory_info().rss for p in [me, *me.children(recursive=True)])
    assert tree_bytes(os.getpid()) == pytest.approx(expected, abs=5 * MB)
    assert tree_bytes(hog.pid) > 120 * MB


def test_a_process_that_is_gone_holds_nothing():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert tree_bytes(process.pid) == 0


def test_a_meter_sees_the_peak_and_not_only_the_end():
    before = tree_bytes(os.getpid())
    with Meter() as meter:
        process = subprocess.Popen([sys.executable, "-c", HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process.stdout.readline()
        while meter.peak_bytes < before + 120 * MB:
            assert meter.elapsed() < 30
        process.communicate(b"\n")
    assert meter.peak_bytes >= before + 120 * MB
    assert 0 < meter.seconds <= meter.elapsed()


def test_a_meter_ends_when_its_block_fails():
    meter = Meter()
    with pytest.raises(ValueError, match="inside"), meter:
        raise ValueError("inside")
    assert meter.seconds > 0
    assert meter.peak_bytes > 0
