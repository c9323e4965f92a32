"""Measuring this machine: ``current`` keeps what ``measure`` finds, of a device (``cpu``, ``cuda``), a ``step`` and the ``disk``."""

from __future__ import annotations
