"""Canonical names: what wrappers add to a module's name is taken off, so that one plan serves them all."""

from __future__ import annotations

import re

_SAVED = re.compile(r"\.original_module(?=\.)|\.modules_to_save\.[^.]+(?=\.)")
_PREFIX = re.compile(r"^(?:_orig_mod\.|module\.(?=base_model\.)|base_model\.model\.)+")


def canonical(name: str) -> str:
    """Return ``name`` without what PEFT and torch.compile add.

    ``base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight`` is
    ``model.layers.0.self_attn.q_proj.weight``; the root module (empty) is ``"."``.
    """
    name = _PREFIX.sub("", name + ".").rstrip(".").replace("._orig_mod", "").replace(".base_layer", "")
    return name or "."


def stored_name(name: str) -> str:
    """Return the name that a checkpoint of the base model has a canonical name's tensor under.

    PEFT keeps what ``modules_to_save`` names twice: as it was, and the copy that is trained.
    """
    return _SAVED.sub("", name)
