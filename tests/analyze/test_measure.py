"""Times are measured by access, on the device, of a model that is left as it was."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BertConfig, LlamaConfig, MixtralConfig, T5Config

import memplan
from memplan import cli
from memplan.analyze.blocks.measure import measure
from memplan.analyze.inputs.prepare import prepare
from memplan.analyze.repeat.periodic import find_runs
from memplan.analyze.repeat.unroll import short_name
from memplan.analyze.trace.trace import analyze
from memplan.cli.entry import OK
from memplan.cost.build import cost_table
from memplan.errors import InputError, ModelError
from memplan.hardware import machine
from memplan.hardware.calibrate import current
from memplan.units import GIB
from tests.support import quantized
from tests.support.training import CPU, batch_of, loss_of, make

SHAPE = (2, 16)
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LORA = {"rank": 4, "targets": "all-linear"}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, num_hidden_layers=12),
    "mixtral": MixtralConfig(**SMALL, num_hidden_layers=2, num_local_experts=3),
    "t5": T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=96, decoder_start_token_id=0),
}


@pytest.fixture(autouse=True)
def few_passes(monkeypatch):
    monkeypatch.setattr("memplan.analyze.blocks.measure.ENOUGH_S", 0.0)


def measured(config, **options):
    prepared = prepare(config, adapter={"rank": 4, "targets": ["q_proj", "v_proj", "q", "v"]}, buffers=True)
    graph = analyze(prepared.model, SHAPE, short=prepared.short)
    options = {"device": "cpu", "room_bytes": GIB, "short": prepared.short, **options}
    return prepared.model, graph, measure(prepared.model, SHAPE, graph, **options)


@pytest.mark.quick("llama", "mixtral")
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_access_has_its_time(kind):
    model, graph, times = measured(CONFIGS[kind])
    assert not times.unseen
    table = cost_table(graph, CPU, times)
    backwards = [row for row in table.accesses if row.kind == "backward" and row.module in graph.recomputable]
    assert backwards
    assert sum(row.recompute_s for row in backwards) > 0
    for row in table.accesses:
        assert 0 < row.time_s < 10
        assert row.time_s == times.access_s[row.index]
    # The model lies where it lay, and holds what it held.
    assert all(parameter.device.type == "meta" and parameter.grad is None for parameter in model.parameters())


def test_a_few_layers_run_for_all():
    model, graph, times = measured(CONFIGS["llama"])
    (run,) = find_runs(model)
    names = {access.module for access in graph.accesses if ".layers." in access.module}
    assert len(names) == 12
    assert len({short_name(name, (run,)) for name in names}) == 5
    assert {short_name(f"model.layers.{n}", (run,)) for n in (0, 1, 8, 9, 11)} == {
        f"model.layers.{n}" for n in (0, 1, 2, 4)
    }
    middle = {times.access_s[a.index] for a in graph.accesses if a.module == "model.layers.5" and a.kind == "forward"}
    assert middle == {
        times.access_s[a.index] for a in graph.accesses if a.module == "model.layers.2" and a.kind == "forward"
    }


def test_where_not_all_can_be_kept_layers_are_recomputed():
    _, graph, times = measured(CONFIGS["t5"], room_bytes=0)
    assert not times.unseen
    for access in graph.accesses:
        if access.kind == "backward" and access.module in graph.recomputable:
            assert times.recompute_s[access.index] == times.access_s[access.forward]


def test_a_module_of_the_users_own_is_as_it_was():
    model = make("plain")
    batch = batch_of("plain")
    random = torch.get_rng_state()
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    graph = analyze(model, batch, loss=loss_of)
    times = measure(model, batch, graph, device="cpu", room_bytes=GIB, loss=loss_of)
    assert not times.unseen
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is before[name][0]
        assert torch.equal(value, before[name][1])
        assert value.grad is None
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("kind", ["nf4", *(pytest.param(k, marks=pytest.mark.full) for k in ("int8", "torchao-int8"))])
def test_quantized_weights_are_measured_as_they_are_read(kind):
    model = quantized.make(kind)
    batch = batch_of("llama")
    graph = analyze(model, batch)
    before = [bytes(p.detach().contiguous().view(torch.uint8).numpy()) for p in model.parameters() if p.requires_grad]
    assert not measure(model, batch, graph, device="cpu", room_bytes=GIB).unseen
    after = [bytes(p.detach().contiguous().view(torch.uint8).numpy()) for p in model.parameters() if p.requires_grad]
    assert before == after
    model(**batch).loss.backward()  # it trains on


def test_a_pass_that_fails_leaves_the_model_as_it_was():
    model = make("plain")
    batch = batch_of("plain")
    graph = analyze(model, batch, loss=loss_of)

    def fails(output):
        raise ZeroDivisionError("no such loss")

    parameters = dict(model.named_parameters())
    with pytest.raises(ModelError, match=r"ZeroDivisionError: no such loss.*leave measure out"):
        measure(model, batch, graph, device="cpu", room_bytes=GIB, loss=fails)
    assert all(value is parameters[name] for name, value in model.named_parameters())


def test_another_machine_cannot_be_measured():
    with pytest.raises(InputError, match="not this machine"):
        memplan.plan(CONFIGS["llama"], SHAPE, adapter=LORA, hardware="t4", measure=True)


@pytest.mark.full
def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(current, "current", lambda: CPU)
    monkeypatch.setattr(machine, "is_here", lambda profile: True)
    CONFIGS["llama"].save_pretrained(tmp_path)
    given = ["plan", str(tmp_path), "--vram", "1GiB", "--seq", "16", "--dtype", "fp32", "--measure", "--json"]
    assert cli.main(given) == OK
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert any("were measured on this CPU" in note for note in notes)


@pytest.mark.full
def test_under_the_callers_own_autocast(monkeypatch):
    seen = []
    monkeypatch.setattr("memplan.analyze.blocks.measure._Passes.measured", lambda run: seen.append(run._lowered) or {})
    with torch.autocast("cpu", torch.bfloat16):
        measured(CONFIGS["t5"])
    measured(CONFIGS["t5"])
    assert set(seen[: len(seen) // 2]) == {torch.bfloat16}
    assert set(seen[len(seen) // 2 :]) == {None}


def test_classes_that_are_few_and_indices_stay_in_range():
    """Labels of a class for each token, and a table of positions in a buffer."""
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=96, num_labels=2,
        architectures=["BertForTokenClassification"],
    )  # fmt: skip
    prepared = prepare(config, adapter={"rank": 2, "targets": ["query"]}, buffers=True)
    graph = analyze(prepared.model, SHAPE)
    assert not measure(prepared.model, SHAPE, graph, device="cpu", room_bytes=GIB).unseen
