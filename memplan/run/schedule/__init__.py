"""When bytes move. ``conductor`` is what triggers call; ``position`` knows where in the ``sequence`` a run is, and
``loader`` brings what is read there; ``streamed`` is one block's state; ``expected_loads`` leave out what does not
come, ``learning`` follows a program that does otherwise, ``elastic`` gives room back.
"""

from __future__ import annotations
