"""Whether a run is what its plan says: ``race_check`` and ``saved_tensor_check`` (the checked mode),
``unplanned_copies``, ``spans`` (the traced mode), ``metrics`` and ``scalars`` (what is measured and logged).
"""

from __future__ import annotations
