"""What a test leaves behind that was not there before it: threads that others left may end meanwhile."""

from __future__ import annotations

import threading


def threads() -> frozenset[threading.Thread]:
    """Return the threads that are alive."""
    return frozenset(threading.enumerate())


def started_since(before: frozenset[threading.Thread]) -> frozenset[threading.Thread]:
    """Return the threads that are alive and were not ``before``."""
    return threads() - before
