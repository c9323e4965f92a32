"""Plan -> training step.

``attach`` puts a plan to work and ``handle`` is what the user holds; ``tiers`` is where its blocks lie and ``runtime``
what serves it there; ``recovery`` does a micro-batch again, ``agreement`` is what ranks compare before. A block's bytes
go from ``memory`` (homes, arenas) by ``transfer`` as ``schedule`` says, when ``modules``' hooks announce an access;
``access`` serves reads that nothing announces; ``lanes`` have micro-batches take turns at each block; ``verify`` looks
whether all that is so.
"""

from __future__ import annotations
