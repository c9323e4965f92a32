"""Canonical names: what wrappers add to a module's name is taken off, so that one plan serves them all."""

from __future__ import annotations

import re

_PREFIX = re.compile(r"^(?:_orig_mod\.|module\.(?=base_model\.)|base_model\.model\.)+")


def canonical(name: str) -> str:
    """Return ``name`` without what PEFT and torch.compile add.

    ``base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight`` is
    ``model.layers.0.self_attn.q_proj.weight``; the root module (empty) is ``"."``.
    """
    name = _PREFIX.sub("", name + ".").rstrip(".").replace("._orig_mod", "").replace(".base_layer", "")
    return name or "."
