"""Weights that are read or written where no trigger announces it.

``direct_access`` serves them (``lent`` is what was handed out), ``written_weights`` takes home what was written;
``away`` are the classes that weights have meanwhile (``metadata`` is what they tell by themselves); ``dispatched`` and
``torch_functions`` are the two ways by which such a read is seen; ``entrances`` finds backwards that enter a layer from
within, ``transforms`` says what of ``torch.func`` can be borne.
"""

from __future__ import annotations
