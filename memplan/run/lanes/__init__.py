"""The micro-batches of an optimizer step pass each block one after another, so that they share its loads.

``accumulate`` is what a handle calls: it cuts micro-batches into groups, and goes one by one where it must, which
``habits`` tell of a pass, and ``hooked`` of what its hooks keep. A group's micro-batches have a ``lane`` (a thread)
each and take ``turns``; ``inherited`` is what a thread has of its own and a lane takes over; ``gradient_order`` keeps
sums of gradients what they are one by one, ``device_numbers`` a device's random numbers.
"""

from __future__ import annotations
