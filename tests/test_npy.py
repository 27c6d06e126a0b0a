"""`.npy` files as shards: numpy's values for good ones, a code for what must not be believed."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest
from sources import values

from tsclust_ooc.shards import npy
from tsclust_ooc.shards.parsers import Parsers
from tsclust_ooc.shards.regular import head_of
from tsclust_ooc.shards.schema import Member, Schema, ShardError
from tsclust_ooc.shards.templates import stamp_of


@pytest.fixture(scope="module")
def parsers():
    with Parsers(1) as parsers:
        yield parsers


def found(path):
    return npy.structure_of(*head_of(str(path)))


def verdict(path):
    """The code of a file, or of the array in it."""
    try:
        (member,) = found(path).members
    except ShardError as error:
        return error.problem.code
    return member.code


def header(text, version=1):
    """A file with a header of our own wording."""
    raw = text.encode() + b"\n"
    return npy.MAGIC + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(raw)) + raw


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f8"])
@pytest.mark.parametrize("shape", [(5,), (40, 16), (4, 3, 16), (0, 16), (1, 1, 1, 3, 16)])
def test_the_structure_is_what_numpy_reads(tmp_path, version, dtype, shape):
    array = np.arange(np.prod(shape), dtype=dtype).reshape(shape)
    with (tmp_path / "0.npy").open("wb") as file:
        np.lib.format.write_array(file, array, version)
    (member,) = found(tmp_path / "0.npy").members
    again = np.load(tmp_path / "0.npy", allow_pickle=False)
    assert (member.shape, np.dtype(member.dtype), member.code) == (again.shape, again.dtype, "")
    assert (tmp_path / "0.npy").read_bytes()[member.offset :] == again.tobytes()


def test_rows_are_read_in_parts(tmp_path):
    rows = values(40, (16,), ">f4")
    np.save(tmp_path / "0.npy", rows)
    got = np.empty((24, 16), "<f4")
    npy.read_into(str(tmp_path / "0.npy"), Schema("rows-per-file", npy.NAME, (16,), "<f4"), 7, got)
    assert np.array_equal(got, rows[7:31])


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty-file"),
        (b"a,b\n1,2\n", "not-npy"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not-npy"),
        (b"PK\x03\x04" + bytes(99), "not-npy"),
        (npy.MAGIC, "truncated"),
        (npy.MAGIC + b"\x01\x00\x76\x00{'descr'", "truncated"),
        (npy.MAGIC + b"\x09\x00" + bytes(99), "dtype"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)}"), "truncated"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (2, -3)}"), "corrupt"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (True, 3)}"), "corrupt"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 768)}"), "truncated"),
        (header("{'descr': '<f4', 'fortran_order': False}"), "corrupt"),
        (header("__import__('os').abort()"), "corrupt"),
        (header("[" * 5000), "corrupt"),
        (header("{'descr': '|O', 'fortran_order': False, 'shape': (2,)}"), "dtype"),
        (header("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,)}"), "dtype"),
        (header("{'descr': '<i8', 'fortran_order': False, 'shape': (2,)}"), "dtype"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': ()}"), "shape"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 1, 3, 4)}"), "shape"),
        (header("{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3)}", version=2), "fortran-order"),
    ],
)
def test_what_cannot_be_a_shard_has_its_code(tmp_path, data, code):
    (tmp_path / "0.npy").write_bytes(data)
    assert verdict(tmp_path / "0.npy") == code


def test_every_cut_of_a_file_is_truncated(tmp_path):
    np.save(tmp_path / "0.npy", values(1)[0])
    whole = (tmp_path / "0.npy").read_bytes()
    for n in range(6, len(whole)):
        (tmp_path / "0.npy").write_bytes(whole[:n])
        assert verdict(tmp_path / "0.npy") == "truncated", n


def test_bytes_after_the_array_are_odd_and_no_more(tmp_path):
    np.save(tmp_path / "0.npy", values(1)[0])
    with (tmp_path / "0.npy").open("ab") as file:
        file.write(b"end")
    assert found(tmp_path / "0.npy").warnings == ("3 bytes after the end of the array",)
    assert verdict(tmp_path / "0.npy") == ""


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "0.npy")
    assert verdict(tmp_path / "0.npy") == "not-regular"


def test_pickles_are_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.abort, ()

    np.save(tmp_path / "0.npy", np.array([Bomb()], object), allow_pickle=True)
    assert verdict(tmp_path / "0.npy") == "dtype"


def test_a_parser_makes_a_template_of_a_file_that_reads_another_like_it(parsers, tmp_path):
    samples = values(2, (3, 16))
    for i, sample in enumerate(samples):
        np.save(tmp_path / f"{i}.npy", sample)
    probed = parsers.probe(str(tmp_path / "0.npy"), learn=True)
    template = probed.template
    assert probed.structure.members == (Member(npy.NAME, (3, 16), "<f4", template.offset, "", ""),)
    other = (tmp_path / "1.npy").read_bytes()
    assert other[template.offset : template.offset + template.n_bytes] == samples[1].tobytes()


def test_a_copy_without_its_suffix_is_still_read_as_what_it_is(parsers, tmp_path):
    sample = values(1)[0]
    np.save(tmp_path / "0.npy", sample)
    os.rename(tmp_path / "0.npy", tmp_path / "copy")
    out = np.empty_like(sample)
    schema = Schema("item-per-file", npy.NAME, sample.shape, "<f4")
    path = str(tmp_path / "copy")
    assert parsers.read(path, stamp_of(path), schema, 0, 1, out.data.cast("B")) == []
    assert np.array_equal(out, sample)
