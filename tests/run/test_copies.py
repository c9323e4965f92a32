"""Copies of weights that autograd saves: the plan counts them, and recomputes them away where there is no room; what a
plan did not foresee of them a run's first pass finds.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch

from memplan.analyze.trace.trace import analyze
from memplan.cost.build import cost_table
from memplan.errors import DoesNotFitError
from memplan.hooks.recompute import hooks_around
from memplan.place.solve import place
from memplan.program.schema import Budgets, Workload
from memplan.run.attach import attach
from memplan.run.handle import handle_of
from memplan.run.verify import unplanned_copies as copies
from memplan.units import GIB
from tests.run.test_parity import plan_for
from tests.support import families, inside
from tests.support.counting import LiveBytes, held_by
from tests.support.graphs import analyze_once, graph_of
from tests.support.training import CPU, Plain, assert_equal, batch_of, loss_of, make, train

CASES = [("llama", "autocast"), ("mixtral-experts", "float32")]


def plan_of(model, family, precision, *, share=1.0, policy=None, pins=None):
    """A plan with ``share`` of the way from the least vram to all of it; ``policy``: of all layers, else chosen."""
    with families.around(precision)():
        graph = graph_of(model, families.batches(family), loss_of)
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
    with LiveBytes(held_by(model, optimizer), arena=inside.device_arena(handle_of(model))) as count:
        step()
    return count.peak


@pytest.mark.each_value
@pytest.mark.parametrize("share", [0.0, pytest.param(1.0, marks=pytest.mark.full)])
@pytest.mark.parametrize("policy", ["keep", "recompute"])
@pytest.mark.parametrize(("family", "precision"), CASES)
def test_peak_is_as_predicted(family, precision, policy, share):
    model = families.make(family, precision)
    plan = plan_of(model, family, precision, share=share, policy=policy)
    assert sum(row.weight_copy_bytes for row in plan.table.accesses) > sum(b.size_bytes for b in plan.table.blocks) / 3
    with attach(model, plan):
        peak = counted_step(model, family, precision)
    assert peak <= plan.budgets.vram_bytes
    assert plan.prediction.peaks.vram_bytes == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize(("family", "precision"), CASES)
def test_under_pressure_layers_with_copies_are_recomputed(family, precision):
    """All weights stay, so that only activations, copies among them, can give way."""
    model = families.make(family, precision)
    blocks = range(len(plan_of(model, family, precision).table.blocks))
    plan = plan_of(model, family, precision, share=0.5, pins=dict.fromkeys(blocks, "device"))
    copied = {row.module for row in plan.table.accesses if row.weight_copy_bytes}
    assert {plan.policies()[module] for module in copied & plan.policies().keys()} == {"keep", "recompute"}
    with attach(model, plan):
        peak = counted_step(model, family, precision)
    assert peak <= plan.budgets.vram_bytes
    assert plan.prediction.peaks.vram_bytes == pytest.approx(peak, rel=0.05)


# ---- found in the run's first pass
# -------------------------------------------------------------------------------------


def train_short(model, **options):
    """Few tokens, under autocast: casts of weights outweigh what bfloat16 spares of the activations."""
    return train(model, "llama", batches=short, around_forward=families.around("autocast"), **options)


def short(kind, seed=3):
    return batch_of("llama", seed=seed, length=5)


def short_plan(model, autocast=None, policy=None):
    graph = analyze_once(model, short("llama"), autocast=autocast, offload=policy == "offload")
    workload = Workload(batch={}, tokens=graph.tokens, accumulation=1, optimizer="adamw", adapter="")
    return place(
        cost_table(graph, CPU),
        Budgets(vram_bytes=GIB, ram_bytes=GIB, disk_bytes=None),
        model=graph.model,
        fingerprint=graph.fingerprint,
        workload=workload,
        hardware=CPU.name,
        pins={block.id: "host" for block in graph.blocks if block.kind == "layer"},
        activations=dict.fromkeys(graph.recomputable, policy) if policy else {},
    )


def test_a_plan_made_without_the_runs_autocast_is_told_once(caplog):
    """What is found is what the right plan has more, layer by layer, where that is at least a copy."""
    model = families.make("llama", "autocast")
    right, wrong = short_plan(model, "bf16"), short_plan(model)

    def saved(plan, index):
        return sum(
            life.size_bytes
            for life in plan.table.lifetimes
            if (life.born, life.kind) == (index, "activations") and life.policy != "recompute"
        )

    forwards = [row for row in right.table.accesses if row.kind == "forward"]
    more = {row.module: saved(right, row.index) - saved(wrong, row.index) for row in forwards}
    layers = [block.name for block in right.table.blocks if block.kind == "layer"]
    with attach(model, wrong) as handle, caplog.at_level("WARNING", "memplan"):
        train_short(model, steps=3)
        found = handle.record.weight_copy_bytes
    assert handle.record.weight_copy_bytes == found
    assert found == pytest.approx(sum(more[layer] for layer in layers), rel=0.01)
    assert found > 100_000
    (message,) = [record.getMessage() for record in caplog.records]
    assert re.match(rf"{layers[0]} saves [0-9.]+ KiB of copies of its weights .* inside the same autocast", message)


@pytest.mark.quick("bf16-None")
@pytest.mark.parametrize(
    ("autocast", "policy"), [("bf16", None), (None, None), (None, "recompute"), ("bf16", "offload"), (None, "offload")]
)
def test_results_and_hooks_are_as_ever(autocast, policy, caplog):
    """Whatever the plan foresaw: the same bits, each forward looked at once and no hook left; no word where it is
    right.
    """
    whole, model = families.make("llama", "autocast"), families.make("llama", "autocast")
    plan = short_plan(model, autocast, policy)
    looked = []
    with pytest.MonkeyPatch.context() as patch, caplog.at_level("WARNING", "memplan"):
        compare = copies.Copies._compare
        patch.setattr(copies.Copies, "_compare", lambda self, *given: (looked.append(given[0]), compare(self, *given)))
        with attach(model, plan) as handle:
            assert_equal(train_short(whole), train_short(model))
            assert hooks_around() is None
            record = handle.record
    kept = [
        r.index for r in plan.table.accesses if r.kind == "forward" and plan.policies().get(r.module) in (None, "keep")
    ]
    assert looked == kept
    assert len(kept) == (7 if policy is None else 3)
    unforeseen = autocast is None and policy is None
    assert (record.weight_copy_bytes > 0) == bool(caplog.records) == unforeseen
    assert (record.offload_skipped > 0) == (autocast is None and policy == "offload")  # their slots are too small


@pytest.mark.parametrize("checkpointing", ["inside-reentrant", "around-other"])
def test_what_a_checkpoint_drops_is_not_saved(checkpointing, caplog):
    whole, model = (families.make("llama", "autocast", checkpointing) for _ in range(2))
    plan = short_plan(model)  # without the run's autocast
    with attach(model, plan) as handle, caplog.at_level("WARNING", "memplan"):
        expected, planned = train_short(whole, steps=2), train_short(model, steps=2)
        found = handle.record.weight_copy_bytes
    assert_equal(expected, planned)
    assert expected.forwards == planned.forwards
    assert found <= sum(tensor.size_bytes for tensor in plan.table.blocks[-1].tensors) // 2  # the head's, kept, alone


def test_activations_as_large_as_a_weight_are_no_copies(caplog):
    """As many tokens as the model is wide: what a layer saves has the shapes of its weights."""
    model = families.make("llama", "float32")
    batch = batch_of("llama", length=families.WIDTH // 2)
    graph = analyze(model, batch)
    workload = Workload(batch={}, tokens=graph.tokens, accumulation=1, optimizer="adamw", adapter="")
    names = {"model": graph.model, "fingerprint": graph.fingerprint, "hardware": CPU.name, "workload": workload}
    plan = place(cost_table(graph, CPU), Budgets(vram_bytes=GIB, ram_bytes=GIB, disk_bytes=None), **names)
    with attach(model, plan) as handle, caplog.at_level("WARNING", "memplan"):
        loss_of(model(**batch)).backward()
        assert handle.record.weight_copy_bytes == 0
    assert not caplog.records


def test_what_others_hooks_hold_is_theirs():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4)
    assert any(tensor is weight for tensor in copies.saved_tensors([x @ weight], [x]))
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        assert list(copies.saved_tensors([x @ weight], [x])) == []


def test_nothing_is_looked_for_in_the_checked_mode_or_without_gradients(monkeypatch):
    looked = []
    monkeypatch.setattr(copies.Copies, "_compare", lambda self, index, *more: looked.append(index))
    model = families.make("llama", "autocast")
    plan = short_plan(model)
    with attach(model, plan, checked=True):
        train_short(model, steps=1)
    with attach(model, plan):
        with torch.no_grad():
            for _ in range(2):
                model(**short("llama"))
        assert looked == []
        train_short(model, steps=2)
        assert looked == [row.index for row in plan.table.accesses if row.kind == "forward"]


class WithSparse(Plain):
    """A buffer that has no storage goes into every layer's product."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mixing", torch.eye(48).to_sparse())
        self.layers[2].register_buffer("mixing", torch.eye(48).to_sparse())

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(torch.sparse.mm(self.mixing, x.flatten(0, 1).T).T.view_as(x))
        return self.head(x)


def test_tensors_without_storage_are_passed_over(tmp_path):
    torch.manual_seed(0)
    whole = WithSparse().train()
    model = copy.deepcopy(whole)
    plan = plan_for(make("plain"), "plain")
    with attach(model, plan, cache=tmp_path) as handle:
        assert_equal(train(whole, "plain"), train(model, "plain"))
        assert handle.record.weight_copy_bytes == 0
