"""Bringing bytes: ``transfer`` is the interface and its two implementations, ``device`` what is asked of a GPU,
``worker`` the thread, ``lock`` and ``interrupts`` keep states whole.
"""

from __future__ import annotations
