"""Parity over everything at once: family, homes, checkpointing and its hook order, precision, transfers.

The quick suite has a pairwise cover (any two choices meet in some case); the full one has the whole product for Llama,
and for each other family a cover of its own. Whole against planned, three AdamW steps with dropout:
losses, gradients and adapters to the last bit; every slot is poisoned before it is loaded where transfers are not
normal, placeholders are NaN always; the forwards of each block are counted.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from itertools import combinations, product
from typing import NamedTuple

import pytest

from memplan.cost.build import cost_table
from memplan.errors import DoesNotFitError
from memplan.place.solve import place
from memplan.program.schema import Budgets, Workload
from memplan.run.attach import attach
from memplan.run.modules import install as install_module
from memplan.units import GIB
from tests.run import adversary
from tests.run.test_parity import assert_forwards
from tests.support import families
from tests.support.families import FAMILIES, PRECISIONS
from tests.support.graphs import graph_of
from tests.support.training import CPU, assert_equal, loss_of, train

pytestmark = pytest.mark.filterwarnings("ignore")  # the quantizers' own, of versions and of float32 inputs

HOMES = ("device", "host", "disk")
# "Inside" and "around": where the checkpoint's own forward lies to a layer's hooks. Without one there are no two
# orders.
ACTIVATIONS = ("off", "inside-reentrant", "inside-other", "around-reentrant", "around-other", "offloaded")
TRANSFERS = ("normal", "checked", *(kind.__name__ for kind in adversary.ALL))
STEPS = 3
MOST = 250

# None: all pairs of choices run. A pair that cannot would stand here with the error that it gives.
UNSUPPORTED: dict[tuple[str, str], str] = {}


class Case(NamedTuple):
    family: str
    homes: str
    activations: str
    precision: str
    transfers: str

    def __str__(self):
        return "-".join(self)


CHOICES = Case(FAMILIES, HOMES, ACTIVATIONS, PRECISIONS, TRANSFERS)


def cover(choices, strength):
    """Return values in which any ``strength`` choices of different kinds meet: greedily, the most new ones each
    time.
    """
    every = list(product(*choices))
    kinds = list(combinations(range(len(choices)), strength))
    met_by = {case: {(kind, tuple(case[i] for i in kind)) for kind in kinds} for case in every}
    left = set().union(*met_by.values())
    found = []
    while left:
        best = max(every, key=lambda case: len(met_by[case] & left))
        found.append(best)
        left -= met_by[best]
    return found


QUICK = [Case(*values) for values in cover(CHOICES, 2)]


def test_the_cover_is_one():
    assert len(QUICK) <= MOST
    met = {pair for case in QUICK for pair in combinations(enumerate(case), 2)}
    for (i, one), (j, other) in combinations(enumerate(CHOICES), 2):
        assert {((i, a), (j, b)) for a, b in product(one, other)} <= met
    assert not UNSUPPORTED


@pytest.mark.quick(
    "llama-device-off-float32-normal",
    "qwen3-device-inside-reentrant-bfloat16-LateTransfers",
    "gemma2-device-inside-other-autocast-LastTransfers",
    "gpt2-device-around-reentrant-nf4-nested-EarlyTransfers",
    "bloom-device-around-other-nf4-checked",
    "t5-disk-around-other-int8-LastTransfers",
    "mixtral-attention-host-around-other-torchao-int8-EarlyTransfers",
    "vit-device-inside-reentrant-float32-LastTransfers",
    "zamba2-device-around-reentrant-nf4-LastTransfers",
    "plain-device-off-autocast-EarlyTransfers",
)
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_pairs(case, tmp_path, monkeypatch):
    run(case, tmp_path, monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_llama(precision, tmp_path, monkeypatch, record_property):
    cases = [Case("llama", *rest) for rest in product(HOMES, ACTIVATIONS, [precision], TRANSFERS)]
    record_property("cases", len(cases))
    for case in cases:
        run(case, tmp_path, monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES[1:])
def test_pairs_of_each_family(family, tmp_path, monkeypatch, record_property):
    cases = [Case(family, *values) for values in cover(CHOICES[1:], 2)]
    record_property("cases", len(cases))
    for case in cases:
        run(case, tmp_path, monkeypatch)


def run(case, tmp_path, monkeypatch):
    """Train whole and planned, and compare."""
    checkpointing = "off" if case.activations == "offloaded" else case.activations
    options = {"steps": STEPS, "around_forward": families.around(case.precision), "batches": families.batches}
    whole = whole_run(case.family, case.precision, checkpointing)
    model = families.make(case.family, case.precision, checkpointing)
    plan = plan_of(model, case)
    assert {case.homes} <= {item.home for item in plan.items if item.kind == "weights"} <= {"device", case.homes}
    assert any(gradient.any() for gradient in whole.gradients[0].values())
    with monkeypatch.context() as patch:
        if case.transfers not in ("normal", "checked"):
            patch.setattr(install_module, "CpuTransfers", getattr(adversary, case.transfers))
        handle = attach(model, plan, checked=case.transfers == "checked", cache=tmp_path)
    with handle:
        planned = train(model, case.family, **options)
        record = handle.record
    assert_equal(whole, planned)
    policies = Counter(plan.policies().values())
    again = {module for module, policy in plan.policies().items() if policy == "recompute"}
    assert_forwards(whole, planned, again, steps=STEPS)
    assert (record.loads > 0) == (case.homes != "device")
    assert record.misses == record.out_of_order == 0
    if case.activations == "offloaded":
        assert policies.keys() == {"offload"}
        assert record.offload_skipped == 0
        assert record.offloaded_bytes == STEPS * plan.prediction.offloaded_bytes_per_pass > 0


@lru_cache(maxsize=8)
def whole_run(family, precision, checkpointing):
    options = {"around_forward": families.around(precision), "batches": families.batches}
    return train(families.make(family, precision, checkpointing), family, steps=STEPS, **options)


def plan_of(model, case):
    """A plan between the least vram and the most that has no use for more, every streamed block from one tier."""
    offloaded = case.activations == "offloaded"
    with families.around(case.precision)():
        graph = graph_of(model, families.batches(case.family), loss_of, offload=offloaded)
    table = cost_table(graph, CPU)
    workload = Workload(batch={}, tokens=graph.tokens, accumulation=1, optimizer="adamw", adapter="")
    activations = dict.fromkeys(graph.recomputable, "offload") if offloaded else {}

    def placed(vram, pins=None):
        budgets = Budgets(vram_bytes=vram, ram_bytes=GIB, disk_bytes=GIB if pins else 0)
        names = {"model": graph.model, "fingerprint": graph.fingerprint, "hardware": CPU.name}
        return place(table, budgets, workload=workload, activations=activations, pins=pins, **names)

    if case.homes == "device":
        return placed(GIB)
    with pytest.raises(DoesNotFitError) as caught:
        placed(1)
    least, most = caught.value.least_vram_bytes, placed(GIB).prediction.peaks.vram_bytes
    for share in (0.3, 0.1, 0.0):  # what is left of the weights may all fit, beside recomputed activations
        plan = placed(int(least + share * (most - least)))
        streamed = [item.block for item in plan.items if item.kind == "weights" and item.home != "device"]
        if streamed:
            break
    pins: dict[str, str] = {}
    while case.homes == "disk" and streamed:  # others may stream beside the disk
        pins |= dict.fromkeys(streamed, "disk")
        plan = placed(plan.budgets.vram_bytes, pins)
        streamed = [item.block for item in plan.items if item.kind == "weights" and item.home == "host"]
    return plan
