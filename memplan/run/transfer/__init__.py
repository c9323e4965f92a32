"""Bringing bytes: ``transfer`` is the interface and what the CPU does behind it, ``streams`` what a device with streams
does, ``device`` what is asked of a GPU, ``worker`` the thread, ``lock`` and ``interrupts`` keep states whole.
"""

from __future__ import annotations
