"""Layers in parts: each module with weights is a block of its own, and layers are recomputed whole."""

from __future__ import annotations

import pytest

import memplan
from memplan.errors import InputError
from memplan.run.attach import attach
from tests.run.test_memory import counted_step
from tests.run.test_parity import compare, plan_for
from tests.run.test_quantized import maker
from tests.support import models
from tests.support.training import EVERY_WAY, KINDS, batch_of, loss_of, make


@pytest.mark.quick("llama-off-checked", "gpt2-around-other-plain")
@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
@pytest.mark.parametrize(("kind", "checkpointing"), EVERY_WAY)
def test_bit_identical(kind, checkpointing, checked, tmp_path):
    options = {"checkpointing": checkpointing, "checked": checked, "parts": True, "share": 0.0}
    with compare(kind, **options, tmp_path=tmp_path) as handle:
        assert handle.record.misses == 0
        assert handle.record.out_of_order == 0
        assert handle.record.loads > 0


@pytest.mark.filterwarnings("ignore")  # the quantizers' own
@pytest.mark.parametrize("kind", ["nf4", pytest.param("torchao-int8", marks=pytest.mark.full)])
def test_quantized(kind, tmp_path):
    options = {"parts": True, "share": 0.0, "dropout": 0.2, "accumulation": 2, "checked": True}
    with compare("llama", make=maker(kind), **options, tmp_path=tmp_path) as handle:
        assert handle.record.misses == 0
        assert handle.record.loads > 0


@pytest.mark.quick("llama", "gpt2")
@pytest.mark.parametrize("kind", KINDS)
def test_the_peak_is_as_planned(kind, tmp_path):
    model = make(kind)
    plan = plan_for(model, kind, share=0.0, parts=True)
    with attach(model, plan, cache=tmp_path):
        peak = counted_step(model, kind)
    assert peak <= plan.budgets.vram_bytes
    assert plan.prediction.peaks.vram_bytes == pytest.approx(peak, rel=0.10)


def test_less_vram_than_with_whole_layers():
    model = make("llama")
    layers, parts = (plan_for(model, "llama", share=0.0, parts=parts) for parts in (False, True))
    assert parts.budgets.vram_bytes < layers.budgets.vram_bytes
    assert parts.prediction.peaks.vram_bytes <= parts.budgets.vram_bytes


def mixture(kind, dropout=0.0, checkpointing="off"):
    return models.mixtral(dropout)[0]


def test_a_mixture(tmp_path):
    with compare("llama", make=mixture, parts=True, share=0.0, checked=True, tmp_path=tmp_path) as handle:
        assert handle.record.misses == 0
        assert handle.record.loads > 0


def test_what_cannot_be_in_parts_is_refused():
    model, batch = make("llama"), batch_of("llama")
    given = {"loss": loss_of, "blocks": "parts"}
    for more, why in (
        ({"group": 2, "accumulation": 2}, "leave group or blocks out"),
        ({"activations": "keep"}, "leave activations or blocks out"),
        ({"measure": True}, "leave measure or blocks out"),
        ({"blocks": "halves"}, "give one of layers, parts"),
    ):
        with pytest.raises(InputError, match=why):
            memplan.plan(model, batch, **given | more)
