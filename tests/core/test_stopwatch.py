"""Adding up the time of stages."""

import threading

import pytest

from library.core.stopwatch import Stopwatch


def test_stages_add_up_and_overlap(monkeypatch):
    now = iter([0.0, 1.0, 4.0, 10.0, 12.0, 20.0])  # outer begins, inner 1..4, inner 10..12, outer ends
    monkeypatch.setattr("library.core.stopwatch.time.perf_counter", lambda: next(now))
    watch = Stopwatch()
    with watch.time("outer"):
        for _ in range(2):
            with watch.time("inner"):
                pass
    assert watch.seconds("inner") == 5.0
    assert watch.seconds("outer") == 20.0
    assert watch.seconds("never") == 0


def test_a_stage_that_fails_counts():
    watch = Stopwatch()
    with pytest.raises(ValueError, match="no"), watch.time("stage"):
        raise ValueError("no")
    assert watch.seconds("stage") > 0


def test_threads_may_time_the_same_stage():
    watch, start = Stopwatch(), threading.Barrier(4)

    def work():
        start.wait()
        for _ in range(200):
            with watch.time("stage"):
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < watch.seconds("stage") < 60
