"""Experts in modules of their own: those that are chosen are loaded, no others, and the results are a whole run's."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from memplan.cost.build import cost_table
from memplan.errors import DoesNotFitError
from memplan.hooks.triggers import modules_by_name
from memplan.place.solve import place
from memplan.program.schema import Budgets, Workload
from memplan.run.attach import attach
from memplan.run.schedule.expected_loads import HABIT
from memplan.units import GIB
from tests.run.adversary import ALL
from tests.support import graphs, inside
from tests.support.counting import LiveBytes, held_by
from tests.support.routed import KINDS, batch_of, make
from tests.support.training import CHECKPOINTING, CPU, assert_equal, loss_of, train


@cache
def graph_of(kind, shape=(1, 4), checkpointing="off"):
    model, offload = make(kind, checkpointing=checkpointing), kind == "routed" and checkpointing == "off"
    return graphs.graph_of(model, batch_of(kind, shape=shape), loss_of, offload=offload)


@cache
def plan_for(kind, share=0.1, *, policy=None, shape=(1, 4), checkpointing="off", elastic=None):
    """A plan with that share of the way from the least vram to all of it, every other streamed block on the disk.

    ``policy``: of all activations that memplan has a say in.
    """
    graph = graph_of(kind, shape, checkpointing)
    table = cost_table(graph, CPU)
    workload = Workload(batch={}, tokens=graph.tokens, accumulation=1, optimizer="adamw", adapter="")
    activations = dict.fromkeys(graph.recomputable, policy) if policy else {}

    def placed(vram, **more):
        names = {"model": graph.model, "fingerprint": graph.fingerprint, "hardware": CPU.name}
        budgets = Budgets(vram_bytes=vram, ram_bytes=GIB, disk_bytes=GIB if "pins" in more else 0)
        return place(table, budgets, workload=workload, activations=activations, elastic=elastic, **names, **more)

    with pytest.raises(DoesNotFitError) as caught:
        placed(1)
    least = caught.value.least_vram_bytes
    vram = int(least + share * (placed(GIB).prediction.peaks.vram_bytes - least))
    streamed = [item.block for item in placed(vram).items if item.kind == "weights" and item.home == "host"]
    assert sum(graph.blocks[block].kind == "expert" for block in streamed) > 3
    return placed(vram, pins={block: "disk" if turn % 2 else "host" for turn, block in enumerate(streamed)})


def trained(model, kind, steps=4):
    return train(model, kind, steps=steps, batches=batch_of)


def compare(kind, plan, tmp_path, *, checked=False, **options):
    """Train whole and planned; return the record."""
    whole, model = whole_run(kind, **options), make(kind, **options)
    with attach(model, plan, checked=checked, cache=tmp_path) as handle:
        assert_equal(whole, trained(model, kind))
        return handle.record


@cache
def whole_run(kind, **options):
    return trained(make(kind, **options), kind)


@pytest.mark.quick("routed-off-plain")
@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [*(("routed", how) for how in CHECKPOINTING), ("nllb", "off"), ("nllb", "inside-other"), ("switch", "off")],
)
def test_a_run_is_a_whole_run(kind, checkpointing, checked, tmp_path):
    """However it is checkpointed, though the plan did not know."""
    record = compare(kind, plan_for(kind), tmp_path, checked=checked, checkpointing=checkpointing)
    assert record.passes == 4
    assert (record.out_of_order > 0) == (checkpointing != "off")


@pytest.mark.quick("routed-inside-reentrant")
@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [
        *(("routed", how) for how in CHECKPOINTING if how != "off"),
        ("nllb", "inside-reentrant"),
    ],
)
def test_checkpoints_that_the_plan_knew(kind, checkpointing, tmp_path):
    plan = plan_for(kind, checkpointing=checkpointing)
    record = compare(kind, plan, tmp_path, checked=True, checkpointing=checkpointing)
    assert record.passes == 4
    assert record.out_of_order == 0


@pytest.mark.quick("off-reversed", "inside-other-twice")
@pytest.mark.parametrize("way", ["reversed", "twice", "none"])
@pytest.mark.parametrize("checkpointing", ["off", "inside-other", "around-reentrant"])
def test_experts_in_any_order_more_than_once_or_none(way, checkpointing, tmp_path):
    record = compare("routed", plan_for("routed"), tmp_path, checked=True, way=way, checkpointing=checkpointing)
    assert record.passes == 4


@pytest.mark.each_value
@pytest.mark.parametrize("transfers", ALL)
@pytest.mark.parametrize("way", ["in-order", "reversed", "twice"])
def test_transfers_that_do_their_worst(way, transfers, tmp_path, monkeypatch):
    monkeypatch.setattr("memplan.run.modules.install.CpuTransfers", transfers)
    compare("routed", plan_for("routed"), tmp_path, checked=True, way=way)


@pytest.mark.quick("routed-recompute", "switch-recompute")
@pytest.mark.parametrize(("kind", "policy"), [*((kind, "recompute") for kind in KINDS), ("routed", "offload")])
def test_activations_of_experts_recomputed_and_offloaded(kind, policy, tmp_path):
    compare(kind, plan_for(kind, policy=policy), tmp_path, checked=True)


# ---- what is loaded
# ----------------------------------------------------------------------------------------------------


class Uses:
    """The streamed blocks that each pass reads, in order: told by the calls alone."""

    def __init__(self, model, plan):
        self.passes = []
        self._plan = plan
        self._slots = {}
        for address in plan.addresses:
            block = plan.items[address.item].block
            if plan.arenas[address.arena].tier == "device" and plan.home_of(block) != "device":
                self._slots[block] = address.offset_bytes
        modules = modules_by_name(model)
        self._hooks = [
            modules[plan.table.blocks[block].name].register_forward_pre_hook(self._noting(block))
            for block in self._slots
        ]

    def _noting(self, block):
        return lambda module, args: self.passes[-1].append(block)

    def loads(self, first, last):
        """How often a block comes into its slot from one pass to another: whenever another was used there before."""
        count = 0
        for slot in set(self._slots.values()):
            there = None
            for index, forward in enumerate(self.passes[: last + 1]):
                for block in forward + forward[::-1]:
                    if self._slots[block] == slot:
                        count += block != there and index >= first
                        there = block
        return count


def passes_of(model, plan, count):
    """Train for so many passes; return the record after each, and the uses."""
    records, uses = [], Uses(model, plan)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with attach(model, plan) as handle:
        for turn in range(count):
            uses.passes.append([])
            loss_of(model(**batch_of("routed", seed=turn))).backward()
            optimizer.step()
            optimizer.zero_grad()
            records.append(handle.record)
    return records, uses


@pytest.mark.quick("0.0", "0.3")
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_only_what_is_chosen_is_loaded(share):
    plan, never = plan_for("routed", share, elastic=False), (1, 3, 4)
    records, uses = passes_of(make(never=never), plan, HABIT)
    of_never = {b.id for b in plan.table.blocks for expert in never if b.name.endswith(f".experts.{expert}")}
    assert any(row.block in of_never for row in records[-1].blocks)
    assert all(row.loads == 0 for row in records[-1].blocks if row.block in of_never)
    for turn in range(1, HABIT):
        assert records[turn].loads - records[turn - 1].loads == uses.loads(turn, turn)
    assert uses.loads(1, 1) < plan.prediction.loads_per_pass
    assert records[-1].out_of_order == 0
    assert records[-1].passes == HABIT


def test_what_is_always_chosen_is_loaded_ahead():
    plan = plan_for("routed", 0.0, elastic=False)
    records, uses = passes_of(make(never=(0, 2, 3, 5)), plan, HABIT + 3)
    misses = [record.misses for record in records]
    assert misses[HABIT - 1] > misses[HABIT - 2] > 0
    assert misses[HABIT:] == [misses[HABIT]] * 3
    for turn in range(HABIT + 1, HABIT + 3):
        assert records[turn].loads - records[turn - 1].loads == uses.loads(turn, turn)


@pytest.mark.quick("0.0")
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_peak_is_what_was_predicted(share, tmp_path):
    """With so many tokens that each expert gets some, for an adapter that was never used has no state. Not all get as
    many, as the plan assumes: so the budget may be off by what one of them takes within its forward.
    """
    shape = (2, 24)
    model, plan = make(), plan_for("routed", share, shape=shape)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with attach(model, plan, cache=tmp_path) as handle:
        for turn in range(2):
            with LiveBytes(held_by(model, optimizer), arena=inside.device_arena(handle)) as count:
                loss_of(model(**batch_of("routed", seed=turn, shape=shape))).backward()
                optimizer.step()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
            optimizer.zero_grad()
    assert plan.prediction.peaks.vram_bytes == pytest.approx(count.peak, rel=0.10)
