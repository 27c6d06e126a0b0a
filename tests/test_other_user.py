"""Another user of the machine cannot talk to a cluster, nor read its keys, scratch, or results not yet published.

Needs root, to become somebody else. Everything lies in a directory that everybody may pass, and a file beside that
everybody may read is really read: the refusals are those of our own modes and keys.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from datasets import publish, three_splits

from tsclust_ooc import matrix, scratch
from tsclust_ooc.errors import CannotWrite
from tsclust_ooc.pipeline import distancing
from tsclust_ooc.pipeline.distancing import DistancesOptions, distances
from tsclust_ooc.runtime import ClusterSpec, open_runtime

pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning"),
    pytest.mark.skipif(os.getuid() != 0, reason="becoming another user needs root: run these tests with sudo"),
]

NOBODY = """
import encodings.idna, json, os, socket, ssl, sys

asked = json.loads(sys.argv[1])
os.setgroups([]); os.setgid(65534); os.setuid(65534)
said = {}
for path in asked["paths"]:
    try:
        said[path] = "listed" if os.listdir(path) is not None else ""
    except NotADirectoryError:
        try:
            with open(path, "rb") as file:
                said[path] = f"read {len(file.read())}"
        except OSError as error:
            said[path] = type(error).__name__
    except OSError as error:
        said[path] = type(error).__name__
for port in asked["ports"]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as plain, context.wrap_socket(plain) as tls:
            tls.sendall(bytes(8))
            said[str(port)] = f"answered {tls.recv(100)}"
    except OSError as error:
        said[str(port)] = f"refused: {type(error).__name__} {error}"
print(json.dumps(said))
"""


@pytest.fixture
def open_place():
    """A directory that any user can pass and list."""
    place = Path(tempfile.mkdtemp(prefix="tsclust-test-", dir="/var/tmp"))
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


def as_nobody(paths=(), ports=()):
    asked = json.dumps({"paths": [str(p) for p in paths], "ports": list(ports)})
    ran = subprocess.run([sys.executable, "-c", NOBODY, asked], capture_output=True, text=True, check=True)
    return json.loads(ran.stdout)


def square(x):
    return x * x


def test_a_cluster_answers_nobody_without_its_key_and_keeps_its_files_to_itself(open_place):
    (open_place / "beside").write_text("for all")
    private = scratch.scratch_dir(open_place)
    with open_runtime(ClusterSpec("local", 1, 10**9, private)) as runtime:
        assert list(runtime.mapper(square, [3])) == [9]
        workers = runtime.client.scheduler_info()["workers"]
        addresses = [runtime.client.scheduler.address, *workers, *(w["nanny"] for w in workers.values())]
        ports = [int(address.rpartition(":")[2]) for address in addresses]
        folders = list(private.glob("dask-*"))
        said = as_nobody([open_place / "beside", private, *folders], ports)
        assert said[str(open_place / "beside")] == "read 7"
        assert folders
        assert {said[str(path)] for path in (private, *folders)} == {"PermissionError"}
        assert len(ports) == 3
        for port in ports:
            assert said[str(port)].startswith("refused: "), said
        assert list(runtime.mapper(square, [4])) == [16]  # it lives on


def test_results_are_read_by_others_when_they_are_published_and_not_before(open_place, monkeypatch):
    dataset = publish(open_place, three_splits())
    options = DistancesOptions(split="val", scratch=scratch.scratch_dir(open_place).parent, workers=1)

    def no_room(*args, **kwargs):
        raise CannotWrite("stopped before publishing")

    with monkeypatch.context() as patched:
        patched.setattr(distancing.matrix, "finalize", no_room)
        with pytest.raises(CannotWrite):
            distances(dataset, open_place / "out", options)
    (work,) = open_place.glob(".out.*.wip")
    assert as_nobody([work])[str(work)] == "PermissionError"
    distances(dataset, open_place / "out", options)
    chunk = next((open_place / "out" / matrix.STORE).rglob("c/0/0"))
    said = as_nobody([open_place / "out", chunk])
    assert said[str(open_place / "out")] == "listed"
    assert said[str(chunk)].startswith("read ")
