"""One name for a module, whoever wrapped it."""

from __future__ import annotations

import pytest

from memplan.model.names import canonical


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        (
            "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
            "model.layers.0.self_attn.q_proj.weight",
        ),
        ("_orig_mod.layers.3", "layers.3"),
        ("layers.3._orig_mod.attn.weight", "layers.3.attn.weight"),
        ("", "."),
        ("base_model.model", "."),
        ("module.weight", "module.weight"),
        ("model.embed_tokens", "model.embed_tokens"),
    ],
)
def test_wrappers_are_taken_off(name, plain):
    assert canonical(name) == plain
