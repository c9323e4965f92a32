"""Models whose weights are never held whole.

``from_pretrained`` is libraries' own way in, to what ``hf_transformers`` and ``hf_diffusers`` build without weights;
``stored``, ``conversion``, ``new_heads`` say what of a checkpoint a parameter is; ``mapped_weights`` are read where
they are used until ``deferred_placement``, which ``entries`` tell of what a script calls; ``load`` goes the way in one
call.
"""

from __future__ import annotations
