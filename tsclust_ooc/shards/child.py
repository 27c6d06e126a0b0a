"""A parser process: reads one request a line from stdin, answers on stdout, dies alone.

Run as `python -m tsclust_ooc.shards.child`; `parsers` is its only caller. Requests and answers are one line of JSON;
the answer to `read` is followed by `n_bytes` raw bytes. Nothing is pickled.
"""

from __future__ import annotations

import base64
import json
import os
import resource
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, BinaryIO

# Before h5py is imported: HDF5 reads these when it starts. '::' forbids every plugin.
os.environ["HDF5_PLUGIN_PRELOAD"] = "::"
os.environ["HDF5_USE_FILE_LOCKING"] = "FALSE"

import h5py

from tsclust_ooc.shards import hdf5, npy
from tsclust_ooc.shards.schema import DATASET_PER_ITEM, Schema, ShardError, Structure
from tsclust_ooc.shards.templates import MAX_METADATA_BYTES, Template, check_stamp, stamp_of

_ADDRESS_SPACE = 6 * 2**30


def probe(path: str, *, learn: bool) -> dict[str, Any]:
    """The structure of a file, and with `learn` the template it makes, if it makes one."""
    if path.lower().endswith(npy.SUFFIX):
        head, size = npy.head_of(path)
        image = hdf5.bytes_of(path)[1] if learn else None
        structure, parse = npy.structure_of(head, size), _npy_structure
    else:
        size, image = hdf5.bytes_of(path)
        structure, parse = hdf5.structure_of(hdf5.open_guarded(path, image)), _hdf5_structure
    template = learn_template(image, structure, parse) if learn and image is not None else None
    return {"structure": structure_to_json(structure), "template": vars(template) if template else None, "size": size}


def _hdf5_structure(image: bytes) -> Structure:
    return hdf5.structure_of(hdf5.open_guarded("", image))


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


def read(request: dict[str, Any], out: BinaryIO) -> dict[str, Any]:
    """Answer a read: the header, with the raw samples to follow."""
    path, stamp = request["path"], tuple(request["stamp"])
    check_stamp(stamp, stamp_of(path))
    schema = Schema(**{**request["schema"], "item_shape": tuple(request["schema"]["item_shape"])})
    start, stop = request["start"], request["stop"]
    # Asked only where it may be: on a network filesystem each open takes milliseconds.
    if schema.key in ("", npy.NAME) and npy.is_npy(path):
        samples = npy.read(path, schema, start, stop)
        names = [npy.NAME] if schema.layout == DATASET_PER_ITEM else []
    else:
        samples, names = hdf5.read(_opened(path, stamp), schema, start, stop)
    check_stamp(stamp, stamp_of(path))
    raw = samples.data.cast("B") if samples.size else b""
    _send(out, {"n_bytes": len(raw), "names": names})
    out.write(raw)
    return {}


def answer(request: dict[str, Any], out: BinaryIO) -> None:
    """Do one request; a shard that cannot be used is an answer, not a crash."""
    try:
        if request["do"] == "read":
            read(request, out)
        else:
            _send(out, probe(request["path"], learn=request["do"] == "learn"))
    except ShardError as error:
        _send(out, {"problem": [error.problem.code, error.problem.detail]})
    except OSError as error:
        _send(out, {"problem": ["unreadable", error.strerror or str(error)]})
    except MemoryError:
        _send(out, {"problem": ["size-limit", "does not fit the memory of a parser process"]})
    out.flush()


def _send(out: BinaryIO, message: dict[str, Any]) -> None:
    out.write(json.dumps(message).encode() + b"\n")


def main() -> None:
    """Serve requests until stdin closes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = _ADDRESS_SPACE if hard == resource.RLIM_INFINITY else min(_ADDRESS_SPACE, hard)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    h5py._errors.silence_errors()
    out = sys.stdout.buffer
    for line in sys.stdin.buffer:
        answer(json.loads(line), out)


if __name__ == "__main__":
    main()
