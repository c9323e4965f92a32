"""The lock under which a run's state changes, in whichever thread autograd runs in."""

from __future__ import annotations

import threading
from collections.abc import Callable

from memplan.errors import MemplanError, TransferError


class Lock:
    """A lock that may be taken again by who has it. What raised under it is mended by who takes it next.

    [Note: half done] An error, or a Ctrl-C in a notebook, may come between the start of a load and the note of it;
    where training goes on then, that load must not write to what has come into its slot since. Nor may what a load that
    failed has left on its way: one that comes too late, or the first pieces of one that a disk cut short (of a
    GPU they wait in a stream).
    """

    def __init__(self, mend: Callable[[], None]) -> None:
        self._lock = threading.RLock()
        self.mend: Callable[[], None] | None = mend
        self._torn = False

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._torn and self.mend is not None:
            self._torn = False  # first: what mends may take the lock itself
            try:
                self.mend()
            except BaseException:
                self._torn = True
                self._lock.release()
                raise

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is not None and (issubclass(kind, TransferError) or not issubclass(kind, MemplanError)):
            self._torn = True  # else it was refused: nothing has changed
        self._lock.release()
