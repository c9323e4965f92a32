"""The loss of causal models in chunks of tokens: gradients of the full loss, peaks as planned, right or refused."""

from __future__ import annotations

import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Trainer,
    TrainingArguments,
)

import memplan
from memplan.errors import DoesNotFitError, InputError, ModelError, RunError
from memplan.hooks import chunked_loss
from memplan.hooks.chunked_loss import CHUNK_BYTES, PendingLogits, chunk_loss, chunk_tokens
from memplan.units import GIB
from tests.support.counting import LiveBytes, held_by
from tests.support.training import CPU, make

VOCABULARY, CHUNK = 512, 8
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 128, "dtype": "float32",
    "use_cache": False, "pad_token_id": 0,
}  # fmt: skip
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 16, "final_logit_softcapping": 2.0}),
    "cohere": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.3}),
    "granite": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 3.0}),
    "phi": (PhiForCausalLM, PhiConfig, {}),  # its head has a bias
}
BUDGETS = {"ram": "1GiB", "hardware": CPU, "gains": False}


@pytest.fixture(autouse=True)
def chunks_are_small(monkeypatch):
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 4 * VOCABULARY * CHUNK)


def model_of(kind="llama", **more):
    of, config, settings = KINDS[kind]
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **more)
    return get_peft_model(of(config(**SIZES, **settings)), lora).train()


def batch_of(rows=2, length=24):
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :7] = -100
    return {"input_ids": ids, "labels": labels}


def adapter_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def gradients_of(model, **call):
    model.zero_grad()
    output = model(**batch_of() | call)
    (2 * output.loss).backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trained(model, steps=3, **sizes):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**batch_of(**sizes)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, adapter_of(model)


CALLS = {
    "mean": {},
    "of the batch": {"num_items_in_batch": torch.tensor(77)},
    "a number": {"num_items_in_batch": 77},
    "shifted": {"shift_labels": torch.arange(48).view(2, 24) % 9},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.each_value
def test_gradients_are_those_of_the_full_loss(kind, call):
    model = model_of(kind)
    full, expected = gradients_of(model, **call)
    undo = chunk_loss(model)
    output, found = gradients_of(model, **call)
    undo()
    torch.testing.assert_close(output.loss, full.loss, rtol=1e-6, atol=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6)
    again, gradients = gradients_of(model, **call)  # the model is as it was
    assert torch.equal(again.loss, full.loss)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())
    assert not {"forward", "_loss_function"} & model.get_base_model().__dict__.keys()


def test_under_autocast_and_in_bfloat16_the_loss_is_near_the_full_one():
    model = model_of()
    for of in (model, model.to(torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16):
            full, expected = gradients_of(of)
            undo = chunk_loss(of)
            output, found = gradients_of(of)
            undo()
        torch.testing.assert_close(output.loss, full.loss, rtol=1e-3, atol=0)
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() < 0.05 * gradient.norm()  # as far as bfloat16 itself


def test_logits_are_not_there_in_training_and_are_in_evaluation():
    model = model_of()
    with torch.no_grad():
        expected = model.eval()(**batch_of()).logits
    undo = chunk_loss(model)
    output = model.train()(**batch_of())
    logits = output.logits
    assert (type(logits), logits.shape, logits.dtype) == (PendingLogits, expected.shape, expected.dtype)
    for read in (lambda: logits.argmax(-1), lambda: logits / 2, lambda: logits[0], lambda: logits.detach().numpy()):
        with pytest.raises(RunError, match="not made"):
            read()
    with torch.no_grad():
        assert torch.equal(model(**batch_of()).logits, expected)  # no gradients: as ever
        assert torch.equal(model.eval()(input_ids=batch_of()["input_ids"]).logits, expected)
    with pytest.raises(RunError, match="without labels"):
        model.train()(input_ids=batch_of()["input_ids"])
    with pytest.raises(RunError, match="labels of"):
        model(**batch_of(), logits_to_keep=4)
    assert torch.equal(model.eval()(**batch_of()).logits, expected)  # an error leaves the head in its place
    undo()


def test_a_hook_that_comes_later_is_refused():
    model = model_of()
    with memplan.attach(model, memplan.plan(model, batch_of(), vram="1GiB", loss="chunked", **BUDGETS)):
        model(**batch_of()).loss.backward()
        model.get_base_model().lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        with pytest.raises(RunError, match="has hooks"):
            model(**batch_of())


def test_what_has_another_loss_is_refused_before_anything_is_computed():
    shape = {"vram": "1GiB", "loss": "chunked", **BUDGETS}
    t5 = make("t5")
    batch = {"input_ids": torch.ones(1, 8, dtype=torch.long), "labels": torch.ones(1, 8, dtype=torch.long)}
    with pytest.raises(ModelError, match="not made"):
        memplan.plan(t5, batch, **shape)
    with pytest.raises(ModelError, match=r"its head is trained|no head that"):
        memplan.plan(model_of(modules_to_save=["lm_head"]), batch_of(), **shape)
    with pytest.raises(ModelError, match="float16"):
        memplan.plan(model_of().half(), batch_of(), **shape)
    with pytest.raises(ModelError, match="no head that"):
        memplan.plan(make("plain"), {"input_ids": batch["input_ids"]}, **shape)
    hooked = model_of()
    hooked.get_base_model().lm_head.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ModelError, match="has hooks"):
        memplan.plan(hooked, batch_of(), **shape)
    with pytest.raises(InputError, match="one of full, chunked, fused"):
        memplan.plan(model_of(), batch_of(), vram="1GiB", loss="liger")
    with pytest.raises(InputError, match="groups of 2"):
        memplan.plan(model_of(), batch_of(), accumulation=2, group=2, **shape)
    plan = memplan.plan(model_of(), batch_of(), **{**shape, "loss": "fused"})
    with pytest.raises(InputError, match="to look at"):
        memplan.attach(model_of(), plan)


SHAPES = [(1, 16), (2, 24), (4, 64)]


@pytest.mark.parametrize("rows_length", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["llama", "cohere", "phi"])
@pytest.mark.each_value
def test_its_peak_is_as_planned(kind, rows_length):
    model, batch = model_of(kind), batch_of(*rows_length)
    plan = memplan.plan(model, batch, loss="chunked", vram="1GiB", activations="keep", **BUDGETS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    undo = chunk_loss(model)
    step()
    gc.collect()
    with LiveBytes([*held_by(model, optimizer), *batch.values()]) as counted:
        step()
    undo()
    assert counted.peak <= plan.prediction.peaks.vram_bytes <= 1.01 * counted.peak


def test_under_a_plan_the_head_streams_and_the_bits_are_those_of_chunks_alone():
    model = model_of()
    undo = chunk_loss(model)
    expected = trained(model)
    undo()
    options = {**BUDGETS, "loss": "chunked", "pins": {"lm_head": "host"}}
    model = model_of()
    with pytest.raises(DoesNotFitError) as caught:
        memplan.plan(model, batch_of(), vram=1, **options)
    plan = memplan.plan(model, batch_of(), vram=caught.value.least_vram_bytes, **options)
    assert plan.workload.loss == "chunked"
    assert any("8 tokens at a time" in note for note in plan.notes)
    handle = memplan.attach(model, plan, checked=True)
    losses, adapter = trained(model)
    assert losses == expected[0]
    assert all(torch.equal(adapter[name], value) for name, value in expected[1].items())
    record = handle.record
    assert (record.misses, record.direct_reads) == (0, 0)
    assert record.loads >= 3 * plan.prediction.loads_per_pass > 0
    handle.detach()
    assert type(model(**batch_of()).logits) is torch.Tensor


def test_a_large_vocabulary_costs_a_third_of_a_gib_at_most(monkeypatch):
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", CHUNK_BYTES)
    sizes = {**SIZES, "vocab_size": 128256, "hidden_size": 32, "intermediate_size": 32, "max_position_embeddings": 2048}
    config = LlamaConfig(**{**sizes, "dtype": "bfloat16"}, tie_word_embeddings=True)
    peaks = {}
    for loss in ("full", "chunked"):
        options = {"adapter": {"rank": 2}, "dtype": "bf16", "vram": "8GiB", "loss": loss, **BUDGETS}
        plan = memplan.plan(config, (1, 2048), activations="recompute", **options)
        peaks[loss] = plan.prediction.peaks.vram_bytes - plan.prediction.vram_parts["weights"]
    assert peaks["full"] > 2.4 * GIB
    assert peaks["chunked"] < 0.3 * GIB
    assert chunk_tokens(128256, 4096, 2048) == 128
    assert chunk_tokens(128256, 4096, 2048, "fused") == 64  # Liger's: next power of two of 2048 / 32


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        row = (torch.arange(20) * 7 + index) % 89 + 3
        return {"input_ids": row, "labels": row}


def trainer_of(out, **more):
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no", learning_rate=1e-2, **more,
    )  # fmt: skip
    return Trainer(model=model_of(), args=arguments, train_dataset=Rows(), eval_dataset=Rows())


@pytest.mark.parametrize("more", [{}, {"bf16": True}], ids=str)
def test_a_trainer_that_is_wrapped(more, tmp_path):
    alone = trainer_of(tmp_path, **more)
    undo = chunk_loss(alone.model)
    alone.train()
    expected, loss = adapter_of(alone.model), alone.evaluate()["eval_loss"]
    undo()
    trainer = trainer_of(tmp_path, **more)
    memplan.wrap(trainer, vram="1GiB", loss="chunked", pins={"lm_head": "host"}, **BUDGETS)
    trainer.train()
    assert all(torch.equal(value, expected[name]) for name, value in adapter_of(trainer.model).items())
    assert trainer.evaluate()["eval_loss"] == loss


def test_a_trainer_with_another_loss_is_refused(tmp_path):
    with pytest.raises(ModelError, match="without labels"):
        memplan.wrap(trainer_of(tmp_path, label_smoothing_factor=0.1), vram="1GiB", loss="chunked", **BUDGETS)
