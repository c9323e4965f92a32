"""How long a whole run takes: steps counted from examples as transformers' Trainer counts them, kept in the plan."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig

import memplan
from memplan.show import terminal
from tests.support.graphs import traced_once
from tests.support.training import CPU

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.fixture(autouse=True, scope="module")
def it_is_traced_once():
    with traced_once():
        yield


def planned(**options):
    return memplan.plan(CONFIG, (4, 8), adapter={"rank": 2}, vram="1GiB", ram="1GiB", hardware=CPU, **options)


@pytest.mark.quick("options0-None-None", "options2-3-1", "options3-6-3", "options4-2-2")
@pytest.mark.parametrize(
    ("options", "steps", "epochs"),
    [
        ({}, None, None),
        ({"steps": 7}, 7, None),
        ({"examples": 10}, 3, 1),
        # 3 batches, so a step of 2 and one of 1, in each epoch.
        ({"examples": 10, "epochs": 3, "accumulation": 2}, 6, 3),
        ({"examples": 1, "epochs": 2, "accumulation": 8}, 2, 2),
    ],
)
def test_steps(options, steps, epochs):
    plan = planned(**options)
    assert (plan.workload.steps, plan.workload.epochs, plan.workload.examples) == (
        steps,
        epochs,
        options.get("examples"),
    )
    result = terminal.as_dict(plan)
    assert result["run_s"] == (None if steps is None else steps * plan.prediction.step_s)


def test_plans_from_before_are_read(tmp_path):
    plan = planned(steps=7)
    plan.save(tmp_path / "plan.json")
    assert memplan.Plan.load(tmp_path / "plan.json") == plan
    held = json.loads((tmp_path / "plan.json").read_text())
    for name in ("steps", "examples", "epochs"):
        del held["workload"][name]
    (tmp_path / "old.json").write_text(json.dumps(held))
    assert memplan.Plan.load(tmp_path / "old.json") == planned()


def test_a_batch_without_a_length():
    given = {"adapter": {"rank": 2}, "vram": "1GiB", "ram": "1GiB", "hardware": CPU}
    assert memplan.plan(CONFIG, (4,), examples=10, **given).workload.steps == 3
