"""The judge of plans: it shares no code with the solvers. ``judge`` replays residences on the cost rows; ``occupancy``,
``flow``, ``groups``, ``offloads``, ``page_locks`` and ``ranks`` are its parts.
"""

from __future__ import annotations
