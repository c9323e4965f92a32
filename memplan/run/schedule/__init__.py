"""When bytes move: ``sequence`` knows where in the cycle a run is, ``conductor`` acts on it, ``streamed`` is one
block's state; ``expected_loads`` leave out what does not come, ``learning`` follows a program that does otherwise,
``elastic`` gives room back.
"""

from __future__ import annotations
