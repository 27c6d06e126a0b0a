"""A corpus of odd inputs: five good shards and one that is not like them, with the verdict that is wanted.

Invariant: a case differs from a good source in one way only, wherever HDF5 allows it, so a wrong verdict points at one
check. Where a shard fails several checks, `note` says so and `expect` names the one that should speak. All values are
seeded. Files that an odd shard refers to lie in `objects/` in the source, without `.h5`, or in a folder beside it.
"""

from __future__ import annotations

import os
import shutil
import stat
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5p, h5s, h5t, h5z

KEY, ITEM = "embeddings", (7, 768)
ODD = "train/5.h5"
GOOD = tuple(f"train/{i}.h5" for i in range(5))
DEFLATE, UNREGISTERED = (h5z.FILTER_DEFLATE, 0, (4,)), (32099, h5z.FLAG_OPTIONAL, (1,))
MIB = 1 << 20
RNG = np.random.default_rng

Build = Callable[[Path], object]  # what it returns means nothing
Filter = tuple[int, int, tuple[int, ...]]  # id, flags, values


@dataclass(frozen=True)
class Case:
    """One odd input: where it lies, how it is made, and the code it must get."""

    row: int  # the hazard's number in the table of bad inputs; several cases may share one
    name: str  # slug, unique in CASES, fit to be a test id
    build: Build  # adds or changes the odd input in a folder that `fill_good` has filled
    expect: str  # code of the problem, or "accept"
    shard: str = ODD  # relative path of the odd shard, as os.fsdecode gives it
    note: str = ""
    needs_user: bool = False  # the superuser does not see the problem (permissions)


def good_shard(path: Path, value: float | np.random.Generator) -> None:
    """Write one (7, 768) float32 shard as extractors do: one contiguous dataset, no attributes, h5py's defaults."""
    _write(path, _item(value))


def fill_good(folder: Path) -> None:
    """Put the five good shards `train/0.h5` ... `train/4.h5` into an empty source, all different."""
    for number, name in enumerate(GOOD):
        good_shard(folder / name, RNG(number))


def make_source(case: Case, folder: Path) -> Path:
    """Create `folder` with the good shards and the odd input of `case`; return the odd shard's path."""
    folder.mkdir(parents=True, exist_ok=True)
    fill_good(folder)
    case.build(folder)
    return folder / case.shard


def _item(value: float | np.random.Generator) -> np.ndarray:
    if isinstance(value, np.random.Generator):
        return value.standard_normal(ITEM, dtype=np.float32)
    return np.full(ITEM, value, np.float32)


def _odd_item() -> np.ndarray:
    return _item(RNG(5))


def _write(path: Path, array: Any, libver: str = "earliest", **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w", libver=libver) as file:
        file.create_dataset(KEY, data=array, **options)


def _replace(data: bytes, offset: int, new: bytes) -> bytes:
    return data[:offset] + new + data[offset + len(new) :]


def _filtered(filters: Sequence[Filter], chunk: tuple[int, int], stored: bytes) -> Build:
    """One (7, 768) dataset that can grow, with any filters, whose first chunk is `stored` as it is."""
    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_chunk(chunk)
    for code, flags, values in filters:
        properties.set_filter(code, flags, values)

    def write(file: h5py.File) -> None:
        space = h5s.create_simple(ITEM, (h5s.UNLIMITED, ITEM[1]))
        h5d.create(file.id, KEY.encode(), h5t.IEEE_F32LE, space, properties).write_direct_chunk((0, 0), stored)

    return _h5(write)


def _deflated_zeros(n_bytes: int) -> bytes:
    """zlib stream of `n_bytes` zeros, put together from one compressed MiB that is repeated: nothing is allocated."""
    squeeze = zlib.compressobj(9)
    first, again = (squeeze.compress(bytes(MIB)) + squeeze.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    whole, rest = divmod(n_bytes, MIB)
    last = squeeze.compress(bytes(rest)) + squeeze.flush(zlib.Z_FINISH)
    # Adler-32 of n zeros: the sum stays 1, and the sum of sums is n (RFC 1950).
    return first + again * (whole - 1) + last[:-4] + struct.pack(">HH", n_bytes % 65521, 1)


def _named(row: int, name: str, shard: str) -> Case:
    return Case(row, name, lambda folder: good_shard(folder / shard, RNG(5)), "accept", shard)


def _edited(edit: Callable[[bytes], bytes], **options: Any) -> Build:
    """A shard (good, if `options` change nothing else) whose bytes went through `edit`."""

    def build(folder: Path) -> None:
        _write(folder / ODD, **{"array": _odd_item(), **options})
        (folder / ODD).write_bytes(edit((folder / ODD).read_bytes()))

    return build


def _snapshot(rows: slice, **file_options: Any) -> Build:
    """What a killed writer leaves: the file as it was after a flush, one row a chunk, only `rows` of them written."""

    def build(folder: Path) -> None:
        draft = folder.with_name(folder.name + "-draft")
        with h5py.File(draft, "w", **file_options) as file:
            file.create_dataset(KEY, ITEM, "f4", chunks=(1, ITEM[1]))[rows] = _odd_item()[rows]
            file.flush()
            shutil.copyfile(draft, folder / ODD)

    return build


def _link_to(suffix: str, folder: Path) -> None:
    target = Path(f"{folder.absolute()}{suffix}/ab12")
    good_shard(target, RNG(5))
    (folder / ODD).symlink_to(target)


def _forbidden(folder: Path) -> None:
    good_shard(folder / ODD, RNG(5))
    (folder / ODD).chmod(0)


def _h5(write: Callable[[h5py.File], object], **file_options: Any) -> Build:
    def build(folder: Path) -> None:
        with h5py.File(folder / ODD, "w", **file_options) as file:
            write(file)

    return build


def _linked(**links: Any) -> Build:
    """A shard whose root holds `links` beside good data named `real`; more good data lie in `objects/target`."""

    def build(folder: Path) -> None:
        good_shard(folder / "objects/target", RNG(5))
        _h5(lambda file: file.update({"real": _odd_item(), **links}))(folder)

    return build


def _external_storage(stored_bytes: int) -> Build:
    def build(folder: Path) -> None:
        raw = folder.absolute() / "objects/raw"
        raw.parent.mkdir()
        raw.write_bytes(_odd_item().tobytes()[:stored_bytes])
        _unwritten(ITEM, external=[(str(raw), 0, h5py.h5f.UNLIMITED)])(folder)

    return build


def _virtual(source: str) -> Build:
    def build(folder: Path) -> None:
        good_shard(folder / "objects/target", RNG(5))
        layout = h5py.VirtualLayout(ITEM, "f4")
        layout[...] = h5py.VirtualSource(source, KEY, ITEM, "f4")
        with h5py.File(folder / ODD, "w") as file:
            file.create_virtual_dataset(KEY, layout)

    return build


def _driver(first: str, name: str, **driver: Any) -> Build:
    """Write with a driver that spreads a file over several; the first of them, `first`, becomes the shard."""

    def build(folder: Path) -> None:
        (folder / "objects").mkdir()
        with h5py.File(folder / "objects" / name, "w", **driver) as file:
            file[KEY] = _odd_item()
        (folder / "objects" / first).rename(folder / ODD)

    return build


def _bfloat16(file: h5py.File) -> None:
    datatype = h5t.IEEE_F16LE.copy()
    datatype.set_fields(15, 7, 8, 0, 7)
    datatype.set_ebias(127)
    h5d.create(file.id, KEY.encode(), datatype, h5s.create_simple(ITEM)).write(h5s.ALL, h5s.ALL, _odd_item())


def _nested_vlen(depth: int) -> Build:
    """A type of `depth` lists in each other; `.dtype` takes cubic time, and so would building it by HDF5's calls.

    Hence the dataset's object header is written anew at the end of the file, its datatype message longer
    (HDF5 file format specification: IV.A.1.a, version 1 object header; IV.A.2.d, datatype message).
    """

    def edit(data: bytes) -> bytes:
        start = _header(data)
        (size,) = struct.unpack_from("<I", data, start + 8)
        header = data[start : start + 16 + size]
        vlen = header.index(b"\x19\0\0\0\x10\0\0\0")  # class 9 in version 1, 16 bytes an element
        longer = 8 * (depth - 1)
        (message,) = struct.unpack_from("<H", header, vlen - 6)
        header = _replace(header, vlen - 6, struct.pack("<H", message + longer))
        header = _replace(header, 8, struct.pack("<I", size + longer))
        header = header[:vlen] + header[vlen : vlen + 8] * (depth - 1) + header[vlen:]
        data = _replace(data, data.index(b"SNOD") + 16, struct.pack("<Q", len(data)))
        return _replace(data, 40, struct.pack("<Q", len(data) + len(header))) + header

    return _edited(edit, array=None, shape=(7,), dtype=h5py.vlen_dtype("<f4"))


def _header(data: bytes) -> int:
    """Address of the dataset's object header: the one entry of the root group's symbol node points to it."""
    return int.from_bytes(data[data.index(b"SNOD") + 16 :][:8], "little")


def _data(array: Any, **options: Any) -> Build:
    return lambda folder: _write(folder / ODD, array, **options)


def _unwritten(shape: tuple[int, ...], **options: Any) -> Build:
    return _h5(lambda file: file.create_dataset(KEY, shape, "f4", **options))


def _array_type(folder: Path) -> None:
    with h5py.File(folder / ODD, "w") as file:
        file.create_dataset(KEY, ITEM[:1], np.dtype(("<f4", ITEM[1:])))[...] = _odd_item()


def _all(dtype: str) -> Build:
    def build(folder: Path) -> None:
        for number, name in enumerate((*GOOD, ODD)):
            _write(folder / name, _item(RNG(number)).astype(dtype))

    return build


def _rows_per_file(folder: Path) -> None:
    rng = RNG(5)
    for number, name in enumerate(GOOD):
        _write(folder / name, rng.standard_normal((20 + number, ITEM[1]), dtype=np.float32))
    _write(folder / ODD, np.zeros((0, ITEM[1]), np.float32))


def _with_value(value: float, columns: slice = slice(10, 12)) -> Build:
    array = _odd_item()
    array[2, columns] = value
    return _data(array)


def _damaged(signature: bytes, offset: int, new: bytes) -> Build:
    """A good shard with `new` written `offset` bytes after the first `signature`."""
    return _edited(lambda data: _replace(data, data.index(signature) + offset, new))


def _cyclic_tree(data: bytes) -> bytes:
    tree = data.index(b"TREE")
    return _replace(_replace(data, tree + 5, b"\x01"), tree + 32, struct.pack("<Q", tree))


def _flip_after(signature: bytes, offset: int, data: bytes) -> bytes:
    where = data.index(signature) + offset
    return _replace(data, where, bytes([data[where] ^ 16]))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a2146" * 8 + b"\nsize 23552\n"
AWAY = h5py.ExternalLink("../objects/target", KEY)
TWICE = zlib.compress(zlib.compress(_odd_item().tobytes()))
BOMB = zlib.compress(_deflated_zeros(87_381 * 3072))
BIG_CHUNK, FULL_CHUNK = (90_000, 768), (87_381, 768)  # 264 MiB, and just under 256 MiB
VALUES = _odd_item().tobytes()[400:464]  # found in a file, they lead to its data
FAR = struct.pack("<Q", 1 << 40)

# fmt: off
CASES: list[Case] = [
    Case(1, "zero-length", lambda d: (d / ODD).write_bytes(b""), "empty-file"),
    Case(2, "text", lambda d: (d / ODD).write_text("0.1,0.2\n" * 2000), "not-hdf5"),
    Case(2, "git-lfs-pointer", lambda d: (d / ODD).write_bytes(LFS), "not-hdf5", note="say: git lfs pull"),
    Case(2, "png", lambda d: (d / ODD).write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(99)), "not-hdf5"),
    Case(3, "cut-by-1-byte", _edited(lambda b: b[:-1]), "truncated"),
    Case(3, "cut-in-the-middle", _edited(lambda b: b[: len(b) // 2]), "truncated"),
    Case(3, "cut-to-100-bytes", _edited(lambda b: b[:100]), "truncated"),
    Case(3, "cut-to-40-bytes", _edited(lambda b: b[:40]), "truncated", note="superblock cut: HDF5's text is different"),
    Case(4, "trailing-garbage", _edited(lambda b: b + b"\n[end of transfer]\n"), "accept", note="with a warning"),
    Case(5, "writer-flag-left-set", _snapshot(slice(7), libver="latest"), "busy", note="retries cannot help: h5clear"),
    Case(6, "writer-killed-half-way", _snapshot(slice(4)), "incomplete-allocation"),
    Case(6, "writer-killed-when-done", _snapshot(slice(7)), "accept"),
    _named(8, "same-name-in-two-splits", "val/0.h5"),
    Case(9, "hard-link", lambda d: (d / ODD).hardlink_to(d / GOOD[0]), "duplicate", note="of train/0.h5"),
    Case(9, "symlink-to-sibling", lambda d: (d / ODD).symlink_to("0.h5"), "duplicate", note="of train/0.h5"),
    Case(10, "same-content", lambda d: shutil.copyfile(d / GOOD[0], d / ODD), "accept", note="counted"),
    _named(11, "newline-in-name", "train/5\n6.h5"),
    _named(12, "name-not-utf-8", os.fsdecode(b"train/5\xff\xfe.h5")),
    _named(13, "terminal-escape-in-name", "train/5\x1b[31m\x07.h5"),
    _named(13, "leading-dash-in-name", "train/-rf.h5"),
    _named(13, "quotes-and-percent-in-name", "train/5 '%s' \"{0}\" $(id);`id`.h5"),
    Case(14, "symlink-inside-the-source", partial(_link_to, "/objects"), "accept"),
    Case(15, "symlink-to-itself", lambda d: (d / ODD).symlink_to("5.h5"), "unreadable", note="ELOOP"),
    Case(16, "symlink-out-of-the-source", partial(_link_to, "-elsewhere"), "accept"),
    Case(17, "fifo", lambda d: os.mkfifo(d / ODD), "not-regular", note="a plain open never returns"),
    Case(17, "socket", lambda d: os.mknod(d / ODD, stat.S_IFSOCK | 0o600), "not-regular"),
    Case(17, "symlink-to-a-device", lambda d: (d / ODD).symlink_to("/dev/zero"), "not-regular", note="endless"),
    Case(18, "directory", lambda d: (d / ODD).mkdir(), "not-regular"),
    Case(19, "no-permission", _forbidden, "unreadable", needs_user=True),
    Case(20, "dangling-symlink", lambda d: (d / ODD).symlink_to("gone.h5"), "unreadable", note="ENOENT"),
    Case(21, "other-key", _h5(lambda f: f.create_dataset("vec\x1b[31m", data=_odd_item())), "key-missing"),
    Case(21, "no-key-at-all", _h5(lambda f: None), "key-missing"),
    Case(21, "a-thousand-other-keys", _h5(lambda f: [f.create_group(f"k{i}") for i in range(1000)]), "key-missing"),
    Case(22, "group", _h5(lambda f: f.create_dataset(f"{KEY}/0", data=_odd_item())), "not-a-dataset"),
    Case(22, "named-datatype", _linked(**{KEY: np.dtype("f4")}), "not-a-dataset"),
    Case(23, "external-link", _linked(**{KEY: AWAY}), "external-link", note="to good data"),
    Case(23, "external-link-to-nothing", _linked(**{KEY: h5py.ExternalLink("gone", KEY)}), "external-link"),
    Case(24, "soft-link", _linked(**{KEY: h5py.SoftLink("/real")}), "soft-link"),
    Case(24, "soft-link-to-external-link", _linked(away=AWAY, **{KEY: h5py.SoftLink("/away")}), "soft-link"),
    Case(25, "soft-link-cycle", _linked(**{KEY: h5py.SoftLink("/b"), "b": h5py.SoftLink(KEY)}), "soft-link"),
    Case(26, "external-storage", _external_storage(_odd_item().nbytes), "external-storage"),
    Case(26, "external-storage-too-short", _external_storage(100), "external-storage", note="zero-padded by HDF5"),
    Case(27, "virtual", _virtual("../objects/target"), "virtual"),
    Case(27, "virtual-without-source", _virtual("gone"), "virtual", note="fill values"),
    Case(28, "family", _driver("5-0", "5-%d", driver="family", memb_size=1 << 30), "driver", note="one member, whole"),
    Case(28, "family-of-three", _driver("5-0", "5-%d", driver="family", memb_size=8192), "driver", note="looks cut"),
    Case(28, "split", _driver("5-m.h5", "5", driver="split"), "driver"),
    Case(28, "user-block", _h5(lambda f: f.create_dataset(KEY, data=_odd_item()), userblock_size=512), "driver"),
    Case(29, "filter-not-registered", _filtered([UNREGISTERED], ITEM, _odd_item().tobytes()), "filter"),
    Case(29, "gzip-and-shuffle", _data(_odd_item(), compression="gzip", shuffle=True, chunks=(1, 768)), "accept"),
    Case(31, "bomb-in-one-chunk", _filtered([DEFLATE], BIG_CHUNK, _deflated_zeros(90_000 * 3072)), "chunk-bytes"),
    Case(31, "deflate-twice", _filtered([DEFLATE] * 2, ITEM, TWICE), "repeated-filter", note="harmless content"),
    Case(31, "bomb-deflated-twice", _filtered([DEFLATE] * 2, FULL_CHUNK, BOMB), "repeated-filter", note="5 KB"),
    # The next two fail both checks, and the one of the shape.
    Case(32, "declared-petabytes", _unwritten((2**40, 768), chunks=(1024, 768), fillvalue=1.5), "unallocated"),
    Case(34, "more-bytes-than-2-to-the-63", _unwritten((2**62, 768), chunks=(1024, 768)), "size-limit"),
    Case(32, "never-written", _unwritten(ITEM), "unallocated", note="contiguous, right shape"),
    Case(33, "missing-chunks", _snapshot(slice(4, 7)), "incomplete-allocation", note="first 4 of 7 chunks missing"),
    *(Case(35, f"{len(d)}-d", _data(np.ones(d, "f4")), "shape") for d in [(), (768,), (2, 7, 768), (2, 3, 7, 768)]),
    *(Case(35, f"{n}-axes-of-one", _data(_odd_item().reshape(*[1] * n, *ITEM)), "accept") for n in (1, 2, 30)),
    Case(36, "no-rows-among-items", _data(np.zeros((0, 768), np.float32)), "shape", note="layout: one item a file"),
    Case(36, "no-rows-among-rows", _rows_per_file, "accept", note="layout: rows a file, 20 ... 24 in the others"),
    Case(37, "null-dataspace", _data(h5py.Empty("f4")), "null-dataspace"),
    Case(38, "other-feature-count", _data(_odd_item()[:, :512]), "dim"),
    Case(38, "transposed", _data(np.ascontiguousarray(_odd_item().T)), "dim", note="(768, 7): name both shapes"),
    Case(39, "all-float16", _all("<f2"), "accept"),
    Case(40, "all-float64", _all("<f8"), "accept"),
    Case(40, "one-float64", _data(_odd_item().astype("<f8")), "dtype"),
    Case(40, "one-float16", _data(_odd_item().astype("<f2")), "dtype"),
    Case(41, "all-big-endian", _all(">f4"), "accept"),
    Case(41, "one-big-endian", _data(_odd_item().astype(">f4")), "accept", note="same values once swapped"),
    Case(42, "int32", _data(np.ones(ITEM, np.int32)), "dtype"),
    Case(42, "bool", _data(np.ones(ITEM, np.bool_)), "dtype"),
    Case(42, "enum", _data(np.ones(ITEM, "i4"), dtype=h5py.enum_dtype({"a": 0, "b": 1}, "i4")), "dtype"),
    Case(43, "complex64", _data(_odd_item().astype(np.complex64)), "dtype"),
    Case(43, "compound", _data(np.zeros(ITEM, [("a", "f4"), ("b", "f4")])), "dtype"),
    Case(43, "opaque", _data(np.zeros(ITEM, "V4")), "dtype"),
    Case(43, "long-double", _data(_odd_item().astype(np.longdouble)), "dtype"),
    Case(43, "bfloat16", _h5(_bfloat16), "dtype", note="h5py calls it <f4"),
    Case(44, "vlen-string", _data([["0.5"] * 768] * 7, dtype=h5py.string_dtype()), "dtype"),
    Case(44, "fixed-string", _data(np.full(ITEM, b"0.5")), "dtype"),
    Case(44, "object-reference", _data(np.full(ITEM, h5py.Reference(), h5py.ref_dtype)), "dtype"),
    Case(44, "vlen-in-vlen-2000-deep", _nested_vlen(2000), "dtype", note="never written; `.dtype` takes 1.4 s"),
    Case(45, "array-subdtype", _array_type, "dtype"),
    Case(46, "nan", _with_value(np.nan), "accept", note="row 2, columns 10 and 11; found when data are read"),
    Case(46, "inf", _with_value(-np.inf), "accept", note="row 2, columns 10 and 11; found when data are read"),
    Case(47, "zero-row", _with_value(0.0, columns=slice(None)), "accept", note="row 2; no cosine"),
    Case(47, "squares-overflow", _with_value(1e30), "accept", note="row 2, columns 10 and 11"),
    Case(49, "flipped-bit", _edited(partial(_flip_after, VALUES, 0)), "accept", note="seen only by a digest"),
    Case(50, "fletcher32-mismatch", _edited(partial(_flip_after, VALUES, 0), fletcher32=True, chunks=ITEM), "checksum"),
    # For these h5py raises KeyError, as it does for an absent key ...
    Case(51, "tree-signature", _damaged(b"TREE", 0, b"EERT"), "corrupt"),
    Case(51, "tree-cyclic", _edited(_cyclic_tree), "corrupt"),
    Case(51, "tree-entries", _damaged(b"TREE", 6, b"\xff\xff"), "corrupt"),
    Case(51, "tree-child-past-the-end", _damaged(b"TREE", 32, FAR), "corrupt"),
    Case(51, "heap-signature", _damaged(b"HEAP", 0, b"PAEH"), "corrupt"),
    Case(51, "header-version", _edited(lambda b: _replace(b, _header(b), b"\x09")), "corrupt"),
    Case(51, "dimension-over-its-limit", _edited(lambda b: _replace(b, _header(b) + 32, FAR)), "corrupt"),
    Case(51, "data-past-the-end", _damaged(struct.pack("<QQ", 2048, 21504), 0, FAR), "corrupt"),
    Case(51, "header-checksum", _edited(partial(_flip_after, b"OHDR", 12), libver="latest"), "corrupt"),
    # ... and for these OSError, when it opens the file.
    *(Case(51, f"noise-in-superblock-{n}", _damaged(b"\x89HDF", 8, RNG(n).bytes(88)), "corrupt") for n in range(3)),
    *(Case(51, f"noise-in-root-group-{n}", _damaged(b"\x89HDF", 96, RNG(n).bytes(704)), "corrupt") for n in range(3)),
]
# Not in CASES, as it is slow on purpose: 65 KB that HDF5 needs about a second to open and h5py a minute to name.
SLOW = Case(52, "vlen-in-vlen-8000-deep", _nested_vlen(8000), "timeout", note="for a deadline well under a second")
# fmt: on
