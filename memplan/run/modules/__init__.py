"""What of the model is touched: ``match_model`` finds the plan's blocks in it, ``install`` hooks it, ``guard`` stands
before moves and saves; ``embedding_rows``, ``offloaded_activations`` and ``optimizer_state`` are what is not a whole
block's weights; ``encoder_fast_path`` keeps torch's encoder layers on the way that they take without hooks.
"""

from __future__ import annotations
