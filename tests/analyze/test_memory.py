"""What the graph says of memory against a real step on the CPU."""

from __future__ import annotations

import networkx
import pytest
import torch

from memplan.cost.table import AccessRow, CostTable
from memplan.hooks import recompute
from memplan.hooks.triggers import modules_by_name
from tests.analyze.steps import count_pass
from tests.support import models
from tests.support.graphs import analyze_once

MAKERS = {name: getattr(models, name) for name in ("llama", "gpt2", "t5", "mixtral", "plain")}


def live_bytes(graph, policy="keep", upto=None):
    """Device bytes at each access besides those that are fixed, by the formula that plans use."""
    rows = tuple(
        AccessRow(
            index=a.index,
            kind=a.kind,
            module=a.module,
            forward=a.forward,
            blocks=a.blocks,
            time_s=0.0,
            recompute_s=0.0,
            transient_bytes=a.transient_bytes,
            transient_recompute_bytes=a.transient_recompute_bytes,
        )
        for a in graph.accesses
    )
    table = CostTable(
        blocks=graph.blocks,
        accesses=rows,
        lifetimes=graph.lifetimes,
        fixed=(),
        recomputable=graph.recomputable,
        device="cpu",
        host_to_device_bytes_per_s=1.0,
        device_to_host_bytes_per_s=1.0,
        disk_bytes_per_s=1.0,
        load_latency_s=0.0,
    )
    policies = policy if isinstance(policy, dict) else dict.fromkeys(graph.recomputable, policy)
    return [table.device_bytes_at(index, policies) for index in range(len(rows) - 1)]


@pytest.mark.quick("llama-0.0", "gpt2-0.1", "mixtral-0.1", "plain-0.1")
@pytest.mark.parametrize(("name", "dropout"), [("llama", 0.0), *((name, 0.1) for name in MAKERS)])
def test_peak_of_a_pass(name, dropout):
    model, batch = MAKERS[name](dropout)
    predicted, counted = max(live_bytes(analyze_once(model, batch))), count_pass(model, batch)
    # What a recomputed layer would hold of a cache and of masks counts, though here is none.
    assert 0.98 * counted <= predicted <= 1.03 * counted


@pytest.mark.quick("llama", "gpt2", "mixtral", "plain")
@pytest.mark.parametrize("name", MAKERS)
def test_peak_where_all_is_recomputed(name):
    model, batch = MAKERS[name](0.1)
    graph = analyze_once(model, batch)
    by_name = modules_by_name(model)
    undo = [recompute.wrap(by_name[module]) for module in graph.recomputable]
    assert len(undo) >= 2
    real = count_pass(model, batch)
    for back in undo:
        back()
    assert max(live_bytes(graph, "recompute")) == pytest.approx(real, rel=0.05)


@pytest.mark.quick("llama", "plain")
@pytest.mark.parametrize("name", ["llama", "t5", "plain"])
def test_peak_where_some_are_recomputed(name):
    model, batch = MAKERS[name](0.1)
    graph = analyze_once(model, batch)
    some = graph.recomputable[1::2]
    by_name = modules_by_name(model)
    undo = [recompute.wrap(by_name[module]) for module in some]
    real = count_pass(model, batch)
    for back in undo:
        back()
    policies = {module: "recompute" if module in some else "keep" for module in graph.recomputable}
    assert max(live_bytes(graph, policies)) == pytest.approx(real, rel=0.1)


@pytest.mark.each_value
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "plain"])
def test_peak_where_the_model_checkpoints_itself(name, reentrant):
    if name == "plain":
        model, batch = models.plain(0.1, "reentrant" if reentrant else "other")
    else:
        model, batch = MAKERS[name](0.1)
        with models.quiet():
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.config.use_cache = False
    graph = analyze_once(model, batch)
    assert graph.recomputable == ()
    assert any("checkpoints" in note for note in graph.notes)
    assert max(live_bytes(graph)) == pytest.approx(count_pass(model, batch), rel=0.05)


def test_lifetimes_and_transients_are_consistent():
    model, batch = models.llama()
    graph = analyze_once(model, batch)
    last = len(graph.accesses) - 1
    assert all(0 <= life.born < life.last <= last for life in graph.lifetimes)
    gradients = sum(
        life.size_bytes for life in graph.lifetimes if life.kind == "gradients" and life.policy != "recompute"
    )
    assert gradients == graph.trainable_bytes
    assert all(life.last == last for life in graph.lifetimes if life.kind == "gradients")
    assert {life.policy for life in graph.lifetimes} == {"any", "keep", "recompute"}


def test_with_accumulation_gradients_are_there_from_the_first_access():
    model, batch = models.llama()
    graph = analyze_once(model, batch, accumulation=4)
    gradients = [life for life in graph.lifetimes if life.kind == "gradients"]
    assert {(life.born, life.last) for life in gradients} == {(0, len(graph.accesses) - 1)}
    assert sum(life.size_bytes for life in gradients) == graph.trainable_bytes


def test_recomputing_spares_memory_and_adds_work():
    model, batch = models.llama()
    graph = analyze_once(model, batch)
    assert max(live_bytes(graph, "recompute")) < max(live_bytes(graph)) / 2
    for access in graph.accesses:
        if access.kind == "backward" and access.module in graph.recomputable:
            forward = graph.accesses[access.forward]
            assert 0.5 * forward.flops < access.recompute_flops <= forward.flops
        else:
            assert access.recompute_flops == 0
            assert access.transient_recompute_bytes == access.transient_bytes or access.module in graph.recomputable


def test_a_half_precision_base_with_float32_adapters_is_noted():
    model, batch = models.llama()
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    graph = analyze_once(model, batch)
    assert any("float32" in note for note in graph.notes)
    assert graph.matmul_dtype == "bfloat16"
    assert max(live_bytes(graph)) == pytest.approx(count_pass(model, batch), rel=0.05)


def test_fixed_bytes():
    model, batch = models.llama()
    fixed = {row.kind: row.size_bytes for row in analyze_once(model, batch).fixed}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(**batch).loss.backward()
    optimizer.step()
    held = [v for state in optimizer.state.values() for v in state.values()]
    assert fixed["optimizer"] == sum(v.numel() * v.element_size() for v in held)
    assert fixed["adapters"] == sum(p.numel() * p.element_size() for p in trained)
    assert fixed["batch"] == 3 * models.BATCH * models.SEQUENCE * 8
    placeholder = 4  # one float32 element, expanded, stands for what is away
    assert fixed["buffers"] == sum(b.numel() * b.element_size() for b in model.buffers()) + placeholder


def test_the_graph_for_networkx_holds_every_access_and_every_saved_byte():
    graph = analyze_once(*models.llama(0.0))
    drawn = graph.to_networkx()
    assert networkx.is_directed_acyclic_graph(drawn)
    assert list(networkx.topological_sort(drawn)) == [access.index for access in graph.accesses]
    assert {node: tuple(drawn.nodes[node]["blocks"]) for node in drawn} == {
        a.index: tuple(a.blocks) for a in graph.accesses
    }
    for at in range(len(graph.accesses)):
        across = sum(size for born, last, size in drawn.edges(data="saved_bytes") if born < at <= last)
        alive = [life for life in graph.lifetimes if life.policy != "recompute" and life.born < at <= life.last]
        assert across == sum(life.size_bytes for life in alive)
