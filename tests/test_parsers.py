"""Parser processes: one that crashes or hangs costs the file it was given, and none is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from sources import ITEM, KEY, values, write_shard

from tsclust_ooc.shards.parsers import Parsers
from tsclust_ooc.shards.schema import Schema, ShardError
from tsclust_ooc.shards.templates import stamp_of

SCHEMA = Schema("item-per-file", KEY, ITEM, "<f4")


def children() -> set[int]:
    """Processes that this one started and has not reaped."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread may end while we look
            found |= set(map(int, (task / "children").read_text().split()))
    return found


@pytest.fixture
def shard(tmp_path) -> Path:
    write_shard(tmp_path / "0.h5", values(1)[0])
    return tmp_path / "0.h5"


@pytest.fixture(scope="module")
def parsers():
    with Parsers(1) as one:
        yield one


def read(parsers: Parsers, path: Path, stamp: tuple[int, int] | None = None, schema: Schema = SCHEMA) -> np.ndarray:
    out = np.empty((1, *ITEM), schema.dtype)
    parsers.read(str(path), stamp or stamp_of(path), schema, 0, 1, out.data.cast("B"))
    return out[0]


def test_a_parser_reads_what_was_written(parsers, shard):
    found = parsers.probe(str(shard))
    assert found.template is None
    assert [(m.name, m.shape, m.dtype, m.code) for m in found.structure.members] == [(KEY, ITEM, "<f4", "")]
    assert np.array_equal(read(parsers, shard), values(1)[0])


def test_a_template_comes_only_when_it_is_asked_for(parsers, shard):
    template = parsers.probe(str(shard), learn=True).template
    assert template is not None
    assert template.shape == ITEM


@pytest.mark.parametrize(("data", "code"), [(b"", "empty-file"), (b"0.1,0.2\n" * 99, "not-hdf5"), (None, "unreadable")])
def test_a_problem_is_an_answer_and_the_parser_lives_on(parsers, shard, tmp_path, data, code):
    parsers.warm_up()
    before = children()
    if data is not None:
        (tmp_path / "bad.h5").write_bytes(data)
    with pytest.raises(ShardError) as caught:
        parsers.probe(str(tmp_path / "bad.h5"))
    assert caught.value.problem.code == code
    assert np.array_equal(read(parsers, shard), values(1)[0])
    assert children() == before


def test_a_file_that_changed_since_the_survey_is_unstable(parsers, shard):
    size, mtime_ns = stamp_of(shard)
    with pytest.raises(ShardError) as caught:
        read(parsers, shard, (size, mtime_ns - 1))
    assert caught.value.problem.code == "unstable"


def test_names_that_are_not_utf8_travel_to_the_parser(parsers, tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n 1.h5"))
    write_shard(tmp_path / "0.h5", values(1)[0])
    os.rename(tmp_path / "0.h5", path)
    assert np.array_equal(read(parsers, path), values(1)[0])


def test_a_parser_that_dies_during_a_request_costs_that_file_alone(shard):
    before = children()
    with Parsers(1) as parsers:
        parsers.warm_up()
        (pid,) = children() - before
        os.kill(pid, signal.SIGSTOP)  # so that the request is surely under way when the parser dies
        killer = threading.Timer(0.1, os.kill, (pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(ShardError) as caught:
            read(parsers, shard)
        killer.join()
        assert caught.value.problem.code == "parser-crash"
        assert "signal 9" in caught.value.problem.detail
        assert np.array_equal(read(parsers, shard), values(1)[0])
    assert children() == before


def test_a_parser_that_is_dead_before_the_request_is_replaced(shard):
    before = children()
    with Parsers(1) as parsers:
        read(parsers, shard)
        (pid,) = children() - before
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert np.array_equal(read(parsers, shard), values(1)[0])


def test_a_parser_that_does_not_answer_is_ended_at_the_deadline(shard):
    before = children()
    with Parsers(1, deadline_seconds=30) as parsers:
        read(parsers, shard)
        (pid,) = children() - before
        os.kill(pid, signal.SIGSTOP)
        parsers._deadline = 0.1
        with pytest.raises(ShardError) as caught:
            read(parsers, shard)
        assert caught.value.problem.code == "timeout"
        parsers._deadline = 30
        assert np.array_equal(read(parsers, shard), values(1)[0])
        assert pid not in children()
    assert children() == before


def test_many_threads_share_a_few_parsers(tmp_path):
    samples = values(40)
    for i, sample in enumerate(samples):
        write_shard(tmp_path / f"{i}.h5", sample)
    before, got = children(), {}
    with Parsers(2) as parsers:
        threads = [
            threading.Thread(target=lambda i=i: got.update({i: read(parsers, tmp_path / f"{i}.h5")})) for i in range(40)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 1 <= len(children() - before) <= 2
    assert np.array_equal(np.stack([got[i] for i in range(40)]), samples)
    assert children() == before


def test_no_parser_starts_before_it_is_needed():
    before = children()
    with Parsers(4):
        assert children() == before


def test_files_with_damaged_metadata_get_a_code_and_harm_nobody_else(parsers, shard, tmp_path):
    whole, rng = shard.read_bytes(), np.random.default_rng(0)
    offset, bad = whole.index(values(1)[0].tobytes()), tmp_path / "bad.h5"
    codes = set()
    for _ in range(150):
        damaged = bytearray(whole)
        for at in rng.integers(8, min(offset, 1200), 3):
            damaged[at] ^= int(rng.integers(1, 256))
        bad.write_bytes(damaged)
        try:
            codes.update(m.code for m in parsers.probe(str(bad)).structure.members)
        except ShardError as error:
            codes.add(error.problem.code)
    assert "corrupt" in codes
    assert np.array_equal(read(parsers, shard), values(1)[0])
