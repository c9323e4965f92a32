"""One thread that does what it is given, in turn."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

_Job = tuple[Callable[..., None], tuple[Any, ...], "Future[None]"]


class Worker:
    """A thread and its queue. ``close`` ends it once what it was given is done; so does the end of the interpreter.

    [Note: no pool] A ``ThreadPoolExecutor`` starts its thread while it takes a job. A Ctrl-C in the middle of that
    leaves a job that nobody does, or two threads for one queue. Here the thread is there before, and a job is handed
    over by one call that no signal can cut in two.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True)
        self._thread.start()
        # At exit it must not run on while the interpreter is taken down.
        self._end = weakref.finalize(self, _end, self._jobs, self._thread)

    def submit(self, job: Callable[..., None], *args: Any) -> Future[None]:
        """Have ``job(*args)`` done after all that was submitted before."""
        if not self._end.alive:
            raise RuntimeError("a job was given to a thread that has ended")
        done: Future[None] = Future()
        self._jobs.put((job, args, done))
        return done

    def close(self) -> None:
        """Wait until all is done, and end the thread."""
        self._end()


def _work(jobs: SimpleQueue[_Job | None]) -> None:
    while (given := jobs.get()) is not None:
        job, args, done = given
        try:
            job(*args)
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)
        del given, job, args, done  # what is waited for next must not keep it alive


def _end(jobs: SimpleQueue[_Job | None], thread: threading.Thread) -> None:
    jobs.put(None)
    if thread is not threading.current_thread():
        thread.join()
