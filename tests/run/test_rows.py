"""A table of which only rows are read stays on the host, tied to the head or not: same bits, no room on the device."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from msgspec.structs import replace
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import memplan
from memplan.cost.build import cost_table
from memplan.errors import DoesNotFitError, PlanCheckError, RunError
from memplan.place.solve import place
from memplan.program.check.judge import check, require
from memplan.program.schema import Budgets, Workload
from memplan.program.timeline import durations, timeline_of
from memplan.run.attach import attach
from memplan.run.modules import install as install_module
from memplan.run.modules.embedding_rows import look_up_on_host
from memplan.units import GIB
from tests.run import adversary
from tests.run.test_memory import counted_step
from tests.support import inside
from tests.support.graphs import graph_of
from tests.support.training import CPU, assert_equal, checkpoint_layer, loss_of, train

WORDS, WIDTH, ROWS, LENGTH = 1024, 64, 2, 16
TABLE_BYTES = 4 * WORDS * WIDTH
ADVERSARIES = {kind.__name__: kind for kind in adversary.ALL}
CASES = [(kind, transfers) for kind in ("untied", "tied", "adapted", "t5") for transfers in ("normal", "checked")]
CASES += [("tied", transfers) for transfers in ADVERSARIES]


def batch_of(kind="", seed=3, length=LENGTH):
    tokens = torch.randint(1, WORDS, (ROWS, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "labels": tokens.clone()}


def make(kind, checkpointing="off", dropout=0.1):
    """``tied``, ``untied`` or ``adapted`` (an adapter on the embedding itself), or ``t5`` (tied, two embeddings)."""
    torch.manual_seed(0)
    if kind == "t5":
        base = T5ForConditionalGeneration(
            T5Config(
                d_model=WIDTH, d_kv=16, d_ff=96, num_layers=3, num_decoder_layers=3, num_heads=4, vocab_size=WORDS,
                dropout_rate=0.0, decoder_start_token_id=0, use_cache=False,
            )
        )  # fmt: skip
        targets = ["q", "v", "wo"]
    else:
        base = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=WIDTH, intermediate_size=176, num_hidden_layers=6, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=WORDS, max_position_embeddings=64, use_cache=False,
                tie_word_embeddings=kind == "tied",
            )
        )  # fmt: skip
        targets = ["q_proj", "down_proj", *(["embed_tokens"] if kind == "adapted" else [])]
    model = get_peft_model(base, LoraConfig(r=4, lora_dropout=dropout, target_modules=targets, init_lora_weights=False))
    if checkpointing != "off":
        base.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
        for layer in base.model.layers:
            checkpoint_layer(layer, checkpointing)
    return model.train()


@cache
def rows_of(kind, checkpointing):
    """What is planned from: each model is traced once."""
    return graph_of(make(kind, checkpointing), batch_of(), loss_of)


def plan_of(kind, *, share=0.3, checkpointing="off", table_at=None):
    """A plan ``share`` of the way from the least vram to what has use for no more. ``table_at``: a pin of the table."""
    graph = rows_of(kind, checkpointing)
    rows = cost_table(graph, CPU)
    workload = Workload(batch={}, tokens=graph.tokens, accumulation=1, optimizer="adamw", adapter="")
    pins = {} if table_at is None else {table_of(graph).id: table_at}

    def placed(vram, pins=pins):
        budgets = Budgets(vram_bytes=vram, ram_bytes=GIB, disk_bytes=GIB)
        names = {"model": graph.model, "fingerprint": graph.fingerprint, "hardware": CPU.name}
        return place(rows, budgets, workload=workload, pins=pins, **names)

    with pytest.raises(DoesNotFitError) as caught:
        placed(1)
    least, most = caught.value.least_vram_bytes, placed(GIB, {}).prediction.peaks.vram_bytes
    return placed(int(least + share * (most - least)))


def table_of(graph):
    return next(b for b in graph.blocks if b.kind in ("embedding", "shared") and b.size_bytes == TABLE_BYTES)


@pytest.mark.quick("untied-normal", "tied-LateTransfers", "tied-LastTransfers")
@pytest.mark.parametrize(("kind", "transfers"), CASES)
def test_three_steps(kind, transfers, tmp_path, monkeypatch):
    whole = train(make(kind), kind, batches=batch_of)
    model = make(kind)
    plan = plan_of(kind, share=0.0, table_at="host")
    assert plan.home_of(table_of(plan.table).id) == "host"
    if transfers in ADVERSARIES:
        monkeypatch.setattr(install_module, "CpuTransfers", ADVERSARIES[transfers])
    with attach(model, plan, cache=tmp_path, checked=transfers == "checked") as handle:
        assert_equal(whole, train(model, kind, batches=batch_of))
        record = handle.record
        assert (record.misses, record.out_of_order) == (0, 0)
        assert record.loads / record.passes == pytest.approx(plan.prediction.loads_per_pass, abs=2)
        read = {row.block for row in record.blocks}
        assert (table_of(plan.table).id in read) == (kind in ("tied", "t5"))  # the head needs all of it


@pytest.mark.parametrize("kind", ["untied", "adapted"])
def test_the_table_takes_no_room_on_the_device(kind, tmp_path):
    model = make(kind)
    plan = plan_of(kind, share=0.5)
    table = table_of(plan.table)
    assert plan.home_of(table.id) == "host"  # chosen, not asked for
    assert not [a for a in plan.addresses if a.item == table.id and plan.arenas[a.arena].tier == "device"]
    assert plan.prediction.rows_bytes_per_pass == ROWS * LENGTH * WIDTH * 4
    with attach(model, plan, cache=tmp_path) as handle:
        peak = counted_step(
            model, kind, batches=batch_of, apart=[arena.bytes for arena in inside.host_arenas(handle).values()]
        )
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        for _ in range(2):
            with handle.watch_memory(optimizer):
                model(**batch_of()).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        assert handle.record.vram_peak_bytes == pytest.approx(peak, rel=0.001)
    assert peak <= plan.budgets.vram_bytes
    assert plan.prediction.peaks.vram_bytes == pytest.approx(peak, rel=0.05)  # the table is 14% of it


@pytest.mark.quick("untied-inside-reentrant")
@pytest.mark.parametrize("checkpointing", ["inside-reentrant", "inside-other", "around-reentrant", "around-other"])
@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_under_checkpoints(kind, checkpointing, tmp_path):
    whole = train(make(kind, checkpointing), kind, batches=batch_of)
    model = make(kind, checkpointing)
    plan = plan_of(kind, share=0.0, checkpointing=checkpointing, table_at="host")
    with attach(model, plan, cache=tmp_path, checked=True):
        assert_equal(whole, train(model, kind, batches=batch_of))


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_off_the_sequence_too(kind, tmp_path):
    def results(model):
        found = list(train(model, kind, steps=1, batches=batch_of).adapters.values())
        with torch.inference_mode():
            found.append(model.eval()(**batch_of(seed=5, length=7)).logits.clone())
            found.append(model.generate(input_ids=batch_of()["input_ids"][:, :5], max_new_tokens=4, do_sample=False))
        model.train()
        first, second = (model(**batch_of(seed=seed)).loss for seed in (6, 7))
        table = model.get_base_model().get_input_embeddings()
        with pytest.raises(IndexError):  # a forward that raises
            table(torch.tensor([WORDS]))
        (first + second).backward()
        return [*found, *(p.grad for p in model.parameters() if p.requires_grad)]

    whole, model = make(kind), make(kind)
    plan = plan_of(kind, share=0.0, table_at="host")
    with attach(model, plan, cache=tmp_path, checked=True):
        one, other = results(whole), results(model)
        assert [torch.equal(a, b) for a, b in zip(one, other, strict=True)] == [True] * len(one)
        with memplan.materialise(model):
            for (name, a), b in zip(whole.named_parameters(), model.parameters(), strict=True):
                assert torch.equal(a, b), name
        state = model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert_equal(train(whole, kind, batches=batch_of), train(model, kind, batches=batch_of))


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_from_the_disk_it_comes_whole(kind, tmp_path):
    whole, model = train(make(kind), kind, batches=batch_of), make(kind)
    plan = plan_of(kind, share=0.0, table_at="disk")
    table = table_of(plan.table)
    assert plan.home_of(table.id) == "disk"
    assert plan.prediction.rows_bytes_per_pass == 0
    with attach(model, plan, cache=tmp_path, checked=True) as handle:
        assert_equal(whole, train(model, kind, batches=batch_of))
        assert any(row.block == table.id and row.loads for row in handle.record.blocks)


@pytest.mark.quick("untied")
@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_a_smaller_plan_after_running_out_of_memory(kind, tmp_path):
    whole = train(make(kind), kind, steps=4, batches=batch_of)
    model = make(kind)
    plan = plan_of(kind, share=0.9)
    smaller = plan_of(kind, share=0.0, table_at="host")
    with attach(model, plan, cache=tmp_path, checked=True, replan=lambda plan, vram: smaller) as handle:
        steps = iter(range(100))

        def stepped(**batch):
            if next(steps) == 1:
                inside.take_less(handle)
            return model(**batch)

        planned = train(_Called(model, stepped), kind, steps=4, batches=batch_of)
        assert handle.plan.home_of(table_of(plan.table).id) == "host"
        assert handle.record.recoveries == 1
        held = [handle.record.ram_peak_bytes]
        for _ in range(2):
            inside.take_less(handle)
            held.append(handle.record.ram_peak_bytes)
        assert len(set(held)) == 1  # what lies in RAM is not copied there again
    assert_equal(whole, replace_names(planned))


class _Called(nn.Module):
    def __init__(self, model, call):
        super().__init__()
        self.inner = model
        self._call = call

    def forward(self, **batch):
        return self._call(**batch)


def replace_names(run):
    """Without the wrapper's name."""
    run.adapters = {name.removeprefix("inner."): value for name, value in run.adapters.items()}
    run.gradients = [{n.removeprefix("inner."): g for n, g in step.items()} for step in run.gradients]
    return run


def test_a_device_of_its_own_reads_the_rows_over_the_link():
    plan = plan_of("untied", share=0.5)
    table = replace(plan.table, device="cuda")
    assert timeline_of(plan).pass_s == pytest.approx(plan.prediction.pass_s)
    here, there = (sum(durations(t, plan.policies(), {table_of(plan.table).id})) for t in (plan.table, table))
    assert there - here == pytest.approx(plan.prediction.rows_bytes_per_pass / table.host_to_device_bytes_per_s)
    remade = place(
        table, plan.budgets, model="m", fingerprint="f", workload=plan.workload, hardware="h", pins=plan.pins
    )
    assert check(remade) == ()
    assert remade.prediction.compute_s >= plan.prediction.compute_s


def test_the_judge_wants_the_table_where_it_is_read(tmp_path):
    plan = plan_of("untied", share=0.5)
    table = table_of(plan.table)
    away = tuple(replace(i, home="disk") if i.block == table.id else i for i in plan.items)
    with pytest.raises(PlanCheckError, match=r"reads model\.embed_tokens, which no residence has on the device"):
        require(replace(plan, items=away))
    claimed = replace(plan.prediction, rows_bytes_per_pass=1)
    with pytest.raises(PlanCheckError, match="rows"):
        require(replace(plan, prediction=claimed))


def test_a_compiled_table_in_the_checked_mode(tmp_path):
    """What torch.compile has wrapped is one module to those who watch."""

    def compiled():
        model = make("untied")
        base = model.get_base_model()
        base.set_input_embeddings(torch.compile(base.get_input_embeddings(), backend="eager"))
        return model

    whole = train(make("untied"), "untied", batches=batch_of)
    model = compiled()
    with attach(model, plan_of("untied", share=0.0, table_at="host"), cache=tmp_path, checked=True):
        planned = train(model, "untied", batches=batch_of)
    assert_equal(whole, planned)


def test_looking_up_on_the_host():
    """What page-locking's refusal leaves: the module runs on the CPU, and what it makes goes to the device."""
    table = nn.Embedding(WORDS, WIDTH)
    tokens = batch_of()["input_ids"]
    expected = table(tokens)
    undo = look_up_on_host(table, torch.device("meta"))
    assert table(tokens).device.type == "meta"
    undo()
    undo = look_up_on_host(table, torch.device("cpu"))
    assert torch.equal(table(input=tokens), expected)
    undo()
    assert "forward" not in table.__dict__

    class Scaled(nn.Embedding):
        def forward(self, input):
            return super().forward(input) * 2

    with pytest.raises(RunError, match="keep its block on the device"):
        look_up_on_host(Scaled(WORDS, WIDTH), torch.device("cpu"))
