"""The budget holds, by an independent count of live storages, and the prediction is what is then counted."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model

import memplan
from memplan.cost.build import cost_table
from memplan.place.solve import place
from memplan.program.schema import Budgets, Workload
from memplan.run.attach import attach
from memplan.run.handle import handle_of
from memplan.units import GIB
from tests.run.test_parity import plan_for
from tests.support import inside
from tests.support.counting import LiveBytes, held_by
from tests.support.graphs import graph_of
from tests.support.training import CPU, EVERY_WAY, KINDS, _base, batch_of, loss_of, make


def counted_step(model, kind, accumulation=1, batches=batch_of, apart=()):
    """Return the peak of live device bytes in the second step, when the optimizer has its state."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step():
        for micro in range(accumulation):
            loss_of(model(**batches(kind, seed=micro))).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    handle = handle_of(model)
    with LiveBytes(held_by(model, optimizer), apart, handle and inside.device_arena(handle)) as count:
        step()
    return count.peak


@pytest.mark.quick("llama-off-accumulation")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.full),
        pytest.param({"dropout": 0.2}, marks=pytest.mark.full),
        {"accumulation": 4},
    ],
    ids=["plain", "dropout", "accumulation"],
)
@pytest.mark.parametrize(("kind", "checkpointing"), EVERY_WAY)
def test_peak_is_within_budget_and_prediction(kind, checkpointing, options, tmp_path):
    accumulation = options.get("accumulation", 1)
    model = make(kind, checkpointing=checkpointing, dropout=options.get("dropout", 0.0))
    plan = plan_for(model, kind, share=0.5, accumulation=accumulation)
    with attach(model, plan, cache=tmp_path):
        peak = counted_step(model, kind, accumulation)
    assert peak <= plan.budgets.vram_bytes
    assert plan.prediction.peaks.vram_bytes == pytest.approx(peak, rel=0.10)


@pytest.mark.quick("llama-0.0", "llama-1.0", "gpt2-0.1")
@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.8, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_all_budgets_from_the_least_on(kind, share, tmp_path):
    """At the least, activations are recomputed and there is one slot."""
    model = make(kind)
    plan = plan_for(model, kind, share=share, tiers="all" if share < 1 else "host")
    with attach(model, plan, cache=tmp_path):
        peak = counted_step(model, kind)
    assert peak <= plan.budgets.vram_bytes
    assert plan.prediction.peaks.vram_bytes == pytest.approx(peak, rel=0.10)


def test_the_handles_own_count_agrees(tmp_path):
    model = make("llama")
    plan = plan_for(model, "llama")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with attach(model, plan, cache=tmp_path) as handle:
        for _ in range(2):
            with (
                handle.watch_memory(optimizer),
                LiveBytes(held_by(model, optimizer), arena=inside.device_arena(handle)) as count,
            ):
                model(**batch_of("llama")).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        assert handle.record.vram_peak_bytes == pytest.approx(count.peak, rel=0.001)


@pytest.mark.quick("")
@pytest.mark.parametrize("kept", ["", "rkkkkk", "rrkkkk", "krkrkr", "kkkkkr", "rkrrrk"])
def test_any_choice_of_recomputed_layers_is_foreseen(kept):
    """What the first recomputed layer begins from lives to its backward: the embedding's output, which else goes
    early.
    """
    model = make("llama")
    policies = {f"layers.{turn}": {"k": "keep", "r": "recompute"}[mark] for turn, mark in enumerate(kept)}
    given = {"vram": "1GiB", "ram": "1GiB", "hardware": CPU, "loss": loss_of, "gains": False}
    plan = memplan.plan(model, batch_of("llama"), activations=policies or None, **given)
    with attach(model, plan):
        peak = counted_step(model, "llama")
    assert 0.99 * plan.prediction.peaks.vram_bytes <= peak <= plan.prediction.peaks.vram_bytes


FULL = pytest.mark.full


@pytest.mark.quick("llama-kkkkkk")
@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        ("llama", "kkkkkk"),
        ("llama", "kkkkkr"),
        ("llama", "krrrrr"),
        ("llama", "ooooor"),
        ("t5", "rrrrrrrk"),
        *(pytest.param("llama", kept, marks=FULL) for kept in ("rrkrrr", "rrrrrk", "orrrrr", "oroooo", "krkoro")),
        *(
            pytest.param("t5", kept, marks=FULL)
            for kept in ("rkrkrkrk", "rrrrrkkk", "ooooooor", "kkkkkkkr", "orkorkor")
        ),
        *(pytest.param("gpt2", kept, marks=FULL) for kept in ("kkkkr", "oooor", "kooor", "rrrrk", "rkrkr")),
    ],
)
def test_what_a_recomputed_layer_is_handed_is_foreseen(kind, kept):
    """A cache, a mask: whichever layer is recomputed holds what it was handed of them, those of layers that are not,
    too.
    """
    torch.manual_seed(0)
    base, targets = _base(kind)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, fan_in_fan_out=kind == "gpt2")).train()
    assert base.config.use_cache
    batches = partial(batch_of, length=64)
    graph = graph_of(model, batches(kind), loss_of, offload="o" in kept)
    policies = {"k": "keep", "r": "recompute", "o": "offload"}
    plan = place(
        cost_table(graph, CPU),
        Budgets(vram_bytes=GIB, ram_bytes=GIB, disk_bytes=0),
        activations={module: policies[mark] for module, mark in zip(graph.recomputable, kept, strict=True)},
        workload=Workload(batch={}, tokens=graph.tokens, accumulation=1, optimizer="adamw", adapter=""),
        model=graph.model,
        fingerprint=graph.fingerprint,
        hardware=CPU.name,
    )
    with attach(model, plan) as handle:
        peak = counted_step(model, kind, batches=batches, apart=inside.on_host(handle))
    assert 0.97 * plan.prediction.peaks.vram_bytes <= peak <= plan.prediction.peaks.vram_bytes
