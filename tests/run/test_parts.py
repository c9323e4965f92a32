"""Layers in parts: each module with weights is a block of its own, and layers are recomputed whole."""

from __future__ import annotations

import pytest

from tests.run.test_parity import compare
from tests.support.training import EVERY_WAY


@pytest.mark.quick("llama-off-checked", "gpt2-around-other-plain")
@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
@pytest.mark.parametrize(("kind", "checkpointing"), EVERY_WAY)
def test_bit_identical(kind, checkpointing, checked, tmp_path):
    options = {"checkpointing": checkpointing, "checked": checked, "parts": True, "share": 0.0}
    with compare(kind, **options, tmp_path=tmp_path) as handle:
        assert handle.record.misses == 0
        assert handle.record.out_of_order == 0
        assert handle.record.loads > 0
