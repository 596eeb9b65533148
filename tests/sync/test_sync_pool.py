from __future__ import annotations

import threading
import time

import pytest

from hub_router.sync.pool import WorkerPool


def test_results_and_errors_come_with_their_keys_and_work_may_follow_work() -> None:
    pool = WorkerPool(3)
    for number in range(10):
        pool.submit(("first", number), lambda number=number: 1 // (number % 5))
    seen: dict[object, object] = {}
    for key, value, error in pool.results():
        seen[key] = value if error is None else type(error)
        if key[0] == "first" and error is None:
            pool.submit(("second", key[1]), lambda value=value: value + 100)
    pool.stop()
    assert {key: value for key, value in seen.items() if key[0] == "first"} == {  # type: ignore[index]
        ("first", number): 1 // (number % 5) if number % 5 else ZeroDivisionError for number in range(10)
    }
    assert sum(key[0] == "second" for key in seen) == 8  # type: ignore[index]


def test_jobs_run_side_by_side() -> None:
    pool, barrier = WorkerPool(4), threading.Barrier(4, timeout=10)
    for number in range(4):
        pool.submit(number, barrier.wait)
    assert sorted(value for _, value, _ in pool.results()) == [0, 1, 2, 3]
    pool.stop()


def test_stop_drops_queued_jobs_and_does_not_wait_for_a_stuck_one() -> None:
    pool, release, ran = WorkerPool(1), threading.Event(), []
    pool.submit("stuck", lambda: release.wait(60))
    pool.submit("queued", lambda: ran.append(1))
    time.sleep(0.05)
    began = time.monotonic()
    pool.stop()
    assert time.monotonic() - began < 5
    release.set()
    time.sleep(0.05)
    assert ran == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_every_exception_of_a_job_reaches_the_reader(error: type[BaseException]) -> None:
    pool = WorkerPool(1)

    def job() -> None:
        raise error

    pool.submit("a", job)
    pool.submit("b", lambda: 2)
    results = {key: (value, type(raised)) for key, value, raised in pool.results()}
    assert results == {"a": (None, error), "b": (2, type(None))}
    pool.stop()
