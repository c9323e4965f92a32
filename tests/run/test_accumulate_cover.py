"""Micro-batches that take turns at each block, over everything at once: family, checkpointing, precision, groups.

A pairwise cover (any two choices meet in some case), of which the quick suite has some. Whole and one by one against
planned and in turns, three AdamW steps: losses, gradients and adapters to the last bit.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import pytest
from torch import nn

from memplan.run.attach import attach
from tests.run import test_parity_cover
from tests.run.test_parity_cover import cover
from tests.support import families
from tests.support.families import FAMILIES
from tests.support.groups import in_groups, train_in_groups
from tests.support.training import CHECKPOINTING, assert_equal, train

pytestmark = pytest.mark.filterwarnings("ignore")  # the quantizers' own, of versions and of float32 inputs

PRECISIONS = ("float32", "autocast", "bfloat16", "nf4", "nf4-nested", "torchao-int8")
GROUPS = ("2-of-8", "3-of-8", "4-of-8", "8-of-8", "4-of-6")
WATCHED = ("plain", "checked", "traced")
STEPS = 2


class Case(NamedTuple):
    family: str
    homes: str
    checkpointing: str
    precision: str
    groups: str
    watched: str

    def __str__(self):
        return "-".join(self)


CHOICES = Case(FAMILIES, ("host", "disk"), CHECKPOINTING, PRECISIONS, GROUPS, WATCHED)
CASES = [Case(*values) for values in cover(CHOICES, 2)]
assert len(CASES) >= 60


def make(family, precision, checkpointing):
    """No dropout: it would have micro-batches go one by one."""
    model = families.make(family, precision, checkpointing)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@lru_cache(maxsize=8)
def whole_run(family, precision, checkpointing, accumulation):
    options = {"around_forward": families.around(precision), "batches": families.batches}
    return train(make(family, precision, checkpointing), family, steps=STEPS, accumulation=accumulation, **options)


@pytest.mark.quick(
    "llama-disk-inside-reentrant-autocast-3-of-8-checked",
    "qwen3-host-inside-reentrant-bfloat16-4-of-8-traced",
    "gemma2-host-inside-other-nf4-nested-4-of-6-checked",
    "gpt2-disk-off-bfloat16-4-of-6-plain",
    "bloom-host-around-reentrant-nf4-nested-4-of-6-plain",
    "t5-host-around-other-nf4-4-of-6-traced",
    "mixtral-attention-host-around-reentrant-float32-4-of-6-traced",
    "mixtral-experts-host-inside-other-float32-8-of-8-plain",
    "vit-host-off-float32-2-of-8-traced",
    "zamba2-host-off-torchao-int8-2-of-8-plain",
    "plain-host-around-other-nf4-nested-4-of-6-plain",
    "llama-host-off-nf4-nested-2-of-8-plain",
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pairs(case, tmp_path):
    group, accumulation = map(int, case.groups.split("-of-"))
    whole = whole_run(case.family, case.precision, case.checkpointing, accumulation)
    model = make(case.family, case.precision, case.checkpointing)
    plan = test_parity_cover.plan_of(
        model, test_parity_cover.Case(case.family, case.homes, case.checkpointing, case.precision, "normal")
    )
    loads: list[int] = []
    watched = {"checked": case.watched == "checked", "traced": case.watched == "traced"}
    with attach(model, in_groups(plan, group), cache=tmp_path, **watched) as handle:
        options = {"around_forward": families.around(case.precision), "batches": families.batches}
        run = train_in_groups(
            model, case.family, handle, steps=STEPS, accumulation=accumulation, loads=loads, **options
        )
        record = handle.record
    assert_equal(whole, run)
    assert any(gradient.any() for gradient in whole.gradients[0].values())
    assert record.passes == STEPS * accumulation
    assert loads[-1] == -(-accumulation // group) * plan.prediction.loads_per_pass > 0
    assert record.misses == record.out_of_order == 0
