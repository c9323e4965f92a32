"""model + batch -> LayerGraph: what a model is and what a training step of it reads, keeps and costs.

``graph`` is what comes of it, a frozen value without torch. ``inputs`` make what is traced of what was given, ``trace``
runs a pass on fake tensors and sees it all, ``repeat`` has a long stack looked at in part, ``blocks`` make rows of what
was seen. ``graph_cache`` keeps graphs from one run to the next.
"""

from __future__ import annotations
