"""A parser process: reads one request a line from stdin, answers on stdout, dies alone.

Run as `python -m tsclust_ooc.shards.child FD`; `parsers` is its only caller. Requests and answers are one line of JSON;
samples that were asked for lie at the beginning of the memory file FD when the answer comes, which the parent made
large enough. Nothing is pickled. A request that the disk or the network failed is done again from its beginning.
"""

from __future__ import annotations

import base64
import errno
import json
import mmap
import os
import resource
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

# Before h5py is imported: HDF5 reads these when it starts. '::' forbids every plugin.
os.environ["HDF5_PLUGIN_PRELOAD"] = "::"
os.environ["HDF5_USE_FILE_LOCKING"] = "FALSE"

import h5py
import numpy as np

from tsclust_ooc.patience import Patience
from tsclust_ooc.shards import hdf5, npy
from tsclust_ooc.shards.regular import bytes_of, head_of
from tsclust_ooc.shards.schema import DATASET_PER_ITEM, Schema, ShardError, Structure
from tsclust_ooc.shards.templates import MAX_METADATA_BYTES, Template, check_stamp, stamp_of

_ADDRESS_SPACE = 6 * 2**30


def probe(path: str, *, learn: bool) -> dict[str, Any]:
    """The structure of a file, and with `learn` the template it makes, if it makes one."""
    if path.lower().endswith(npy.SUFFIX):
        data, size = bytes_of(path) if learn else head_of(path)
        structure, parse = npy.structure_of(data, size), _npy_structure
    else:
        data, size = bytes_of(path)
        image = data if len(data) == size else None
        structure, parse = hdf5.open_guarded(path, image).structure, _hdf5_structure
    whole = learn and len(data) == size
    template = learn_template(data, structure, parse) if whole else None
    return {"structure": structure_to_json(structure), "template": vars(template) if template else None, "size": size}


def _hdf5_structure(image: bytes) -> Structure:
    return hdf5.open_guarded("", image).structure


def _npy_structure(image: bytes) -> Structure:
    return npy.structure_of(image, len(image))


def learn_template(
    image: bytes, structure: Structure, parse: Callable[[bytes], Structure] = _hdf5_structure
) -> Template | None:
    """The template that a parsed file makes, or None when its data are not one plain region."""
    plain = [m for m in structure.members if not m.code and m.offset >= 0 and m.n_bytes > 0]
    if not plain or structure.warnings:
        return None
    member = max(plain, key=lambda m: m.n_bytes)
    head, tail = image[: member.offset], image[member.offset + member.n_bytes :]
    fillers = (filler * member.n_bytes for filler in (b"\xff", b"\x5a"))
    if len(head) + len(tail) > MAX_METADATA_BYTES or not _same(structure, (head + f + tail for f in fillers), parse):
        return None
    return Template(
        len(image), member.name, member.shape, member.dtype, member.offset, member.n_bytes,
        base64.b64encode(head).decode(), base64.b64encode(tail).decode(),
    )  # fmt: skip


def _same(structure: Structure, images: Iterable[bytes], parse: Callable[[bytes], Structure]) -> bool:
    """Whether the parser finds the same structure in all images: the file with its data region overwritten."""
    try:
        return all(parse(image) == structure for image in images)
    except ShardError:
        return False


def structure_to_json(structure: Structure) -> list[Any]:
    """A structure in JSON's types."""
    members = [[m.name, m.shape, m.dtype, m.offset, m.code, m.detail, m.ids] for m in structure.members]
    return [members, structure.warnings]


@lru_cache(maxsize=1)
def _opened(path: str, stamp: tuple[int, int]) -> hdf5.Opened:  # noqa: ARG001 (part of the cache's key)
    """The file of the last request stays open: a large shard is read in pieces."""
    return hdf5.open_guarded(path)


class Samples:
    """The memory file that the parent reads samples from."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._mapped: mmap.mmap | bytearray = bytearray()

    def room(self, n_bytes: int) -> memoryview:
        """Its first `n_bytes`; they stay mapped from request to request."""
        if len(self._mapped) < n_bytes:
            self._mapped = mmap.mmap(self._fd, n_bytes)
        return memoryview(self._mapped)[:n_bytes]


def read(request: dict[str, Any], samples: Samples) -> dict[str, Any]:
    """Put the samples of a request where the parent finds them; the answer has their names."""
    path, stamp = request["path"], tuple(request["stamp"])
    check_stamp(stamp, stamp_of(path))
    schema = Schema(**{**request["schema"], "item_shape": tuple(request["schema"]["item_shape"])})
    start, stop = request["start"], request["stop"]
    shape = (stop - start, *schema.item_shape)
    out = np.frombuffer(samples.room((stop - start) * schema.item_bytes), schema.dtype).reshape(shape)
    # Asked only where it may be: on a network filesystem each open takes milliseconds.
    if schema.key in ("", npy.NAME) and npy.is_npy(path):
        npy.read_into(path, schema, start, out)
        names = [npy.NAME] if schema.layout == DATASET_PER_ITEM else []
    else:
        names = hdf5.read_into(_opened(path, stamp), schema, start, out)
    check_stamp(stamp, stamp_of(path))
    return {"names": names}


def answer(request: dict[str, Any], samples: Samples) -> dict[str, Any]:
    """Do one request; a shard that cannot be used is an answer, not a crash."""
    patience = _patience(request["tries"])
    before = patience.n_retries
    try:
        found = patience.call(_do, request, samples)
    except ShardError as error:
        found = {"problem": [error.problem.code, error.problem.detail]}
    except OSError as error:
        found = {"problem": ["unreadable", _reason(error)]}
    except MemoryError:
        found = {"problem": ["size-limit", "does not fit the memory of a parser process"]}
    return {**found, "n_retries": patience.n_retries - before}


@lru_cache(maxsize=1)
def _patience(tries: int) -> Patience:
    """One for all requests: it learns when there is nothing to wait for."""
    return Patience(tries)


def _reason(error: OSError) -> str:
    """What the system said, with the name of its number (a patience that was used up has told it)."""
    name = errno.errorcode.get(error.errno or 0, "")
    told = error.strerror or str(error)
    return f"{told} ({name})" if name and name not in told else told


def _do(request: dict[str, Any], samples: Samples) -> dict[str, Any]:
    try:
        if request["do"] == "read":
            return read(request, samples)
        return probe(request["path"], learn=request["do"] == "learn")
    except (OSError, MemoryError):
        _opened.cache_clear()  # what HDF5 made of a read that failed is not to be built upon
        raise


def main() -> None:
    """Serve requests until stdin closes."""
    samples = Samples(int(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = _ADDRESS_SPACE if hard == resource.RLIM_INFINITY else min(_ADDRESS_SPACE, hard)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    h5py._errors.silence_errors()
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(answer(json.loads(line), samples)).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
