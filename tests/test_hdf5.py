"""The guarded open and read: h5py's values for good files, a code for what must not be followed or believed."""

from __future__ import annotations

import os

import h5py
import numpy as np
import pytest
from sources import ITEM, KEY, values, write_shard

from tsclust_ooc.shards import hdf5, regular
from tsclust_ooc.shards.schema import Schema, ShardError


def found(path):
    """{name: code} of the datasets in a file."""
    return {m.name: m.code for m in hdf5.structure_of(hdf5.open_guarded(str(path))).members}


def read(path, schema, start=0, stop=1):
    out = np.empty((stop - start, *schema.item_shape), schema.dtype)
    return out, hdf5.read_into(hdf5.open_guarded(str(path)), schema, start, out)


def code_of(call, *args):
    with pytest.raises(ShardError) as caught:
        call(*args)
    return caught.value.problem.code


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"])
@pytest.mark.parametrize("options", [{}, {"chunks": (1, 16), "compression": "gzip", "shuffle": True}])
def test_every_float_reads_as_h5py_reads_it_in_little_endian(tmp_path, dtype, options):
    sample = values(1, dtype=dtype)[0]
    write_shard(tmp_path / "0.h5", sample, **options)
    got, names = read(tmp_path / "0.h5", Schema("item-per-file", KEY, ITEM, dtype.replace(">", "<")))
    with h5py.File(tmp_path / "0.h5") as file:
        assert np.array_equal(got[0], file[KEY][()])
    assert got.dtype == np.dtype(dtype.replace(">", "<"))
    assert names == []


@pytest.mark.parametrize("filters", [{"compression": "lzf"}, {"fletcher32": True}, {"compression": "gzip"}])
def test_allowed_filters_are_read(tmp_path, filters):
    write_shard(tmp_path / "0.h5", values(1)[0], chunks=ITEM, **filters)
    assert np.array_equal(read(tmp_path / "0.h5", Schema("item-per-file", KEY, ITEM, "<f4"))[0], values(1))


@pytest.mark.parametrize("shape", [(3, 16), (1, 3, 16), (1, 1, 3, 16), (*[1] * 30, 3, 16), (1, 3, 16, 1, 1)])
def test_leading_axes_of_one_are_dropped(tmp_path, shape):
    write_shard(tmp_path / "0.h5", values(1).reshape(shape))
    assert read(tmp_path / "0.h5", Schema("item-per-file", KEY, ITEM, "<f4"))[0].shape == (1, *ITEM)


@pytest.mark.parametrize("libver", ["earliest", "v110", "latest"])
def test_rows_of_a_file_larger_than_the_image_limit_are_read_in_parts(tmp_path, monkeypatch, libver):
    rows = values(40, (16,))
    with h5py.File(tmp_path / "r.h5", "w", libver=libver) as file:
        file[KEY] = rows
    monkeypatch.setattr(regular, "IMAGE_BYTES", 100)
    assert np.array_equal(read(tmp_path / "r.h5", Schema("rows-per-file", KEY, (16,), "<f4"), 7, 31)[0], rows[7:31])


@pytest.mark.parametrize("width", [16, 2048])  # chunks that HDF5 keeps by itself, and larger ones
@pytest.mark.parametrize("options", [{"compression": "gzip", "shuffle": True}, {"fletcher32": True}])
def test_rows_of_an_open_file_are_read_in_pieces_that_end_inside_chunks(tmp_path, width, options):
    rows = values(500, (width,))
    write_shard(tmp_path / "r.h5", rows, chunks=(200, width), **options)
    opened, schema = hdf5.open_guarded(str(tmp_path / "r.h5")), Schema("rows-per-file", KEY, (width,), "<f4")
    got = np.empty_like(rows)
    for start, stop in ((0, 130), (130, 131), (131, 410), (410, 500)):
        assert hdf5.read_into(opened, schema, start, got[start:stop]) == []
    assert np.array_equal(got, rows)


def test_an_open_file_is_described_once(tmp_path):
    write_shard(tmp_path / "0.h5", values(1)[0])
    opened, schema = hdf5.open_guarded(str(tmp_path / "0.h5")), Schema("item-per-file", KEY, ITEM, "<f4")
    assert opened.structure is opened.structure
    assert opened.samples(schema) is opened.samples(schema)
    other = Schema("item-per-file", "other", ITEM, "<f4")
    assert code_of(opened.samples, other) == "key-missing"
    assert opened.dataset(KEY) is opened.dataset(KEY)


def test_a_file_that_holds_fewer_datasets_than_were_surveyed_is_unstable(tmp_path):
    with h5py.File(tmp_path / "0.h5", "w") as file:
        file["a"] = values(1)[0]
    assert code_of(read, tmp_path / "0.h5", Schema("dataset-per-item", "", ITEM, "<f4"), 0, 2) == "unstable"


@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8"])
def test_every_bit_of_a_nan_is_kept(tmp_path, dtype):
    n = np.dtype(dtype).itemsize
    bits = np.full(ITEM, {2: 0x7D01, 4: 0x7FA00001, 8: 0x7FF4000000000001}[n], f">u{n}")  # signalling, with a payload
    write_shard(tmp_path / "0.h5", bits.view(dtype))
    got, _ = read(tmp_path / "0.h5", Schema("item-per-file", KEY, ITEM, dtype.replace(">", "<")))
    assert np.array_equal(got[0].view(f"<u{n}"), bits)


def test_datasets_of_a_file_come_in_natural_order_with_their_names(tmp_path):
    names = ["s|2", "s|10", "s|9", "g/2", "g/deep/1"]
    samples = dict(zip(names, values(5), strict=True))
    with h5py.File(tmp_path / "0.h5", "w") as file:
        for name, sample in samples.items():
            file[name] = sample
    got, order = read(tmp_path / "0.h5", Schema("dataset-per-item", "", ITEM, "<f4"), 0, 5)
    assert sorted(order) == sorted(names)
    assert [n for n in order if n.startswith("s|")] == ["s|2", "s|9", "s|10"]
    for sample, name in zip(got, order, strict=True):
        assert np.array_equal(sample, samples[name])


def test_a_dataset_name_that_is_not_utf8_is_read(tmp_path):
    with h5py.File(tmp_path / "0.h5", "w") as file:
        file[b"caf\xe9"] = values(1)[0]
    got, names = read(tmp_path / "0.h5", Schema("dataset-per-item", "", ITEM, "<f4"))
    assert np.array_equal(got, values(1))
    assert os.fsencode(names[0]) == b"caf\xe9"


def test_a_part_of_the_datasets_can_be_read(tmp_path):
    with h5py.File(tmp_path / "0.h5", "w") as file:
        for i, sample in enumerate(values(12)):
            file[f"w{i}"] = sample
    got, names = read(tmp_path / "0.h5", Schema("dataset-per-item", "", ITEM, "<f4"), 3, 11)
    assert names == [f"w{i}" for i in range(3, 11)]
    assert np.array_equal(got, values(12)[3:11])


def test_links_are_named_and_never_followed(tmp_path):
    write_shard(tmp_path / "other.h5", values(1)[0])
    with h5py.File(tmp_path / "0.h5", "w") as file:
        file["real"] = values(1)[0]
        file["soft"] = h5py.SoftLink("/real")
        file["away"] = h5py.ExternalLink(str(tmp_path / "other.h5"), KEY)
        file.create_group("empty")
        file["type"] = np.dtype("f4")
    assert found(tmp_path / "0.h5") == {
        "real": "", "soft": "soft-link", "away": "external-link", "empty": "not-a-dataset", "type": "not-a-dataset",
    }  # fmt: skip


def test_a_group_inside_itself_ends(tmp_path):
    with h5py.File(tmp_path / "0.h5", "w") as file:
        file.create_group("a")["b"] = file["/"]
    assert code_of(found, tmp_path / "0.h5") == "size-limit"


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda f: f.create_dataset(KEY, ITEM, "f4"), "unallocated"),
        (lambda f: f.create_dataset(KEY, ITEM, "f4", chunks=(1, 16)), "unallocated"),
        (lambda f: f.create_dataset(KEY, (2**40, 768), "f4", chunks=(1024, 768)), "unallocated"),
        (lambda f: f.create_dataset(KEY, (2**50, 768), "f4", chunks=(1024, 768)), "size-limit"),
        (lambda f: f.create_dataset(KEY, data=1.0), "shape"),
        (lambda f: f.create_dataset(KEY, data=np.ones((1, 2, 1, 1, 4), "f4")), "shape"),
        (lambda f: f.create_dataset(KEY, data=h5py.Empty("f4")), "null-dataspace"),
        (lambda f: f.create_dataset(KEY, data=np.ones(ITEM, "i4")), "dtype"),
        (lambda f: f.create_dataset(KEY, data=np.ones(ITEM, "c8")), "dtype"),
        (lambda f: f.create_dataset(KEY, data=["a", "b"]), "dtype"),
    ],
)
def test_a_dataset_that_may_not_be_read_says_why(tmp_path, make, code):
    with h5py.File(tmp_path / "0.h5", "w") as file:
        make(file)
    assert found(tmp_path / "0.h5") == {KEY: code}


def test_chunks_that_were_never_written_are_not_read_as_fill_values(tmp_path):
    with h5py.File(tmp_path / "0.h5", "w") as file:
        file.create_dataset(KEY, ITEM, "f4", chunks=(1, 16))[1] = 1.0
    assert found(tmp_path / "0.h5") == {KEY: "incomplete-allocation"}


def test_a_flipped_byte_under_fletcher32_is_found_when_the_data_are_read(tmp_path):
    write_shard(tmp_path / "0.h5", values(1)[0], chunks=ITEM, fletcher32=True)
    whole = bytearray((tmp_path / "0.h5").read_bytes())
    whole[whole.index(values(1)[0].tobytes()[:32])] ^= 1
    (tmp_path / "0.h5").write_bytes(whole)
    assert found(tmp_path / "0.h5") == {KEY: ""}
    assert code_of(read, tmp_path / "0.h5", Schema("item-per-file", KEY, ITEM, "<f4")) == "checksum"


@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_a_cut_file_says_both_sizes_and_a_longer_one_is_only_odd(tmp_path, libver):
    with h5py.File(tmp_path / "0.h5", "w", libver=libver) as file:
        file[KEY] = values(1)[0]
    whole = (tmp_path / "0.h5").read_bytes()
    for n in (1, 100, len(whole) // 2):
        (tmp_path / "0.h5").write_bytes(whole[:-n])
        with pytest.raises(ShardError, match=f"{len(whole) - n:,} of {len(whole):,} bytes") as caught:
            hdf5.open_guarded(str(tmp_path / "0.h5"))
        assert caught.value.problem.code == "truncated"
    (tmp_path / "0.h5").write_bytes(whole + b"end")
    opened = hdf5.open_guarded(str(tmp_path / "0.h5"))
    assert opened.warnings == ("3 bytes after the end of the HDF5 data",)


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (b"", "empty-file", "0 bytes"),
        (b"a,b\n1,2\n" * 50, "not-hdf5", "begins with"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not-hdf5", "git lfs pull"),
        (bytes(512) + hdf5.SIGNATURE + bytes(99), "driver", "user block of 512"),
        (hdf5.SIGNATURE + bytes(20), "truncated", "superblock"),
        (hdf5.SIGNATURE + b"\x09" + bytes(200), "corrupt", "superblock"),
    ],
)
def test_what_is_no_hdf5_file_is_told_apart(tmp_path, data, code, words):
    (tmp_path / "0.h5").write_bytes(data)
    with pytest.raises(ShardError, match=words) as caught:
        hdf5.open_guarded(str(tmp_path / "0.h5"))
    assert caught.value.problem.code == code


def test_a_file_that_is_still_being_written_is_busy(tmp_path):
    with h5py.File(tmp_path / "0.h5", "w", libver="latest") as file:
        file[KEY] = values(1)[0]
    whole = bytearray((tmp_path / "0.h5").read_bytes())
    whole[11] |= 1  # consistency flags of superblock version 3: open for writing
    assert whole[8] == 3
    assert code_of(hdf5.check_superblock, bytes(whole[:4096]), len(whole)) == "busy"


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "0.h5")
    assert code_of(hdf5.open_guarded, str(tmp_path / "0.h5")) == "not-regular"


@pytest.mark.parametrize(("libver", "version"), [("earliest", 0), ("v108", 2), ("v110", 3), ("latest", 3)])
def test_the_end_of_file_is_found_in_every_superblock_version(tmp_path, libver, version):
    with h5py.File(tmp_path / "0.h5", "w", libver=libver) as file:
        file[KEY] = values(1)[0]
    whole = (tmp_path / "0.h5").read_bytes()
    assert whole[8] == version
    assert hdf5.check_superblock(whole[:4096], len(whole)) == ()
    assert code_of(hdf5.check_superblock, whole[:4096], len(whole) - 1) == "truncated"


IDS = Schema("rows-per-file", KEY, (16,), "<f4", ids="ids")


def with_ids(path, data, **options):
    """A file of rows with a dataset of names."""
    with h5py.File(path, "w") as file:
        file[KEY] = values(9, (16,))
        file.create_dataset("ids", data=data, **options)


def kind_of(path):
    (found,) = (m for m in hdf5.structure_of(hdf5.open_guarded(str(path))).members if m.name == "ids")
    return found.ids, found.code


@pytest.mark.parametrize("chunks", [None, (4,)])
@pytest.mark.parametrize(
    ("data", "dtype", "kind", "names"),
    [
        ([f"w {i}" for i in range(9)], h5py.string_dtype(), "text", [f"w {i}" for i in range(9)]),
        (["é".encode() * i for i in range(9)], h5py.string_dtype("utf-8", 20), "text", ["é" * i for i in range(9)]),
        ([b"a\xff"] * 9, "S3", "text", ["a\udcff"] * 9),
        (range(-4, 5), ">i2", "integer", [str(i) for i in range(-4, 5)]),
        ([2**64 - 1] * 9, "u8", "integer", [str(2**64 - 1)] * 9),
    ],
)
def test_names_of_rows_are_read_with_them(tmp_path, data, dtype, kind, names, chunks):
    with_ids(tmp_path / "0.h5", list(data), dtype=dtype, chunks=chunks)
    assert kind_of(tmp_path / "0.h5") == (kind, "dtype")
    got, found_names = read(tmp_path / "0.h5", IDS, 2, 7)
    assert np.array_equal(got, values(9, (16,))[2:7])
    assert found_names == names[2:7]


@pytest.mark.parametrize(
    "data", [np.ones(9, "f4"), np.ones((9, 2), "i4"), np.ones(9, "?"), np.ones(9, [("a", "i4")]), np.ones(9, "c8")]
)
def test_other_datasets_are_no_names(tmp_path, data):
    with_ids(tmp_path / "0.h5", data)
    assert kind_of(tmp_path / "0.h5")[0] == ""
    assert code_of(read, tmp_path / "0.h5", IDS) in ("dtype", "shape")


def test_names_that_were_never_written_are_no_names(tmp_path):
    with h5py.File(tmp_path / "0.h5", "w") as file:
        file[KEY] = values(9, (16,))
        file.create_dataset("ids", (9,), h5py.string_dtype(), chunks=(4,))[:4] = "a"
    assert kind_of(tmp_path / "0.h5") == ("", "incomplete-allocation")
    assert code_of(read, tmp_path / "0.h5", IDS) == "incomplete-allocation"


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("sp|P1/2|ö", "sp|P1/2|ö"),
        (np.bytes_(b"caf\xe9"), "caf\udce9"),
        (7, "d"),
        (["a", "b"], "d"),
        (h5py.Empty("S3"), "d"),
    ],
)
def test_a_dataset_is_named_by_its_original_id_if_that_is_a_string(tmp_path, value, name):
    with h5py.File(tmp_path / "0.h5", "w") as file:
        file.create_dataset("d", data=values(1)[0]).attrs["original_id"] = value
    assert read(tmp_path / "0.h5", Schema("dataset-per-item", "", ITEM, "<f4"))[1] == [name]


@pytest.mark.parametrize("layout", ["item-per-file", "rows-per-file", "dataset-per-item"])
def test_samples_stored_feature_first_are_turned_as_numpy_turns_them(tmp_path, layout):
    stored = values(4, (16, 3))
    with h5py.File(tmp_path / "0.h5", "w") as file:
        for i, sample in enumerate(stored):
            if layout == "dataset-per-item":
                file[str(i)] = sample
        if layout != "dataset-per-item":
            file[KEY] = stored if layout == "rows-per-file" else stored[0]
    schema = Schema(layout, "" if layout == "dataset-per-item" else KEY, ITEM, "<f4", "first")
    n = 1 if layout == "item-per-file" else 4
    assert np.array_equal(read(tmp_path / "0.h5", schema, 0, n)[0], stored[:n].swapaxes(1, 2))
