"""One thread that does what it is given, in turn."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

_LOOK_S = 0.25
"""How often who waits looks by himself: another who waited may have been interrupted with the lock in hand."""


class Job:
    """Something that one thread does and others may wait for.

    [Note: waiting and Ctrl-C] A ``concurrent.futures.Future`` is waited for under a lock that Python code takes. A
    Ctrl-C just then leaves it taken, and the thread that does the job waits for ever to say that it is done. Here that
    thread waits for nobody.
    """

    __slots__ = ("_call", "_error", "_finished", "_lock")

    def __init__(self, call: Callable[..., None], *args: Any) -> None:
        self._call: tuple[Callable[..., None], tuple[Any, ...]] | None = (call, args)
        self._error: BaseException | None = None
        self._finished = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def run(self) -> None:
        """Do it. Once only; what it raises is kept for who waits."""
        assert self._call is not None
        call, args = self._call
        self._call = None  # what it was about must not be kept alive by who waits
        try:
            call(*args)
        except BaseException as error:
            self._error = error
        self._finished = True
        self._lock.release()

    def done(self) -> bool:
        """Whether it was done, or has failed."""
        return self._finished

    def wait(self, timeout_s: float = float("inf")) -> bool:
        """Return whether it was done within so many seconds."""
        end = time.monotonic() + timeout_s
        while not self._finished:
            left = min(_LOOK_S, end - time.monotonic())
            if left <= 0:
                return False
            if self._lock.acquire(timeout=left):
                self._lock.release()  # for the next who waits
        return True

    def result(self) -> None:
        """Wait until it is done. Raises what it raised."""
        self.wait()
        if self._error is not None:
            raise self._error


class Worker:
    """A thread and its queue. ``close`` ends it once what it was given is done; so does the end of the interpreter.

    [Note: no pool] A ``ThreadPoolExecutor`` starts its thread while it takes a job. A Ctrl-C in the middle of that
    leaves a job that nobody does, or two threads for one queue. Here the thread is there before, and a job is handed
    over by one call that no signal can cut in two.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True)
        self._thread.start()
        # At exit it must not run on while the interpreter is taken down.
        self._end = weakref.finalize(self, _end, self._jobs, self._thread)

    def submit(self, call: Callable[..., None], *args: Any) -> Job:
        """Have ``call(*args)`` done after all that was submitted before."""
        if not self._end.alive:
            raise RuntimeError("a job was given to a thread that has ended")
        job = Job(call, *args)
        self._jobs.put(job)
        return job

    def close(self) -> None:
        """Wait until all is done, and end the thread."""
        self._end()


def _work(jobs: SimpleQueue[Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job.run()
        del job  # what is waited for next must not keep it alive


def _end(jobs: SimpleQueue[Job | None], thread: threading.Thread) -> None:
    jobs.put(None)
    if thread is not threading.current_thread():
        thread.join()
