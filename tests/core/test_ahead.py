"""Threads change the speed of work, never its results, and their failures reach the caller."""

import threading
import time

import pytest

from library.core.ahead import Behind, map_ahead


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_come_in_order_whatever_the_threads(threads):
    def work(number):
        time.sleep(0.002 * (number % 3))
        return number * number

    assert list(map_ahead(work, range(20), threads=threads, ahead=4)) == [n * n for n in range(20)]


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_no_more_is_begun_than_asked_for(ahead):
    begun = []
    results = map_ahead(lambda n: begun.append(n), range(100), threads=2, ahead=ahead)
    next(results)
    time.sleep(0.05)
    assert len(begun) <= ahead + 1
    results.close()


@pytest.mark.parametrize("threads", [0, 2])
def test_a_failure_comes_where_its_result_would_have_come(threads):
    def work(number):
        if number == 3:
            raise ValueError("three")
        return number

    results = map_ahead(work, range(10), threads=threads, ahead=8)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)


def test_closing_ends_the_threads():
    before = threading.active_count()
    results = map_ahead(lambda n: n, range(1000), threads=4, ahead=8)
    next(results)
    results.close()
    assert threading.active_count() == before


def test_calls_behind_run_in_order_and_are_done_at_the_end():
    done = []
    with Behind(limit=2) as behind:
        for number in range(10):
            behind.submit(lambda n=number: done.append(n))
    assert done == list(range(10))


def test_a_failing_call_behind_is_raised_to_the_caller():
    def fail():
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"), Behind(limit=8) as behind:
        behind.submit(fail)
    with pytest.raises(OSError, match="disk"), Behind(limit=0) as behind:
        behind.submit(fail)
        pytest.fail("with a limit of 0 the failure is raised by submit itself")
