"""Long stacks of layers that are alike: ``signature`` says which are, ``periodic`` shortens the stack for the trace,
``outline`` looks whether the forward treats them alike, ``unroll`` counts all of them afterwards, ``whole_events`` has
them all allocate.
"""

from __future__ import annotations
