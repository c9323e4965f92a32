"""One training pass on fake tensors.

``trace`` is the way through. ``fake``, ``swap_tensors``, ``fake_values``, ``fake_cache`` and ``draws`` are how a model
runs without its weights; ``recorder``, ``accesses``, ``operators``, ``provenance``, ``lifetimes``, ``offloads`` are
what is seen of it; ``stateful`` says what may not run twice; ``traced`` is what comes of it.
"""

from __future__ import annotations
