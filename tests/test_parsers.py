"""Parser processes: one that crashes or hangs costs the file it was given, and none is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from sources import ITEM, KEY, values, write_shard

from tsclust_ooc.patience import Patience
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


def the_parser(before: set[int], but: int = 0) -> int:
    """The process id of the one parser, once there is one that is not `but`."""
    while not (new := children() - before - {but}):
        time.sleep(0.001)
    return new.pop()


def end(pid: int, number: int, after_seconds: float = 0.1) -> threading.Thread:
    """Stop a parser, so that the next request is surely under way when signal `number` ends it."""
    os.kill(pid, signal.SIGSTOP)
    ender = threading.Timer(after_seconds, lambda: (os.kill(pid, number), os.kill(pid, signal.SIGCONT)))
    ender.start()
    return ender


def test_a_parser_that_dies_during_a_request_costs_that_file_alone(shard):
    before = children()
    with Parsers(1) as parsers:
        parsers.warm_up()
        ender = end(the_parser(before), signal.SIGSEGV)
        with pytest.raises(ShardError) as caught:
            read(parsers, shard)
        ender.join()
        assert (caught.value.problem.code, "signal 11" in caught.value.problem.detail) == ("parser-crash", True)
        assert np.array_equal(read(parsers, shard), values(1)[0])
    assert children() == before


def test_a_parser_that_is_killed_from_outside_is_no_fault_of_the_file(shard):
    before = children()
    with Parsers(1) as parsers:
        parsers.warm_up()
        ender = end(the_parser(before), signal.SIGKILL)
        assert np.array_equal(read(parsers, shard), values(1)[0])
        ender.join()
    assert children() == before


def test_a_file_whose_parsers_are_killed_twice_is_given_up(shard):
    before = children()
    with Parsers(1) as parsers:
        parsers.warm_up()
        first = the_parser(before)
        ender = end(first, signal.SIGKILL)

        def kill_the_next() -> None:
            os.kill(the_parser(before, but=first), signal.SIGKILL)  # it takes a while to import

        killer = threading.Thread(target=kill_the_next)
        killer.start()
        with pytest.raises(ShardError) as caught:
            read(parsers, shard)
        ender.join()
        killer.join()
        assert (caught.value.problem.code, "signal 9" in caught.value.problem.detail) == ("parser-crash", True)
        assert np.array_equal(read(parsers, shard), values(1)[0])
    assert children() == before


def test_what_the_disk_fails_at_is_tried_again_and_counted():
    patience = Patience(tries=3)
    with Parsers(1, patience=patience) as parsers:
        with pytest.raises(ShardError) as caught:
            parsers.probe("/proc/self/mem")  # a regular file whose first byte is always an input/output error
        assert caught.value.problem.code == "unreadable"
        assert "Input/output error (EIO" in caught.value.problem.detail
        assert patience.n_retries == 2


def test_what_will_not_pass_is_not_tried_again(parsers, tmp_path):
    before = parsers.patience.n_retries
    with pytest.raises(ShardError, match=r"No such file or directory \(ENOENT\)"):
        parsers.probe(str(tmp_path / "none.h5"))
    assert parsers.patience.n_retries == before


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


def test_a_file_that_is_read_in_pieces_goes_to_the_parser_that_has_it_open(tmp_path):
    samples = values(90, (64,))
    for i in range(3):
        write_shard(tmp_path / f"{i}.h5", samples[30 * i : 30 * i + 30], chunks=(16, 64), compression="gzip")
    schema, got = Schema("rows-per-file", KEY, (64,), "<f4"), np.empty_like(samples)
    with Parsers(3) as parsers:
        for start in (0, 7, 23):
            stop = {0: 7, 7: 23, 23: 30}[start]
            for i in range(3):
                path = tmp_path / f"{i}.h5"
                out = got[30 * i + start : 30 * i + stop].data.cast("B")
                assert parsers.read(str(path), stamp_of(path), schema, start, stop, out) == []
        assert np.array_equal(got, samples)
        assert sorted(parser.path for parser in parsers._free) == ["", "", str(tmp_path / "2.h5")]


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
