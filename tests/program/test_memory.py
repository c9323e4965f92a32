"""The memory of a pass, access by access: sums as the plan's check has them, kinds as the model's own tensors are."""

from __future__ import annotations

import pytest

from memplan.place.solve import place
from memplan.program.memory_timeline import ACTIVATION_KINDS, DEVICE_KINDS, HOST_KINDS, timeline
from memplan.program.schema import STAGING_BYTES
from tests.run.test_parity import plan_for
from tests.show.plans import LAYER_BYTES, solve_plan
from tests.support.tables import MIB, NAMES, budgets, make_table
from tests.support.training import KINDS, batch_of, make


def holds(plan):
    """Check every moment by what a plan's rows say, and return them."""
    moments, policies = timeline(plan), plan.policies()
    peaks, stated = plan.prediction.peaks, plan.prediction.vram_parts
    segments = [segment for arena in plan.arenas if arena.tier == "device" for segment in arena.segments]
    assert [moment.index for moment in moments] == list(range(len(plan.table.accesses)))
    for moment in moments:
        assert tuple(moment.vram) == DEVICE_KINDS
        assert tuple(moment.ram) == HOST_KINDS
        assert min(moment.vram.values()) >= 0
        assert min(moment.ram.values()) >= 0
        gone = [s for s in segments if any(moment.index in range(first, last + 1) for first, last in s.absent)]
        arena = sum(segment.size_bytes for segment in segments if segment not in gone)
        assert moment.vram_bytes == arena + plan.table.device_bytes_at(moment.index, policies)
        assert moment.ram_bytes == peaks.ram_bytes
        assert moment.disk_bytes == peaks.disk_bytes
        read = {block for block in plan.table.accesses[moment.index].blocks if plan.home_of(block) != "device"}
        rows = {block for block in read if plan.table.accesses[moment.index].reads_rows_of(block)}
        assert moment.vram["streamed"] >= sum(plan.table.blocks[block].size_bytes for block in read - rows)
    assert max(moment.vram_bytes for moment in moments) == peaks.vram_bytes
    top = moments[plan.prediction.vram_peak_at]
    assert top.vram_bytes == peaks.vram_bytes
    assert top.vram["weights"] == stated["weights"]
    assert sum(top.vram[kind] for kind in ("streamed", "offloaded", "idle")) == stated["slots"]
    for kind in ("adapters", "optimizer", "buffers", "batch", "context"):
        assert top.vram[kind] == stated.get(kind, 0)
    made = sum(top.vram[kind] for kind in (*ACTIVATION_KINDS, "gradients", "workspace"))
    assert made == stated["activations"] + stated["gradients"] + stated["workspace"]
    return moments


@pytest.mark.quick("llama-0.0", "plain-0.0")
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_real_model(kind, share):
    holds(plan_for(make(kind), kind, share=share, tiers="all" if share < 1 else "host"))


def test_a_model_that_checkpoints_itself():
    moments = holds(plan_for(make("llama", checkpointing="inside-other"), "llama"))
    assert not any(moment.vram["recomputed"] or moment.vram["kept"] for moment in moments)


def test_what_llamas_are_made_of():
    plan = plan_for(make("llama"), "llama", share=0.3)
    moments, rows = holds(plan), plan.table.accesses
    batch, config = batch_of("llama")["input_ids"], make("llama").config
    logits_bytes = batch.numel() * config.vocab_size * 4
    loss = next(moment for moment in moments if moment.kind == "loss")
    # The logits, and the gradient that the loss gives them.
    assert 2 * logits_bytes <= loss.vram["logits"] < 4 * logits_bytes
    assert moments[0].vram["logits"] == 0
    assert moments[-1].vram["gradients"] == sum(
        life.size_bytes for life in plan.table.lifetimes if life.kind == "gradients" and life.policy in ("any", "keep")
    )
    assert moments[-1].vram["workspace"] == rows[-1].transient_bytes > 0

    policies = plan.policies()
    assert {"keep", "recompute"} == set(policies.values())
    again = {m.module for m in moments if m.vram["recomputed"]}
    assert again == {module for module, policy in policies.items() if policy == "recompute"}
    hidden_bytes = batch.numel() * config.hidden_size * 4
    recomputed = sum(policy == "recompute" for policy in policies.values())
    first = next(module for module, policy in policies.items() if policy == "recompute")
    forward, backward = (
        next(r.index for r in rows if (r.kind, r.module) == (k, first)) for k in ("forward", "backward")
    )
    spans = {(life.born, life.last): life.size_bytes for life in plan.table.lifetimes if life.policy == "recompute"}
    # What the embedding made: the first layer's checkpoint begins from it, the positions' sines and cosines with it.
    begun_bytes = spans.get((forward, backward), 0) if first.endswith(".0") else 0
    assert hidden_bytes <= begun_bytes < 1.1 * hidden_bytes
    assert loss.vram["boundaries"] == recomputed * hidden_bytes + begun_bytes
    assert loss.vram["passing"] == loss.vram["recomputed"] == 0
    turn = next(moment for moment in moments if moment.kind == "backward" and moment.module in policies)
    assert turn.vram["passing"] > 0


def test_offloaded_activations():
    plan = plan_for(make("llama"), "llama", tiers="host", offload="all")
    moments = holds(plan)
    sizes = {item.module: item.size_bytes for item in plan.items if item.kind == "saved"}
    loss = next(moment for moment in moments if moment.kind == "loss")
    assert loss.vram["kept"] == 0
    # At the turn-around two are in their slots, the others on the host.
    assert loss.vram["offloaded"] == sum(list(sizes.values())[-2:])
    assert loss.ram["offloaded"] == sum(sizes.values()) - loss.vram["offloaded"]
    assert moments[0].ram["offloaded"] == 0
    homes = sum(item.size_bytes for item in plan.items if item.kind == "weights" and item.home == "host")
    assert {moment.ram["weights"] for moment in moments} == {homes}


def test_accumulated_gradients_are_there_from_the_first_access_on():
    plan = plan_for(make("llama"), "llama", accumulation=2)
    moments = holds(plan)
    assert moments[0].vram["gradients"] == moments[-1].vram["gradients"] > 0
    assert {moment.ram["staging"] for moment in moments} == {STAGING_BYTES}


def test_streamed_blocks_come_and_go():
    plan = solve_plan(12)
    moments = holds(plan)
    assert {moment.vram["streamed"] + moment.vram["idle"] for moment in moments} == {
        plan.prediction.vram_parts["slots"]
    }
    assert len({moment.vram["streamed"] for moment in moments}) > 1
    assert all(moment.vram["streamed"] % MIB == 0 and moment.vram["streamed"] >= LAYER_BYTES for moment in moments)


@pytest.mark.parametrize("transient_bytes", [-MIB // 8, -3 * MIB])
def test_what_meets_but_is_not_there_at_once(transient_bytes):
    """A negative transient is taken from what begins or ends in the access."""
    table = make_table([MIB] * 6, transient_bytes=transient_bytes, recomputable=False)
    plan = place(table, budgets(MIB * 100), **NAMES)
    for moment in holds(plan):
        row = table.accesses[moment.index]
        assert moment.vram["workspace"] == 0
        whole = sum(x.size_bytes for x in table.lifetimes if x.kind == "activations" and x.born < row.index < x.last)
        assert sum(moment.vram[kind] for kind in ACTIVATION_KINDS) >= (whole if row.kind != "loss" else 0)
