"""Bringing bytes: ``transfer`` is the interface and its two implementations, ``worker`` the thread, ``lock`` and
``interrupts`` keep states whole.
"""

from __future__ import annotations
