"""What is given, made ready to be traced.

``prepare``: a model by name, configuration or itself, with its adapter; ``batch``, ``modalities`` and ``latents``: what
it is called with; ``loss``: what of that is differentiated; ``autocast`` and ``trainer_settings``: what trainers set
around it.
"""

from __future__ import annotations
