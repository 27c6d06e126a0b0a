"""The template proof: what it accepts reads exactly as HDF5 reads it, all else it leaves to HDF5."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sources import KEY, read_shard, values, write_shard

from tsclust_ooc.shards.child import probe
from tsclust_ooc.shards.schema import ShardError
from tsclust_ooc.shards.templates import Matcher, Template, matchers, stamp_of

MASKS = (0x01, 0x80, 0xFF)


def learn(path: Path) -> Template | None:
    found = probe(str(path), learn=True)["template"]
    return None if found is None else Template(**found)


def through(matcher: Matcher, path: Path, start: int = 0, stop: int | None = None) -> bytes | None:
    """What the fast path reads (bytes `start` to `stop` of the data), None when it refuses."""
    stop = matcher.template.n_bytes if stop is None else stop
    out = bytearray(stop - start)
    equal = matcher.read_into(str(path), stamp_of(path), memoryview(out), start)
    return bytes(out) if equal else None


@pytest.fixture
def shard(tmp_path) -> Path:
    write_shard(tmp_path / "0.h5", values(1)[0])
    return tmp_path / "0.h5"


@pytest.fixture
def matcher(shard) -> Matcher:
    template = learn(shard)
    assert template is not None
    return Matcher(template)


def test_a_plain_shard_teaches_where_its_data_lie(shard, matcher):
    with h5py.File(shard) as file:
        assert matcher.template.offset == file[KEY].id.get_offset()
    assert (matcher.template.member, matcher.template.shape, matcher.template.dtype) == (KEY, (3, 16), "<f4")


def test_another_shard_of_the_same_program_reads_as_h5py_reads_it(tmp_path, matcher):
    for i, sample in enumerate(values(5, seed=1)):
        path = tmp_path / f"other{i}.h5"
        write_shard(path, sample)
        assert matcher.metadata_equal(str(path))
        assert through(matcher, path) == read_shard(path).tobytes()


@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_no_changed_byte_outside_the_data_is_ever_accepted(tmp_path, libver):
    path = tmp_path / "0.h5"
    with h5py.File(path, "w", libver=libver) as file:
        file[KEY] = values(1)[0]
    template = learn(path)
    assert template is not None
    matcher, whole = Matcher(template), path.read_bytes()
    data = range(template.offset, template.offset + template.n_bytes)
    fd = os.open(path, os.O_RDWR)
    for at in (i for i in range(len(whole)) if i not in data):
        for mask in MASKS:
            os.pwrite(fd, bytes([whole[at] ^ mask]), at)
            assert not matcher.metadata_equal(str(path)), (at, mask)
            assert through(matcher, path) is None, (at, mask)
        os.pwrite(fd, whole[at : at + 1], at)
    os.close(fd)
    assert path.read_bytes() == whole


def test_every_changed_byte_of_the_data_is_read_as_h5py_reads_it(shard, matcher):
    whole = bytearray(shard.read_bytes())
    for at in range(matcher.template.offset, matcher.template.offset + matcher.template.n_bytes, 7):
        whole[at] ^= 0xA5
        shard.write_bytes(whole)
        assert through(matcher, shard) == read_shard(shard).tobytes()


@pytest.mark.parametrize("n", [1, 512])
def test_a_longer_or_a_shorter_file_is_not_accepted(shard, matcher, n):
    whole = shard.read_bytes()
    for data in (whole + bytes(n), whole[:-n], b""):
        shard.write_bytes(data)
        assert through(matcher, shard) is None
    assert set(matchers((matcher.template,))) == {len(whole)}


@pytest.mark.parametrize("change", ["mtime", "size"])
def test_a_file_that_changed_since_the_survey_is_unstable(shard, matcher, change):
    stamp = stamp_of(shard)
    if change == "mtime":
        os.utime(shard, ns=(stamp[1] + 1, stamp[1] + 1))
    else:
        shard.write_bytes(shard.read_bytes() + b"x")
        os.utime(shard, ns=(stamp[1], stamp[1]))
    with pytest.raises(ShardError) as caught:
        matcher.read_into(str(shard), stamp, memoryview(bytearray(matcher.template.n_bytes)), 0)
    assert caught.value.problem.code == "unstable"


@pytest.mark.parametrize("limit", [1, 100, 2000, 2100])
def test_short_reads_give_the_same_data(shard, matcher, monkeypatch, limit):
    real = os.preadv

    def short(fd, buffers, offset):
        kept, left = [], limit
        for buffer in buffers:
            kept.append(memoryview(buffer)[:left])
            left -= len(kept[-1])
        return real(fd, kept, offset)

    monkeypatch.setattr(os, "preadv", short)
    assert through(matcher, shard) == read_shard(shard).tobytes()
    assert through(matcher, shard, 64, 128) == read_shard(shard).tobytes()[64:128]


@pytest.mark.parametrize("at", [60, 1990])
def test_a_short_read_never_lets_changed_metadata_through(shard, matcher, monkeypatch, at):
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real(fd, [memoryview(buffers[0])[:50]], at))
    assert through(matcher, shard) == read_shard(shard).tobytes()
    whole = bytearray(shard.read_bytes())
    assert at < matcher.template.offset
    whole[at] ^= 1
    shard.write_bytes(whole)
    assert through(matcher, shard) is None


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 39), (1, 40), (13, 14), (39, 40), (0, 40)])
def test_parts_of_a_shard_of_rows_equal_h5py(tmp_path, start, stop):
    write_shard(tmp_path / "rows.h5", values(40, (16,)))
    template = learn(tmp_path / "rows.h5")
    assert template is not None
    got = through(Matcher(template), tmp_path / "rows.h5", start * 64, stop * 64)
    with h5py.File(tmp_path / "rows.h5") as file:
        assert got == file[KEY][start:stop].tobytes()


@pytest.mark.parametrize(
    "options",
    [{"chunks": (1, 16)}, {"chunks": (3, 16), "compression": "gzip"}, {"chunks": (3, 16), "fletcher32": True}],
)
def test_chunked_data_make_no_template(tmp_path, options):
    write_shard(tmp_path / "0.h5", values(1)[0], **options)
    assert learn(tmp_path / "0.h5") is None


def test_data_inside_the_object_header_make_no_template(tmp_path):
    with h5py.File(tmp_path / "0.h5", "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple((3, 16))
        dataset = h5py.h5d.create(file.id, KEY.encode(), h5py.h5t.IEEE_F32LE, space, plist)
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, values(1)[0])
    assert learn(tmp_path / "0.h5") is None


def test_a_file_with_bytes_after_its_end_makes_no_template(shard):
    shard.write_bytes(shard.read_bytes() + b"more")
    assert learn(shard) is None


def two_datasets(path: Path, first: np.ndarray, second: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file["left"], file["right"] = first, second


def test_of_two_datasets_only_the_data_of_one_may_differ(tmp_path):
    left, right = values(2, (8, 16))[0], values(1)[0]
    two_datasets(tmp_path / "0.h5", left, right)
    template = learn(tmp_path / "0.h5")
    assert template is not None
    assert template.member == "left"
    two_datasets(tmp_path / "same.h5", left + 1, right)
    two_datasets(tmp_path / "other.h5", left + 1, right + 1)
    assert through(Matcher(template), tmp_path / "same.h5") == (left + 1).tobytes()
    assert through(Matcher(template), tmp_path / "other.h5") is None


def test_a_region_with_metadata_inside_is_not_learned(tmp_path):
    """Make the layout message point the data over the local heap, where the name of the dataset lies."""
    path = tmp_path / "0.h5"
    write_shard(path, values(1)[0])
    whole = bytearray(path.read_bytes())
    with h5py.File(path) as file:
        offset = file[KEY].id.get_offset()
    where = whole.index(struct.pack("<QQ", offset, 3 * 16 * 4))  # address and size, side by side in the message
    heap = whole.index(b"HEAP")
    whole[where : where + 8] = (heap - 32).to_bytes(8, "little")
    path.write_bytes(whole)
    with h5py.File(path) as file:
        assert file[KEY].id.get_offset() == heap - 32  # HDF5 itself reads it without a word
    assert learn(path) is None


def _contiguous(path: Path, attributes: int, before: int) -> None:
    with h5py.File(path, "w") as file:
        for i in range(before):
            file[f"a{i}"] = np.arange(i + 3, dtype="i4")
        file[KEY] = values(1)[0]
        for i in range(attributes):
            file[KEY].attrs[f"note{i}"] = "x" * 40


@pytest.mark.parametrize(
    ("attributes", "before"), [(0, 0), (12, 0), (3, 2)]
)  # fmt: skip
def test_whatever_byte_changes_the_fast_path_reads_what_h5py_reads_or_nothing(tmp_path_factory, attributes, before):
    path = tmp_path_factory.mktemp("any") / "0.h5"
    _contiguous(path, attributes, before)
    template = learn(path)
    assert template is not None
    matcher, whole = Matcher(template), path.read_bytes()
    assert through(matcher, path) == read_shard(path).tobytes()
    fd = os.open(path, os.O_RDWR)

    @settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(at=st.integers(0, len(whole) - 1), byte=st.integers(0, 255), piece=st.booleans())
    def check(at, byte, piece):
        os.pwrite(fd, bytes([byte]), at)
        stop = 64 if piece else None  # the two ways in which data are read
        fast, first = through(matcher, path, 0, stop), matcher.metadata_equal(str(path))
        in_data = template.offset <= at < template.offset + template.n_bytes
        assert (fast is not None) == first == (in_data or byte == whole[at])
        if fast is not None:
            assert fast == read_shard(path).tobytes()[:stop]
        os.pwrite(fd, whole[at : at + 1], at)

    check()
    os.close(fd)
