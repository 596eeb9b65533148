"""Worker threads that never hold up the end of the process.

``concurrent.futures`` joins its threads at interpreter exit, so an interrupt would wait for every download in progress;
these threads are daemons. Work may be submitted while results are read.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

_STOP_SECONDS = 2.0


class WorkerPool:
    """Runs jobs on a fixed number of threads and hands their results to one reader.

    Args:
        workers (int): number of threads.
    """

    def __init__(self, workers: int) -> None:
        self._jobs: queue.SimpleQueue[tuple[Any, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[Any, Any, BaseException | None]] = queue.SimpleQueue()
        self._open = 0
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, key: Any, job: Callable[[], Any]) -> None:
        """Queue a job; only the reader's thread may call it.

        Args:
            key (Any): names the job in the results.
            job (Callable[[], Any]): called without arguments in a worker thread.
        """
        self._open += 1
        self._jobs.put((key, job))

    def results(self) -> Iterator[tuple[Any, Any, BaseException | None]]:
        """Key, value and exception of each job as it ends, until no job is left."""
        while self._open:
            result = self._done.get()
            self._open -= 1
            yield result

    def stop(self) -> None:
        """Drop queued jobs and wait a moment for the running ones."""
        self._stopped.set()
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + _STOP_SECONDS
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))

    def _work(self) -> None:
        while (entry := self._jobs.get()) is not None and not self._stopped.is_set():
            key, job = entry
            try:
                self._done.put((key, job(), None))
            except BaseException as error:  # noqa: BLE001 - handed to the reader, who decides
                self._done.put((key, None, error))
