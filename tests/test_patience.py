"""What fails in passing is tried again, what does not is not; both are told."""

from __future__ import annotations

import errno
import threading

import pytest

from tsclust_ooc.patience import PASSING, TRIES, Patience


def impatient(tries: int = TRIES) -> Patience:
    return Patience(tries, first_wait_seconds=0.0)


class Failing:
    """Fails with the numbers given, one a call, then gives what it was called with."""

    def __init__(self, *numbers: int) -> None:
        self.numbers, self.n_calls = list(numbers), 0

    def __call__(self, *args, **kwargs):
        self.n_calls += 1
        if self.numbers:
            number = self.numbers.pop(0)
            raise OSError(number, "as a server says it", "/far/0.h5")
        return args, kwargs


@pytest.mark.parametrize("number", sorted(PASSING), ids=lambda n: errno.errorcode[n])
def test_what_fails_in_passing_is_tried_again_and_counted(number):
    patience, read = impatient(), Failing(number, number)
    assert patience.call(read, 1, two=2) == ((1,), {"two": 2})
    assert (read.n_calls, patience.n_retries) == (3, 2)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOSPC, errno.EISDIR, errno.ELOOP])
def test_what_will_fail_again_is_raised_at_once_as_it_is(number):
    patience, read = impatient(), Failing(number)
    with pytest.raises(OSError, match="as a server says it") as caught:
        patience.call(read)
    assert (caught.value.errno, caught.value.filename, caught.value.strerror) == (
        number, "/far/0.h5", "as a server says it",
    )  # fmt: skip
    assert (read.n_calls, patience.n_retries) == (1, 0)


def test_an_error_without_a_number_and_other_exceptions_are_raised_at_once():
    for error in (OSError("no number"), ValueError("no system call")):
        calls = []

        def read(error=error, calls=calls):
            calls.append(1)
            raise error

        with pytest.raises(type(error), match=str(error)):
            impatient().call(read)
        assert len(calls) == 1


@pytest.mark.parametrize(("tries", "said"), [(5, "5 tries"), (2, "2 tries"), (1, "1 try")])
def test_the_last_error_says_which_it_was_and_how_often_it_was_tried(tries, said):
    patience, read = impatient(tries), Failing(*[errno.ESTALE] * 9)
    with pytest.raises(OSError, match="as a server says it") as caught:
        patience.call(read)
    assert (caught.value.errno, caught.value.filename) == (errno.ESTALE, "/far/0.h5")
    assert caught.value.strerror == f"as a server says it (ESTALE, {said})"
    assert (read.n_calls, patience.n_retries) == (tries, tries - 1)


def test_a_source_that_is_gone_altogether_is_not_waited_for_again_and_again():
    patience = impatient()

    def tries_of(read):
        with pytest.raises(OSError, match="EIO"):
            patience.call(read)
        return read.n_calls

    assert [tries_of(Failing(*[errno.EIO] * 9)) for _ in range(22)] == [TRIES] * 20 + [1, 1]
    assert patience.n_retries == 20 * (TRIES - 1)
    patience.call(Failing())  # it is back
    assert tries_of(Failing(*[errno.EIO] * 9)) == TRIES


def test_files_that_are_bad_among_good_ones_all_get_their_tries():
    patience = impatient(3)
    for _ in range(30):
        bad = Failing(*[errno.EIO] * 9)
        with pytest.raises(OSError, match="3 tries"):
            patience.call(bad)
        assert bad.n_calls == 3
        patience.call(Failing())


def test_it_waits_longer_and_longer_and_not_for_ever(monkeypatch):
    waits = []
    monkeypatch.setattr("tsclust_ooc.patience.time.sleep", waits.append)
    with pytest.raises(OSError, match="5 tries"):
        Patience().call(Failing(*[errno.EIO] * 9))
    assert len(waits) == 4
    for wait, mean in zip(waits, (0.05, 0.2, 0.8, 3.2), strict=True):
        assert mean / 2 <= wait <= mean * 1.5


def test_tries_of_many_threads_and_of_other_processes_are_all_counted():
    patience = impatient()

    def work():
        for _ in range(200):
            patience.call(Failing(errno.EIO))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    patience.add(7)
    assert patience.n_retries == 8 * 200 + 7
