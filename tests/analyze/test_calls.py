"""What a model is called with, and how: positions, keywords, both, several calls a pass, in evaluation mode."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import BatchEncoding

import memplan
from memplan.analyze.trace.trace import analyze
from memplan.model.calls import Call, Step
from tests.support.training import CPU, make

IDS = torch.arange(32).view(2, 16)
HALF = torch.tensor(0.5)


@dataclass
class Batch:
    x: torch.Tensor
    weight: float = 0.5


class OfBatch(torch.nn.Module):
    """Takes one object."""

    def __init__(self, read):
        super().__init__()
        self.inner, self.read = make("plain"), read

    def forward(self, batch, scale):
        return self.inner(self.read(batch)) * scale


def sizes(graph):
    return [(access.kind, access.module, access.flops) for access in graph.accesses], graph.lifetimes, graph.fixed


def test_positions_keywords_and_both_are_one_call():
    model = OfBatch(lambda batch: batch)
    graphs = [analyze(model, given) for given in ({"batch": IDS, "scale": HALF}, Call(IDS, scale=HALF), (IDS, HALF))]
    assert sizes(graphs[0]) == sizes(graphs[1]) == sizes(graphs[2])
    assert {graph.tokens for graph in graphs} == {32}


def test_the_plan_says_the_shapes_of_both():
    model, call = OfBatch(lambda batch: batch), memplan.Call(IDS, scale=HALF)
    plan = memplan.plan(model, call, vram="64MiB", ram="64MiB", hardware=CPU, gains=False)
    assert plan.workload.batch == {"0": (2, 16), "scale": ()}


@pytest.mark.parametrize(
    ("batch", "read"),
    [
        ({"input_ids": IDS}, lambda batch: batch["input_ids"]),
        (BatchEncoding({"input_ids": IDS}), lambda batch: batch.input_ids),
        (Batch(IDS), lambda batch: batch.x),
    ],
    ids=["dict", "encoding", "dataclass"],
)
def test_a_batch_that_is_one_object_stays_of_its_class(batch, read):
    graph = analyze(OfBatch(read), Call(batch, scale=2.0))
    assert graph.tokens == 32
    assert read(batch) is IDS


def test_a_step_is_planned_for_in_the_mode_that_the_model_is_in():
    model = make("plain", dropout=0.1).eval()
    saved = {}
    for name, given in (("train", Call(IDS)), ("as it is", Step(calls=(Call(IDS),)))):
        graph = analyze(model, given)
        saved[name] = sum(life.size_bytes for life in graph.lifetimes if life.kind == "activations")
        assert not any(module.training for module in model.modules())
    assert saved["as it is"] < saved["train"]
    model.train()
    assert analyze(model, Step(calls=(Call(IDS),))) == analyze(model, Call(IDS))


def test_the_calls_of_a_pass_add_up():
    model = make("plain")
    one = analyze(model, {"input_ids": IDS})
    two = analyze(model, Step(calls=(Call(input_ids=IDS), Call(input_ids=IDS + 1))))
    forwards = [[a.module for a in graph.accesses if a.kind == "forward"] for graph in (one, two)]
    assert forwards[1] == forwards[0] * 2
    assert two.tokens == 64
    assert sum(a.flops for a in two.accesses) == 2 * sum(a.flops for a in one.accesses)


def test_a_pass_may_enter_a_module_within():
    hidden = torch.randn(2, 16, 48, requires_grad=True)
    graph = analyze(make("plain"), Step(calls=(Call.of("layers.1", (), {"x": hidden}),)))
    called = [access.module for access in graph.accesses if access.kind == "forward"]
    assert called == ["layers.1"]
    assert hidden.grad is None


def test_what_nobody_has_seen_called_is_planned_as_read_too():
    hidden = torch.randn(2, 16, 48, requires_grad=True)
    graph = analyze(make("plain"), Step(calls=(Call.of("layers.1", (hidden,), {}),), reads_rest=True))
    forwards = [access.module for access in graph.accesses if access.kind == "forward"]
    backwards = [access for access in graph.accesses if access.kind == "backward"]
    rest = ["embed", "layers.0", *(f"layers.{number}" for number in range(2, 6)), "head"]
    assert forwards == ["layers.1", *rest]
    assert [access.module for access in backwards] == [*reversed(rest), "layers.1"]
    assert all(graph.accesses[access.forward].module == access.module for access in backwards)
    assert not any(block.pinned_because for block in graph.blocks)
