"""Many reads at one time: when they are, and that nobody can tell from what comes back."""

from __future__ import annotations

import threading

import pytest

from tsclust_ooc import inflight
from tsclust_ooc.inflight import Pace


class Source:
    """Reads that wait for each other: none ends before `together` are under way, or all are that are left."""

    def __init__(self, n: int, together: int = 1) -> None:
        self.n, self.together = n, together
        self.under_way = self.most = self.n_done = 0
        self.changed = threading.Condition()
        self.threads: set[threading.Thread] = set()

    def read(self, item: int) -> int:
        with self.changed:
            self.threads.add(threading.current_thread())
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.most >= self.together, timeout=10)
            self.under_way -= 1
            self.n_done += 1
        return item * item


def pace(slow: bool, monkeypatch, most: int = 64) -> Pace:
    """A pace that has seen a slow source, or a quick one, and tries no more."""
    monkeypatch.setattr(inflight, "SLOW_SECONDS", -1.0 if slow else 1e9)
    made = Pace(most)
    made.each(lambda item: item, range(inflight._TRIAL))
    return made


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("n", [0, 1, 2, 63, 64, 65, 500])
def test_answers_come_in_order_however_they_were_read(slow, n, monkeypatch):
    assert pace(slow, monkeypatch).each(lambda item: item * item, range(n)) == [i * i for i in range(n)]


def test_a_quick_source_is_read_by_the_caller_alone(monkeypatch):
    source = Source(100)
    pace(False, monkeypatch).each(source.read, range(100))
    assert source.threads == {threading.current_thread()}


def test_a_slow_source_is_read_by_many_at_one_time(monkeypatch):
    source = Source(100, together=16)
    assert pace(True, monkeypatch, most=16).each(source.read, range(100)) == [i * i for i in range(100)]
    assert source.most == 16
    assert not any(thread.is_alive() for thread in source.threads - {threading.current_thread()})


def test_what_lies_in_memory_is_read_by_one_caller_at_a_time(monkeypatch):
    monkeypatch.setattr(inflight, "CACHED_SECONDS", 1e9)
    monkeypatch.setattr(inflight, "SLOW_SECONDS", 1e9)
    source, ours, answers = Source(400), Pace(), []
    callers = [threading.Thread(target=lambda: answers.append(ours.each(source.read, range(100)))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert answers == [[i * i for i in range(100)]] * 4
    assert source.most == 1


def test_callers_share_what_may_be_under_way(monkeypatch):
    source, ours = Source(400, together=12), pace(True, monkeypatch, most=16)
    callers = [threading.Thread(target=ours.each, args=(source.read, range(100))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert source.n_done == 400
    assert source.most <= 16 + 8 + 5 + 4


@pytest.mark.parametrize(
    ("waits", "slow"),
    [((0.5, 0.5, 0.5, 0.5, 0.5), True), ((0, 0, 0.5, 0.5, 0.5), True), ((0, 0, 0, 0.5, 0.5), False), ((0,) * 5, False)],
)
def test_what_decides_is_how_long_most_reads_of_a_trial_waited(waits, slow, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(inflight.time, "perf_counter", lambda: now[0])
    ours = Pace()

    def read(wait):
        now[0] += wait
        return threading.current_thread()

    assert set(ours.each(read, waits)) == {threading.current_thread()}
    threads = set(ours.each(read, [0] * 20))
    assert (threads != {threading.current_thread()}) == slow


def test_time_that_is_spent_computing_is_no_wait(monkeypatch):
    now = [0.0]
    for clock in ("perf_counter", "thread_time"):
        monkeypatch.setattr(inflight.time, clock, lambda: now[0])
    ours = Pace()

    def work(item):
        now[0] += 10
        return threading.current_thread()

    ours.each(work, range(5))
    assert set(ours.each(work, range(20))) == {threading.current_thread()}


def test_a_source_that_gets_quick_again_is_noticed(monkeypatch):
    ours = pace(True, monkeypatch)
    monkeypatch.setattr(inflight, "SLOW_SECONDS", 1e9)
    threads = [set(ours.each(lambda item: threading.current_thread(), range(40))) for _ in range(20)]
    alone = [some == {threading.current_thread()} for some in threads]
    assert not alone[0]
    assert alone == sorted(alone)
    assert alone[-1]


@pytest.mark.parametrize("slow", [False, True])
def test_what_the_first_read_to_fail_raises_ends_it_and_no_thread_stays(slow, monkeypatch):
    ours, read = pace(slow, monkeypatch, most=4), []

    def fail_at_ten(item):
        read.append(item)
        if item == 10:
            raise LookupError("ten")

    before = threading.active_count()
    with pytest.raises(LookupError, match="ten"):
        ours.each(fail_at_ten, range(100_000))
    assert len(read) < 100_000
    assert threading.active_count() == before
