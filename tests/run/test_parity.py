"""The result is the test: a run under a plan equals a run that holds the whole model, to the last bit.

Three AdamW steps; losses, every gradient, the adapters. Slots are poisoned before each load, placeholders are NaN, and
forwards are counted. Every case runs plain and in the checked mode.
"""

from __future__ import annotations

import re

import pytest

from memplan.cost.build import cost_table
from memplan.errors import DoesNotFitError
from memplan.place.solve import place
from memplan.program.schema import Budgets, Plan, Workload
from memplan.run.attach import attach
from memplan.units import GIB
from tests.support.graphs import graph_of
from tests.support.training import CPU, EVERY_WAY, KINDS, assert_equal, batch_of, loss_of, make, train, whole_run


def plan_for(model, kind, *, share=0.4, accumulation=1, tiers="all", offload=(), **options):
    """A plan with ``share`` of the way from the least vram to all of it, homes on every tier; made once in a process.

    The stages are called one by one, so that the model is traced once. ``offload``: layers whose activations are
    offloaded, or ``"all"``. ``options``: of the analysis.
    """
    graph = graph_of(model, batch_of(kind), loss_of, accumulation=accumulation, offload=bool(offload), **options)
    offloaded = tuple(graph.recomputable if offload == "all" else offload)
    key = (id(graph), CPU.name, share, accumulation, tiers, offloaded)  # graphs stay to the end
    if key not in _plans:
        _plans[key] = _plan_for(graph, share, accumulation, tiers, offloaded)
    return _plans[key]


_plans: dict[tuple[object, ...], Plan] = {}


def _plan_for(graph, share, accumulation, tiers, offloaded):
    activations = dict.fromkeys(offloaded, "offload")
    table = cost_table(graph, CPU)
    workload = Workload(batch={}, tokens=graph.tokens, accumulation=accumulation, optimizer="adamw", adapter="")

    def placed(vram, **more):
        budgets = Budgets(vram_bytes=vram, ram_bytes=GIB, disk_bytes=GIB if "pins" in more else 0)
        names = {"model": graph.model, "fingerprint": graph.fingerprint, "hardware": CPU.name}
        return place(table, budgets, workload=workload, activations=activations, **names, **more)

    with pytest.raises(DoesNotFitError) as caught:
        placed(1)
    least, most = caught.value.least_vram_bytes, placed(GIB).prediction.peaks.vram_bytes
    vram = int(least + share * (most - least))
    plan = placed(vram)
    if tiers == "all" and all(
        item.home == "device" for item in plan.items
    ):  # small weights: recomputing makes room for all of them
        vram = int(least + share / 8 * (most - least))
        plan = placed(vram)
    if tiers == "all":  # half of what is streamed goes to the disk
        streamed = [item.block for item in plan.items if item.kind == "weights" and item.home == "host"]
        plan = placed(vram, pins={block: "disk" if turn % 2 else "host" for turn, block in enumerate(streamed)})
        assert {item.home for item in plan.items} == {"device", "host", "disk"}
    return plan


def compare(
    kind,
    *,
    checkpointing="off",
    dropout=0.0,
    accumulation=1,
    checked=False,
    share=0.4,
    offload=(),
    tmp_path=None,
    make=make,
    **more,
):
    """Train whole and planned; return the handle of the planned run, which is still attached."""
    options = {"checkpointing": checkpointing, "dropout": dropout}
    whole = whole_run(kind, make=make, accumulation=accumulation, **options)
    model = make(kind, **options)
    plan = plan_for(model, kind, accumulation=accumulation, share=share, offload=offload, **more)
    handle = attach(model, plan, checked=checked, cache=tmp_path)
    planned = train(model, kind, accumulation=accumulation)
    assert_equal(whole, planned)
    assert_forwards(whole, planned, plan.recomputed(), steps=3 * accumulation)
    return handle


def assert_forwards(whole, planned, recomputed, steps):
    """Each layer ran as often as in the whole run, and once more a pass where memplan recomputes it.

    Not each leaf of it: a recompute stops once it has all that is wanted, and the last leaf may save nothing but a
    frozen weight, which the checked mode keeps out of the checkpoint's sight.
    """
    from memplan.model.names import canonical

    assert whole.forwards.keys() == planned.forwards.keys()
    as_often = {}
    for name, count in whole.forwards.items():
        extra = any(canonical(name).startswith(module + ".") for module in recomputed)
        expected = count + (steps if extra else 0)
        layer = next((name[: found.end()] for found in re.finditer(r"\.\d+\b", name)), name)
        assert planned.forwards[name] <= expected, name
        as_often[layer] = as_often.get(layer, False) or planned.forwards[name] == expected
    assert all(as_often.values()), as_often


@pytest.mark.quick("llama-off-plain", "gpt2-around-other-checked")
@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
@pytest.mark.parametrize(("kind", "checkpointing"), EVERY_WAY)
def test_three_steps(kind, checkpointing, checked, tmp_path):
    with compare(kind, checkpointing=checkpointing, checked=checked, tmp_path=tmp_path) as handle:
        record = handle.record
        assert record.passes == 3
        assert record.misses == 0
        assert record.loads > 0
        if checked and checkpointing == "off":
            assert handle.checked_reads > 0


@pytest.mark.quick("llama-off-checked")
@pytest.mark.parametrize("checked", [pytest.param(False, marks=pytest.mark.full), True], ids=["plain", "checked"])
@pytest.mark.parametrize(("kind", "checkpointing"), EVERY_WAY)
def test_dropout_and_accumulation(kind, checkpointing, checked, tmp_path):
    options = {"dropout": 0.2, "accumulation": 4, "checkpointing": checkpointing, "checked": checked}
    with compare(kind, **options, tmp_path=tmp_path) as handle:
        assert handle.record.passes == 12
        assert handle.record.misses == 0


@pytest.mark.quick("llama-0.0", "gpt2-0.15", "plain-0.0")
@pytest.mark.parametrize("share", [0.0, 0.15, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_from_the_least_that_works(kind, share, tmp_path):
    """The least vram recomputes and has one slot; more of it keeps and prefetches."""
    compare(kind, share=share, checked=True, tmp_path=tmp_path).detach()


@pytest.mark.quick("llama")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_transformers_own_checkpointing(kind, tmp_path):
    with compare(kind, checkpointing="native", checked=True, tmp_path=tmp_path) as handle:
        assert handle.record.misses == 0


def test_loads_are_as_few_as_can_be():
    """Two slots and equal blocks: every pass loads each streamed block but two twice, 2(N - M) in all."""
    model = make("plain")
    plan = plan_for(model, "plain", share=0.3, tiers="host")
    streamed = [item for item in plan.items if item.home != "device"]
    with attach(model, plan) as handle:
        train(model, "plain", steps=5)
        record = handle.record
    sizes = {item.size_bytes for item in streamed}
    assert len(sizes) == 1
    expected = plan.prediction.loads_per_pass
    assert expected == 2 * (len(streamed) - 2)
    # The first pass brings the two that later passes find there; after the last, the next one's first are on their way.
    assert 5 * expected <= record.loads <= 5 * expected + 2
    assert all(block.misses == 0 for block in record.blocks)
