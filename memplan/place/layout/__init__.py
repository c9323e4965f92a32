"""Layouts: which blocks leave the device and where what comes back lies.

``layout`` is the general form, ``ring_layout`` how most are made; ``elastic`` (room that activations leave),
``offload`` (saved activations), ``page_lock`` (which RAM is pinned) and ``split`` (blocks in pieces) are parts of one.
"""

from __future__ import annotations
