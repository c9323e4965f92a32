"""Copies of weights that autograd saves: the plan counts them, and recomputes them away where there is no room."""

from __future__ import annotations

import pytest
import torch

from memplan.analyze.trace import analyze
from memplan.cost.build import cost_table
from memplan.errors import DoesNotFitError
from memplan.place.solve import place
from memplan.program.schema import Budgets, Workload
from memplan.run.attach import attach
from memplan.units import GIB
from tests import families
from tests.counting import LiveBytes, held_by
from tests.training import CPU, loss_of

CASES = [("llama", "autocast"), ("mixtral-experts", "float32"), ("mixtral-experts", "autocast")]


def plan_of(model, family, precision, *, share=1.0, policy=None, pins=None):
    """A plan with ``share`` of the way from the least vram to all of it; ``policy``: of all layers, else chosen."""
    with families.around(precision)():
        graph = analyze(model, families.batches(family), loss=loss_of)
    table = cost_table(graph, CPU)
    workload = Workload(batch={}, tokens=graph.tokens, accumulation=1, optimizer="adamw", adapter="")
    activations = dict.fromkeys(graph.recomputable, policy) if policy else {}

    def placed(vram):
        names = {"model": graph.model, "fingerprint": graph.fingerprint, "hardware": CPU.name}
        budgets = Budgets(vram_bytes=vram, ram_bytes=GIB, disk_bytes=None)
        return place(table, budgets, workload=workload, activations=activations, pins=pins, notes=graph.notes, **names)

    with pytest.raises(DoesNotFitError) as caught:
        placed(1)
    least, most = caught.value.least_vram_bytes, placed(GIB).prediction.peaks.vram_bytes
    return placed(int(least + share * (most - least)))


def counted_step(model, family, precision):
    """The peak of live device bytes in the second step, when the optimizer has its state."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step():
        with families.around(precision)():
            loss = loss_of(model(**families.batches(family)))
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad()

    step()
    with LiveBytes(held_by(model, optimizer)) as count:
        step()
    return count.peak


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize(("policy", "within"), [("keep", 0.01), ("recompute", 0.05)])
@pytest.mark.parametrize(("family", "precision"), CASES)
def test_peak_is_as_predicted(family, precision, policy, within, share):
    model = families.make(family, precision)
    plan = plan_of(model, family, precision, share=share, policy=policy)
    assert sum(row.derived_bytes for row in plan.table.accesses) > sum(b.size_bytes for b in plan.table.blocks) / 3
    with attach(model, plan):
        peak = counted_step(model, family, precision)
    assert peak <= plan.budgets.vram_bytes
    assert plan.prediction.peaks.vram_bytes == pytest.approx(peak, rel=within)


@pytest.mark.parametrize(("family", "precision"), CASES[:2])
def test_under_pressure_layers_with_copies_are_recomputed(family, precision):
    """All weights stay, so that only activations, copies among them, can give way."""
    model = families.make(family, precision)
    blocks = range(len(plan_of(model, family, precision).table.blocks))
    plan = plan_of(model, family, precision, share=0.5, pins=dict.fromkeys(blocks, "device"))
    copied = {row.module for row in plan.table.accesses if row.derived_bytes}
    assert {plan.policies()[module] for module in copied & plan.policies().keys()} == {"keep", "recompute"}
    with attach(model, plan):
        peak = counted_step(model, family, precision)
    assert peak <= plan.budgets.vram_bytes
    assert plan.prediction.peaks.vram_bytes == pytest.approx(peak, rel=0.05)
