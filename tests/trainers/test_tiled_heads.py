"""TRL's trainers, whose loss multiplies with the head's weight by tiles: accesses of the head, which streams."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer import utils

import memplan
from memplan.errors import DoesNotFitError, InputError
from memplan.hooks.tiled_heads import serve_tiles
from memplan.trainers.hf_trainer import plan_for
from tests.support.training import CPU
from tests.trainers.small import save_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 128, "dtype": "float32",
    "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**SIZES, head_dim=16, tie_word_embeddings=False)),
}
PINS = {"device": {}, "host": {"lm_head": "host"}, "all": {f"layers.{index}": "host" for index in range(4)}}
BUDGETS = {"vram": "1GiB", "ram": "1GiB", "hardware": CPU}
COMMON = {
    "learning_rate": 1e-2, "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 7, "save_strategy": "no",
    "bf16": False, "max_steps": 2, "max_grad_norm": 0.0, "gradient_checkpointing": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def build(kind, tokenizer, out, *, batch=2, length=32, dpo=False):
    of, config = KINDS[kind]
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    common = {**COMMON, "output_dir": str(out), "per_device_train_batch_size": batch}
    if dpo:
        rows = [{"prompt": f"a block {i}", "chosen": " waits in memory", "rejected": " no"} for i in range(8)]
        return DPOTrainer(
            model=of(config), args=DPOConfig(max_length=length, **common), train_dataset=Dataset.from_list(rows),
            peft_config=lora, processing_class=tokenizer,
        )  # fmt: skip
    rows = [[(i * 7 + j) % 89 + 3 for j in range(length)] for i in range(8)]
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])
    return SFTTrainer(
        model=of(config), args=SFTConfig(max_length=length, **common), train_dataset=data, peft_config=lora,
        processing_class=tokenizer,
    )  # fmt: skip


def trained(trainer):
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("home", PINS)
@pytest.mark.parametrize("batch_length", [(1, 32), (2, 64)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.each_value
def test_the_peak_is_as_planned_and_the_adapter_the_same(kind, batch_length, home, tokenizer, tmp_path):
    batch, length = batch_length
    whole = trained(build(kind, tokenizer, tmp_path, batch=batch, length=length))
    pins = PINS[home]
    if kind == "qwen3" and home == "host":  # tied: the head is the embedding
        pins = {"embed_tokens": "host"}
    trainer = build(kind, tokenizer, tmp_path, batch=batch, length=length)
    memplan.wrap(trainer, pins=pins, activations="keep", **BUDGETS)
    handle = trainer.memplan
    with handle.watch_memory():
        found = trained(trainer)
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    head = next(b for b in handle.plan.table.blocks if b.kind == "head" or (kind == "qwen3" and "embed" in b.name))
    assert not head.pinned_because
    assert handle.plan.home_of(head.id) == ("host" if home == "host" else handle.plan.home_of(head.id))
    assert (handle.record.misses, handle.record.direct_reads) == (0, 0)
    predicted, real = handle.plan.prediction.peaks.vram_bytes, handle.record.vram_peak_bytes
    assert real - 4096 <= predicted <= 1.01 * real  # the trainer's own sums of what it logs are not the model's
    handle.detach()


@pytest.mark.parametrize("dpo", [False, pytest.param(True, marks=pytest.mark.full)], ids=["sft", "dpo"])
def test_the_head_is_streamed_at_the_least(dpo, tokenizer, tmp_path):
    whole = trained(build("llama", tokenizer, tmp_path, dpo=dpo))
    before, trainer = utils._ChunkedLogProbFunction, build("llama", tokenizer, tmp_path, dpo=dpo)
    options = {**BUDGETS, "pins": {"lm_head": "host"}}
    with pytest.raises(DoesNotFitError) as caught:
        memplan.wrap(trainer, **{**options, "vram": 1})
    memplan.wrap(trainer, checked=True, **{**options, "vram": caught.value.least_vram_bytes})
    found = trained(trainer)
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    handle = trainer.memplan
    assert handle.record.direct_reads == 0
    assert handle.record.loads >= 2 * handle.plan.prediction.loads_per_pass > 0
    assert handle.plan.prediction.loads_per_pass >= 5  # each layer, and the head
    handle.detach()
    assert utils._ChunkedLogProbFunction is before


def test_a_plan_by_name_is_what_the_trainer_takes(tokenizer, tmp_path):
    config = KINDS["llama"][1]
    options = {**BUDGETS, "activations": "keep", "gains": False}
    adapter = {"rank": 4, "targets": "all-linear"}
    by_name = memplan.plan(config, (2, 64), adapter=adapter, trained_by="trl-sft", **options)
    real = plan_for(build("llama", tokenizer, tmp_path, length=64), **options)
    assert [a.module for a in by_name.table.accesses] == [a.module for a in real.table.accesses]
    assert by_name.prediction.peaks.vram_bytes == pytest.approx(real.prediction.peaks.vram_bytes, rel=0.01)
    cards = {**options, "hardware": "rtx-4090", "vram": "1GiB"}
    on_gpu = memplan.plan(config, (2, 64), adapter=adapter, trained_by="trl-sft", **cards)
    parts = [plan.prediction.peaks.vram_bytes - plan.prediction.vram_parts["context"] for plan in (on_gpu, by_name)]
    assert parts[0] < parts[1]  # its kernels turn a tile into what is wanted where it lies
    for given, match in (
        ({"trained_by": "trl-ppo"}, "one of transformers"),
        ({"trained_by": "trl-sft", "loss": "chunked"}, "has its own"),
    ):
        with pytest.raises(InputError, match=match):
            memplan.plan(config, (2, 64), adapter=adapter, **options, **given)
    with pytest.raises(InputError, match="built already"):
        memplan.plan(LlamaForCausalLM(config), (2, 64), trained_by="trl-sft", **options)


@pytest.mark.full
def test_a_plan_of_dpo_by_name_counts_both_texts_of_a_pair(tokenizer, tmp_path):
    options = {**BUDGETS, "activations": "keep", "gains": False, "adapter": {"rank": 4, "targets": "all-linear"}}
    one, two = (memplan.plan(KINDS["llama"][1], (n, 64), trained_by="trl-dpo", **options) for n in (1, 2))
    sft = memplan.plan(KINDS["llama"][1], (2, 64), trained_by="trl-sft", **options)
    assert one.prediction.peaks.vram_bytes == pytest.approx(sft.prediction.peaks.vram_bytes, rel=0.05)
    assert two.prediction.peaks.vram_bytes > one.prediction.peaks.vram_bytes


def test_models_that_share_trl_are_told_apart():
    before = utils._ChunkedLogProbFunction
    one, other = (LlamaForCausalLM(KINDS["llama"][1]) for _ in range(2))
    undo = [serve_tiles(model) for model in (one, other)]
    calls = []

    def note(module, args, output):
        calls.append(module)

    note.__module__ = "memplan.hooks"  # of others none is called
    for model in (one, other):
        model.lm_head.register_forward_hook(note)
    undo.pop(0)()
    for model in (one, other):
        hidden = torch.randn(4, 64)
        targets = torch.zeros(4, dtype=torch.long)
        utils._ChunkedLogProbFunction.apply(hidden, model.lm_head.weight, None, targets, 1.0, 512)
    assert calls == [other.lm_head]
    undo.pop()()
    assert utils._ChunkedLogProbFunction is before


def test_hooks_of_the_script_on_a_head_that_is_not_called_are_not_called(tokenizer, tmp_path):
    """One that would change what the head returns, had it been called, and one for backward."""
    runs, calls = [], []
    for planned in (False, True):
        trainer = build("llama", tokenizer, tmp_path / str(planned))
        head = trainer.model.get_base_model().lm_head
        head.register_forward_hook(lambda *given: calls.append(given) or given[-1] * 2)
        head.register_forward_pre_hook(lambda *given: calls.append(given))
        if planned:
            memplan.wrap(trainer, pins=PINS["host"], **BUDGETS)
        runs.append(trained(trainer))
        assert len(head._forward_hooks) >= 1
    assert not calls
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
