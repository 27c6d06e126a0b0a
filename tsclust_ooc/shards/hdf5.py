"""The guarded open: what is in an HDF5 file, and its samples, without following or believing it.

Runs in a child process (`child`). Invariant: no soft or external link, external storage, virtual dataset, plugin or
filter outside the list is ever followed; nothing is allocated that the stored bytes do not account for; data that was
never written is never read as fill values.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import struct
from collections.abc import Iterator
from functools import cached_property

import h5py
import numpy as np

from tsclust_ooc.patience import PASSING
from tsclust_ooc.shards import inflate, layouts
from tsclust_ooc.shards.regular import bytes_of
from tsclust_ooc.shards.schema import (
    DATASET_PER_ITEM,
    INTEGER,
    ROWS_PER_FILE,
    TEXT,
    Member,
    Schema,
    ShardError,
    Structure,
)

SIGNATURE = b"\x89HDF\r\n\x1a\n"

_MAX_CHUNK_BYTES = 256 * 2**20
_MAX_DECLARED_BYTES = 2**60
_MAX_EXPANSION = 1100  # deflate cannot shrink more than 1032:1
_VARIABLE_BYTES = 16  # length, address and index of a global heap object
_MAX_MEMBERS, _MAX_DEPTH = 2_000_000, 8
_UNDEFINED = 2**64 - 1
_OPEN_DATASETS = 2  # that of the samples and that of their names
_HDF5_CACHE_BYTES, _MOST_CACHE_BYTES = 2**20, 64 * 2**20  # of unpacked chunks, a dataset
_ERRNO = re.compile(r"[Ee]rrno(?: =)? (\d+)")
_FILTERS = {
    h5py.h5z.FILTER_DEFLATE: "gzip",
    h5py.h5z.FILTER_SHUFFLE: "shuffle",
    h5py.h5z.FILTER_FLETCHER32: "fletcher32",
    h5py.h5z.FILTER_SZIP: "szip",
    h5py.h5z.FILTER_NBIT: "nbit",
    h5py.h5z.FILTER_SCALEOFFSET: "scaleoffset",
    h5py.h5z.FILTER_LZF: "lzf",
}


class Opened:
    """An open file, its size, what was odd about it, and what was asked of it before: a large one is read in pieces."""

    def __init__(self, id: h5py.h5f.FileID, size: int, warnings: tuple[str, ...]) -> None:
        self.id, self.size, self.warnings = id, size, warnings
        self._datasets: dict[str, h5py.Dataset] = {}
        self._samples: tuple[Schema, list[Member]] | None = None

    @cached_property
    def structure(self) -> Structure:
        """What is in the file; see `structure_of`."""
        return structure_of(self)

    def samples(self, schema: Schema) -> list[Member]:
        """The datasets that hold samples, in row order; ShardError when the file does not fit `schema`."""
        if self._samples is None or self._samples[0] != schema:
            self._samples = schema, layouts.samples_in(schema, self.structure)
        return self._samples[1]

    def dataset(self, name: str) -> h5py.Dataset:
        """The dataset `name`. The last ones stay open, and with them the chunks that were unpacked last."""
        found = self._datasets.pop(name, None)
        if found is None:
            found = _open_dataset(self.id, name)
        if len(self._datasets) >= _OPEN_DATASETS:
            self._datasets.pop(next(iter(self._datasets)))
        self._datasets[name] = found
        return found


def open_guarded(path: str, image: bytes | None = None) -> Opened:
    """Open `path` (or the file `image`) after checking that it is a plain, whole HDF5 file; ShardError otherwise.

    Raises OSError, too, for what the disk or the network failed at and may not fail at again.
    """
    data, size = bytes_of(path) if image is None else (image, len(image))
    warnings = check_superblock(data[:4096], size)
    try:
        if len(data) == size:
            return Opened(h5py.h5f.open_file_image(data), size, warnings)
        access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
        access.set_file_locking(False, True)  # HDF5's own lock fails opens on NFS
        return Opened(h5py.h5f.open(os.fsencode(path), h5py.h5f.ACC_RDONLY, access), size, warnings)
    except (OSError, RuntimeError, ValueError) as error:
        raise _failure(error, "corrupt") from error


def structure_of(opened: Opened) -> Structure:
    """Every dataset reached by hard links alone, described; the rest by name with the code that forbids it."""
    members: list[Member] = []
    try:
        _walk(opened, h5py.h5g.open(opened.id, b"/"), "", members, depth=0)
    except ShardError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, OverflowError, MemoryError, UnicodeError) as error:
        raise _failure(error, "corrupt") from error
    return Structure(tuple(members), opened.warnings)


def read_into(opened: Opened, schema: Schema, start: int, out: np.ndarray) -> list[str]:
    """Fill `out` ((n, *item_shape) in the schema's dtype) with samples from `start` on; returns their names, if any.

    Names are those of datasets that are samples (their attribute `original_id` where they have it), or the rows of the
    dataset `schema.ids`; there are none otherwise.
    """
    members, stop = opened.samples(schema), start + len(out)
    if schema.layout == DATASET_PER_ITEM:
        members = members[start:stop]
        if len(members) != len(out):
            raise ShardError("unstable", f"holds {len(members)} of the {len(out)} samples that the survey saw")
        for i, member in enumerate(members):
            _read_member(opened, schema, member, None, out[i : i + 1])
        return [_original_id(opened, member.name) for member in members]
    rows = (start, stop) if schema.layout == ROWS_PER_FILE else None
    _read_member(opened, schema, members[0], rows, out)
    return _read_ids(opened, layouts.ids_in(schema, opened.structure), start, stop) if schema.ids else []


def _read_member(opened: Opened, schema: Schema, member: Member, rows: tuple[int, int] | None, out: np.ndarray) -> None:
    """The dataset, or some rows of it, straight to its place: no copy on the way."""
    dataset = opened.dataset(member.name)
    start, stop = rows or (0, member.shape[0])
    shape = (stop - start, *member.shape[1:])
    with _reading(dataset, member.name):
        # As it is stored: turning the bytes round is left to numpy, which changes no bit of a NaN.
        stored = out.view(member.dtype).reshape(shape)
        if not inflate.read_rows(dataset.id, start, stop, stored):
            space = dataset.id.get_space()
            space.select_hyperslab((start, *(0 for _ in shape[1:])), shape)
            dataset.id.read(h5py.h5s.create_simple(shape), space, stored)
    if np.dtype(member.dtype) != out.dtype:
        out.byteswap(inplace=True)
    layouts.turn(schema, out.data.cast("B"))


def _read_ids(opened: Opened, member: Member, start: int, stop: int) -> list[str]:
    """Names of samples `start` to `stop`: bytes that are not UTF-8 become surrogates, as in names of files."""
    dataset = opened.dataset(member.name)
    with _reading(dataset, member.name):
        found = dataset[start:stop].tolist()
    return list(map(str, found)) if member.ids == INTEGER else [_text(one) for one in found]


def _original_id(opened: Opened, name: str) -> str:
    """The name that a dataset says it had before HDF5 could not hold it (bio_embeddings), else its own."""
    dataset = opened.dataset(name)
    with _reading(dataset, name):
        if not h5py.h5a.exists(dataset.id, b"original_id"):
            return name
        attribute = h5py.h5a.open(dataset.id, b"original_id")
        if not isinstance(attribute.get_type(), h5py.h5t.TypeStringID) or attribute.shape != ():
            return name
        found = np.empty((), attribute.dtype)
        attribute.read(found)
    return _text(found.item())


def _text(raw: bytes | str) -> str:
    return raw if isinstance(raw, str) else raw.decode("utf-8", "surrogateescape")


def _open_dataset(file: h5py.h5f.FileID, name: str) -> h5py.Dataset:
    """A dataset whose last chunk stays unpacked: where one request ends inside a chunk, the next begins."""
    found = h5py.h5d.open(file, name.encode("utf-8", "surrogateescape"))
    plist = found.get_create_plist()
    if plist.get_layout() == h5py.h5d.CHUNKED:
        n_bytes = math.prod(plist.get_chunk()) * found.dtype.itemsize
        if _HDF5_CACHE_BYTES < n_bytes <= _MOST_CACHE_BYTES:
            access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
            access.set_chunk_cache(521, n_bytes, 0.75)
            found = h5py.h5d.open(file, name.encode("utf-8", "surrogateescape"), access)
    return h5py.Dataset(found)


@contextlib.contextmanager
def _reading(dataset: h5py.Dataset, name: str) -> Iterator[None]:
    """What HDF5 raises while it reads a dataset, as the problem of the shard."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        code = "checksum" if dataset.fletcher32 else "corrupt"
        raise _failure(error, code, f"dataset {name!r} cannot be read: ") from error


def _failure(error: BaseException, code: str, before: str = "") -> Exception:
    """What HDF5 raised, as the problem of the shard; or as the OSError it comes from, where that may pass."""
    told = _ERRNO.search(str(error)) if isinstance(error, OSError | RuntimeError) else None
    if told and int(told[1]) in PASSING:
        return OSError(int(told[1]), os.strerror(int(told[1])))
    return ShardError(code, before + _first_line(error))


def check_superblock(head: bytes, size: int) -> tuple[str, ...]:
    """Warnings about a file of `size` bytes that begins with `head`; ShardError unless it is plain and whole.

    Source: HDF5 File Format Specification 3.0, section II.A (superblock versions 0 to 3).
    """
    if size == 0:
        raise ShardError("empty-file", "0 bytes")
    if head[:8] != SIGNATURE:
        raise _not_hdf5(head)
    try:
        end, driver, writing = _superblock(head)
    except (struct.error, IndexError, KeyError) as error:
        raise ShardError("truncated" if size < 96 else "corrupt", f"{size:,} bytes, superblock unreadable") from error
    if driver != _UNDEFINED:
        raise ShardError("driver", "written with a family, split or multi driver; one file of several")
    if size < end:
        raise ShardError("truncated", f"{size:,} of {end:,} bytes")
    if writing:
        raise ShardError("busy", "still open for writing, or its writer died; wait, or clear it with h5clear -s")
    return (f"{size - end:,} bytes after the end of the HDF5 data",) if size > end else ()


def _superblock(head: bytes) -> tuple[int, int, bool]:
    """(end of file address, driver block address, open for writing) from a superblock."""
    version = head[8]
    if version in (0, 1):
        offsets = head[13]
        first = 24 if version == 0 else 28
        base, _, end, driver = struct.unpack_from("<4Q" if offsets == 8 else "<4I", head, first)
        undefined = _UNDEFINED if offsets == 8 else 2**32 - 1
        return base + end if base else end, _UNDEFINED if driver == undefined else driver, False
    if version in (2, 3):
        offsets = head[9]
        base, _, end = struct.unpack_from("<3Q" if offsets == 8 else "<3I", head, 12)
        return end, _UNDEFINED, version == 3 and bool(head[11] & 0b101)
    raise KeyError(version)


def _not_hdf5(head: bytes) -> ShardError:
    if head.startswith(b"version https://git-lfs"):
        return ShardError("not-hdf5", "a git-lfs pointer, the data were never fetched: run git lfs pull")
    at = 512
    while at + 8 <= len(head):
        if head[at : at + 8] == SIGNATURE:
            return ShardError("driver", f"a user block of {at} bytes before the HDF5 data")
        at *= 2
    return ShardError("not-hdf5", f"begins with {head[:12].decode('latin-1')!a}, no HDF5 signature")


def _walk(opened: Opened, group: h5py.h5g.GroupID, prefix: str, members: list[Member], depth: int) -> None:
    names: list[bytes] = []
    group.links.iterate(names.append)
    for raw in names:
        name = prefix + raw.decode("utf-8", "surrogateescape")
        kind = group.links.get_info(raw).type
        if len(members) >= _MAX_MEMBERS or depth > _MAX_DEPTH:
            raise ShardError("size-limit", f"more than {_MAX_MEMBERS:,} datasets or {_MAX_DEPTH} nested groups")
        if kind != h5py.h5l.TYPE_HARD:
            members.append(_forbidden_link(name, kind))
            continue
        thing = h5py.h5o.open(group, raw)
        if isinstance(thing, h5py.h5g.GroupID):
            before = len(members)
            _walk(opened, thing, f"{name}/", members, depth + 1)
            if len(members) == before:
                members.append(Member(name, (), "", -1, "not-a-dataset", f"{name!r} is an empty group"))
        elif isinstance(thing, h5py.h5d.DatasetID):
            members.append(_describe(opened, name, thing))
        else:
            members.append(Member(name, (), "", -1, "not-a-dataset", f"{name!r} is a named type"))


def _forbidden_link(name: str, kind: int) -> Member:
    if kind == h5py.h5l.TYPE_SOFT:
        return Member(name, (), "", -1, "soft-link", f"{name!r} is a soft link; links inside a shard are not followed")
    return Member(name, (), "", -1, "external-link", f"{name!r} points to another file; such links are not followed")


def _describe(opened: Opened, name: str, dataset: h5py.h5d.DatasetID) -> Member:
    """One dataset as a Member; anything that forbids reading it is in its code."""
    space = dataset.get_space()
    if space.get_simple_extent_type() == h5py.h5s.NULL:
        return Member(name, (), "", -1, "null-dataspace", f"{name!r} has no dataspace (h5py.Empty)")
    shape = tuple(int(n) for n in space.get_simple_extent_dims())
    ids = _ids_kind(dataset.get_type()) if len(shape) == 1 else ""
    try:
        if ids:
            _check_storage(opened, dataset, shape, np.dtype(f"V{_stored_bytes(dataset.get_type())}"))
            return Member(name, shape, "", -1, "dtype", f"{name!r} holds no vectors: {ids}", ids)
        dtype = _float_dtype(dataset.get_type())
        layouts.check_axes(shape)
        offset = _check_storage(opened, dataset, shape, dtype)
    except ShardError as error:
        return Member(name, shape, "", -1, error.problem.code, error.problem.detail)
    return Member(name, shape, dtype.str, offset, "", "")


def _ids_kind(kind: h5py.h5t.TypeID) -> str:
    """Whether values of a type can name samples: 'text', 'integer' or ''."""
    if isinstance(kind, h5py.h5t.TypeStringID):
        return TEXT
    return INTEGER if isinstance(kind, h5py.h5t.TypeIntegerID) and kind.get_size() <= 8 else ""


def _stored_bytes(kind: h5py.h5t.TypeID) -> int:
    """Bytes that one value of a type takes in the file; of a variable string that is where its text lies."""
    variable = isinstance(kind, h5py.h5t.TypeStringID) and kind.is_variable_str()
    return _VARIABLE_BYTES if variable else int(kind.get_size())


def _float_dtype(kind: h5py.h5t.TypeID) -> np.dtype:
    """The numpy dtype of an IEEE float16, 32 or 64 type; ShardError 'dtype' for everything else."""
    if isinstance(kind, h5py.h5t.TypeFloatID) and kind.get_size() in (2, 4, 8):
        plain = (h5py.h5t.IEEE_F16LE, h5py.h5t.IEEE_F16BE, h5py.h5t.IEEE_F32LE, h5py.h5t.IEEE_F32BE,
                 h5py.h5t.IEEE_F64LE, h5py.h5t.IEEE_F64BE)  # fmt: skip
        if any(kind.equal(one) for one in plain):
            plain_dtype: np.dtype = np.dtype(kind.dtype)
            return plain_dtype
    try:
        found = str(kind.dtype)[:60]
    except (TypeError, ValueError, RuntimeError):
        found = type(kind).__name__
    raise ShardError("dtype", f"{found}; embeddings are float16, float32 or float64")


def _check_storage(opened: Opened, dataset: h5py.h5d.DatasetID, shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Offset of contiguous unfiltered data, else -1; ShardError unless every declared byte is stored in this file."""
    plist = dataset.get_create_plist()
    layout = plist.get_layout()
    if layout == h5py.h5d.VIRTUAL:
        raise ShardError("virtual", "a virtual dataset: its data lie in other files")
    if plist.get_external_count():
        raise ShardError("external-storage", "its data lie in another file")
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes > _MAX_DECLARED_BYTES:
        raise ShardError("size-limit", f"declares shape {shape}, {n_bytes:.3g} bytes")
    stored = dataset.get_storage_size()
    if n_bytes and not stored:
        raise ShardError("unallocated", f"declares shape {shape} and stores nothing; HDF5 would read fill values")
    if layout == h5py.h5d.CHUNKED:
        _check_chunks(dataset, plist, shape, dtype, stored)
        return -1
    if stored != n_bytes:
        raise ShardError("incomplete-allocation", f"stores {stored:,} of {n_bytes:,} bytes")
    offset = dataset.get_offset() if layout == h5py.h5d.CONTIGUOUS else None
    if offset is not None and offset + n_bytes > opened.size:
        raise ShardError("truncated", f"data end at byte {offset + n_bytes:,} of {opened.size:,}")
    return -1 if offset is None else int(offset)


def _check_chunks(dataset: h5py.h5d.DatasetID, plist: h5py.h5p.PropDCID, shape: tuple[int, ...], dtype: np.dtype,
                  stored: int) -> None:  # fmt: skip
    chunk = plist.get_chunk()
    chunk_bytes = math.prod(chunk) * dtype.itemsize
    if chunk_bytes > _MAX_CHUNK_BYTES:
        raise ShardError("chunk-bytes", f"chunks of {chunk_bytes:,} bytes; at most {_MAX_CHUNK_BYTES:,}")
    ids = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
    for one in ids:
        if one not in _FILTERS or not h5py.h5z.filter_avail(one):
            raise ShardError("filter", f"filter {one} is not supported; plugins are never loaded")
        if ids.count(one) > 1:
            raise ShardError("repeated-filter", f"filter {_FILTERS[one]} applied {ids.count(one)} times")
    needed = math.prod(-(-n // c) for n, c in zip(shape, chunk, strict=True))
    if needed > _MAX_MEMBERS * 16:
        raise ShardError("size-limit", f"{needed:,} chunks")
    present = dataset.get_num_chunks() if needed else 0
    if present != needed:
        raise ShardError("incomplete-allocation", f"{present:,} of {needed:,} chunks are stored")
    if needed * chunk_bytes > _MAX_EXPANSION * stored + 2**20:
        raise ShardError("size-limit", f"{stored:,} stored bytes would unpack to {needed * chunk_bytes:,}")


def _first_line(error: BaseException) -> str:
    return ascii(str(error).split("\n")[0])[1:-1][:200] or type(error).__name__
