"""What a Trainer sets before its first step, and that plans from a configuration are for that: against real Trainer
runs.
"""

from __future__ import annotations

import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import memplan
from memplan.analyze.inputs.trainer_settings import NO_CACHE
from memplan.trainers.hf_trainer import plan_for
from tests.support.counting import LiveBytes, held_by
from tests.support.training import CPU

BATCH, LENGTH, LAYERS, HIDDEN = 4, 64, 4, 64
LORA = {"rank": 4, "targets": "all-linear"}
BUDGETS = {"vram": "1GiB", "ram": 0, "disk": 0, "hardware": CPU, "gains": False}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 2 * BATCH

    def __getitem__(self, index):
        row = torch.arange(index, index + LENGTH) % 89 + 3
        return {"input_ids": row, "labels": row}


def llama(**settings):
    sizes = {"hidden_size": HIDDEN, "vocab_size": 96, **settings}
    return LlamaConfig(
        intermediate_size=176, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=LENGTH, dtype="float32", **sizes,
    )  # fmt: skip


def trainer_of(model, out, **arguments):
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=2,
        per_device_train_batch_size=BATCH,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=0.0,
        dataloader_pin_memory=False,
        **arguments,
    )
    return Trainer(model=model, args=args, train_dataset=Rows())


def peak_bytes(trainer):
    """The most live bytes of a real run, which a count of its own gives."""
    trainer.train()  # one run before: what is made once and kept is there
    gc.collect()
    with LiveBytes(held_by(trainer.model, trainer.optimizer)) as counted:
        trainer.train()
    return counted.peak


def adapted(base):
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))


def planned(config, **options):
    return memplan.plan(config, (BATCH, LENGTH), adapter=LORA, **BUDGETS, **options)


WAYS = [{}, {"bf16": True}, {"gradient_checkpointing": True}]


@pytest.mark.quick("{}")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers 5.23 has another name for it, older ones have not
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_plan_of_a_configuration_is_what_the_trainer_takes(options, tmp_path):
    config = llama(use_cache=True)
    checkpoints = options.get("gradient_checkpointing")
    more = {"gradient_checkpointing": True} if checkpoints else {"activations": "keep"}
    plan = planned(config, autocast="bf16" if options.get("bf16") else None, **more)
    assert config.use_cache  # it is the caller's
    assert [note for note in plan.notes if "cache" in note] == [NO_CACHE]
    assert (plan.table.recomputable == ()) is bool(checkpoints)
    real = peak_bytes(trainer_of(adapted(LlamaForCausalLM(config)), tmp_path, **options))
    assert real <= plan.prediction.peaks.vram_bytes <= 1.01 * real


def test_a_module_is_planned_as_it_is_until_a_trainer_has_it(tmp_path):
    """The cache holds the keys and values of the layers before the one that is computed."""
    options = {"activations": "recompute", **BUDGETS}
    cache_bytes = (LAYERS - 1) * 2 * HIDDEN * 4 * BATCH * LENGTH
    plan = planned(llama(use_cache=True), activations="recompute")
    off = planned(llama(use_cache=False), activations="recompute")
    assert (plan.table, plan.prediction) == (off.table, off.prediction)
    assert NO_CACHE not in off.notes
    model = adapted(LlamaForCausalLM(llama(use_cache=True)))
    kept = memplan.plan(model, (BATCH, LENGTH), **options).prediction.peaks.vram_bytes
    assert kept == plan.prediction.peaks.vram_bytes + cache_bytes
    trainer = trainer_of(model, tmp_path)
    assert model.config.use_cache is False
    del options["gains"]  # a trainer's plan has none
    batch_bytes = BATCH * LENGTH * 8  # a plan by shape has a mask too
    taken = plan_for(trainer, **options).prediction.peaks.vram_bytes
    assert taken <= plan.prediction.peaks.vram_bytes <= taken + batch_bytes


def test_a_cache_that_the_trainer_leaves_on_is_counted(tmp_path):
    """T5's decoder has a copy of the configuration, which the Trainer does not see."""
    config = T5Config(
        d_model=HIDDEN,
        d_ff=96,
        d_kv=16,
        num_heads=4,
        num_layers=3,
        num_decoder_layers=3,
        vocab_size=96,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    plan = planned(config, activations="keep")
    assert [note for note in plan.notes if "cache" in note] == [
        "decoder has a configuration of its own with use_cache=True, which transformers' Trainer leaves as it is: "
        "where it keeps a key-value cache, that is counted. TRL's trainers keep none: for those, set it to False in "
        "the configuration and plan again."
    ]
    real = peak_bytes(trainer_of(adapted(T5ForConditionalGeneration(config)), tmp_path))
    assert real <= plan.prediction.peaks.vram_bytes <= 1.03 * real


@pytest.mark.filterwarnings("ignore")  # PEFT's own: a name that is going away, and what torch is left to choose
def test_qlora_is_what_the_trainer_takes(tmp_path):
    """As PEFT documents it: a nested nf4 base that PEFT prepares, bf16=True, an 8-bit optimizer."""
    LlamaForCausalLM(llama(hidden_size=128, vocab_size=512)).save_pretrained(tmp_path / "base")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=settings, device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    model = adapted(prepare_model_for_kbit_training(base))
    plan = memplan.plan(tmp_path / "base", (BATCH, LENGTH), adapter=LORA, qlora=True, **BUDGETS)
    real = peak_bytes(trainer_of(model, tmp_path, bf16=True, optim="paged_adamw_8bit"))
    assert real <= plan.prediction.peaks.vram_bytes <= 1.01 * real


@pytest.mark.full
@pytest.mark.parametrize(("name", "gib"), [("llama-2-7b", 14.11)])
def test_the_least_vram_of_a_published_run(name, gib):
    """10 x 2048 tokens, rank 64: of it 10 GiB less than with the keys and values of 32 layers."""
    with pytest.raises(memplan.DoesNotFitError) as refused:
        memplan.plan(
            name, (10, 2048), adapter={"rank": 64}, dtype="bf16", vram="4GiB", ram="256GiB", hardware="rtx-4090"
        )
    assert refused.value.least_vram_bytes == pytest.approx(gib * 2**30, rel=1e-3)
