"""Blocks: ``blocks`` and ``experts`` find them by structure, ``assemble`` makes the graph's rows of two traces,
``optimizers`` count an optimizer's state, ``measure`` times accesses on the device.
"""

from __future__ import annotations
