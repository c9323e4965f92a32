"""Measuring this machine: ``current`` keeps what ``measure`` finds, of a device (``cpu``,
``cuda``), a ``step`` and the ``disk``, by the clock of ``rates``.
"""

from __future__ import annotations
