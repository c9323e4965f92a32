"""Trainers whose micro-batches share loads: losses, logs and adapters are those of the trainer alone, byte for byte."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

import memplan
from memplan.errors import DoesNotFitError, RunError
from memplan.trainers import launch
from memplan.units import MIB
from tests.support.training import CPU

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # as TRL has them
COMMON = {
    "per_device_train_batch_size": 1, "learning_rate": 1e-2, "report_to": [], "disable_tqdm": True, "use_cpu": True,
    "seed": 7, "logging_steps": 1, "save_strategy": "no", "bf16": False,
}  # fmt: skip
TEXT = "a block of weights lies on the device and one waits in memory"
TEXTS = [TEXT[turn % 7 : 30 + turn] for turn in range(22)]


def rows_of(kind):
    if kind in ("dpo", "reward"):
        return Dataset.from_list([{"prompt": t, "chosen": f" {t} it", "rejected": " no"} for t in TEXTS])
    return Dataset.from_list([{"text": text} for text in TEXTS])


def tokenized(tokenizer, *, target=False):
    def row(text):
        ids = tokenizer(text).input_ids
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids[::-1] if target else ids}

    return [row(text) for text in TEXTS]


def build(kind, folder, out, *, accumulation, model=None, trainer=None, **more):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loader = {"reward": AutoModelForSequenceClassification, "seq2seq": AutoModelForSeq2SeqLM}.get(
        kind, AutoModelForCausalLM
    )
    options = {"reward": {"num_labels": 1}, "seq2seq": {"dropout_rate": 0.0}}.get(kind, {})
    torch.manual_seed(3)
    model = loader.from_pretrained(folder, **options)
    task = {"reward": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM"}.get(kind, "CAUSAL_LM")
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type=task)
    common = {**COMMON, "output_dir": str(out), "gradient_accumulation_steps": accumulation, "max_steps": 3, **more}
    if kind in ("trainer", "seq2seq"):
        arguments = (Seq2SeqTrainingArguments if kind == "seq2seq" else TrainingArguments)(**common)
        rows = tokenized(tokenizer, target=kind == "seq2seq")
        collate = DataCollatorForSeq2Seq(tokenizer)
        of = trainer or (Seq2SeqTrainer if kind == "seq2seq" else Trainer)
        return of(
            model=get_peft_model(model, lora), args=arguments, train_dataset=rows, eval_dataset=rows[:4],
            data_collator=collate,
        )  # fmt: skip
    config, of = {
        "sft": (SFTConfig, SFTTrainer), "dpo": (DPOConfig, DPOTrainer), "reward": (RewardConfig, RewardTrainer),
    }[kind]  # fmt: skip
    return of(
        model=model, args=config(max_length=32, **common), train_dataset=rows_of(kind), peft_config=lora,
        processing_class=tokenizer,
    )  # fmt: skip


def finish(trainer, out, **how):
    trainer.train(**how)
    trainer.model.save_pretrained(str(out))
    logs = [{k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k and "memplan" not in k}
            for row in trainer.state.log_history]  # fmt: skip
    return logs, (out / "adapter_model.safetensors").read_bytes()


def wrapped(trainer, group, *, room=MIB // 4, **more):
    """Wrap a trainer in so much more than the least."""
    options = {"ram": "1GiB", "hardware": CPU, "group": group, **more}
    if not trainer.args.gradient_checkpointing:
        options["activations"] = "recompute"
    with pytest.raises(DoesNotFitError) as caught:
        memplan.wrap(trainer, vram=1, **options)
    memplan.wrap(trainer, vram=caught.value.least_vram_bytes + room, **options)
    return trainer


def compared(kind, folder, tmp_path, *, accumulation, group, shares=True, checked=False, **more):
    """Train alone and in groups; return the handle."""
    whole = finish(build(kind, folder, tmp_path / "whole", accumulation=accumulation, **more), tmp_path / "whole")
    trainer = wrapped(
        build(kind, folder, tmp_path / "grouped", accumulation=accumulation, **more), group, checked=checked
    )
    assert trainer.memplan.plan.group == group
    assert finish(trainer, tmp_path / "grouped") == whole
    record = trainer.memplan.record
    assert record.loads > 0
    assert (record.loads < 0.8 * record.passes * trainer.memplan.plan.prediction.loads_per_pass) == shares
    return trainer.memplan


@pytest.fixture
def folder(request, checkpoint):
    return request.getfixturevalue("t5") if request.node.callspec.params.get("kind") == "seq2seq" else checkpoint


KINDS = ["trainer", *(pytest.param(k, marks=pytest.mark.full) for k in ("sft", "reward", "seq2seq"))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("accumulation", "group"), [(4, 4), pytest.param(8, 3, marks=pytest.mark.full)])
def test_groups_are_the_trainer_alone(kind, accumulation, group, folder, tmp_path):
    compared(kind, folder, tmp_path, accumulation=accumulation, group=group)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["dpo"])
def test_what_calls_its_model_twice_goes_one_by_one(kind, folder, tmp_path):
    """A reference forward with the adapters off, in the same micro-batch."""
    compared(kind, folder, tmp_path, accumulation=4, group=4, shares=False)


MORE = {
    "last-window-short": {"max_steps": -1, "num_train_epochs": 1},
    "smoothed": {"label_smoothing_factor": 0.1},
    "clipped": {"max_grad_norm": 0.01},
    "evaluated": {"eval_strategy": "steps", "eval_steps": 1},
    "autocast": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "noise": {"neftune_noise_alpha": 5.0},
    "non-finite losses are logged": {"logging_nan_inf_filter": False},
    "cache emptied": {"torch_empty_cache_steps": 1},
}


@pytest.mark.full
@pytest.mark.parametrize("more", MORE.values(), ids=MORE)
@pytest.mark.parametrize("kind", ["trainer"])
def test_what_a_trainer_may_be_asked_for(kind, more, folder, tmp_path):
    shares = "neftune_noise_alpha" not in more  # random numbers on the CPU: one by one
    compared(kind, folder, tmp_path, accumulation=8, group=4, shares=shares, **more)


class Halved(Trainer):
    """A loss of its own."""

    def compute_loss(self, model, inputs, **more):
        return super().compute_loss(model, inputs, **more) * 0.5


@pytest.mark.full
@pytest.mark.parametrize("kind", ["trainer"])
def test_a_loss_of_its_own(kind, folder, tmp_path):
    compared(kind, folder, tmp_path, accumulation=4, group=2, trainer=Halved, checked=True)


def loss_by_tokens(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


class Weighted:
    """A loss function that weighs each micro-batch by the one before it."""

    def __init__(self):
        self.before = 1.0

    def __call__(self, outputs, labels, num_items_in_batch=None):
        loss = loss_by_tokens(outputs, labels, num_items_in_batch) * self.before
        self.before = 1.0 / (1.0 + loss.item())
        return loss


@pytest.mark.full
@pytest.mark.parametrize(("function", "shares"), [(lambda: loss_by_tokens, True), (Weighted, False)])
@pytest.mark.parametrize("kind", ["trainer"])
def test_a_loss_function(kind, function, shares, folder, tmp_path):
    class WithLoss(Trainer):
        def __init__(self, **arguments):
            super().__init__(**arguments, compute_loss_func=function())

    compared(kind, folder, tmp_path, accumulation=4, group=4, shares=shares, trainer=WithLoss)


class Counted(Trainer):
    """Numbers its micro-batches before the forward, and weighs them by it afterwards."""

    number = 0  # of the class, until the first

    def compute_loss(self, model, inputs, **more):
        self.number += 1
        loss = super().compute_loss(model, inputs, **more)
        return loss * self.number


class Last(Trainer):
    """Weighs a step's last micro-batch more."""

    def compute_loss(self, model, inputs, **more):
        loss = super().compute_loss(model, inputs, **more)
        return loss * (2.0 if self.accelerator.sync_gradients else 1.0)


@pytest.mark.parametrize("kind", ["trainer"])
@pytest.mark.parametrize("trainer", [Counted, Last])
def test_what_hangs_on_which_micro_batch_it_is_goes_one_by_one(kind, trainer, folder, tmp_path, capfd):
    compared(kind, folder, tmp_path, accumulation=3, group=3, shares=False, trainer=trainer, max_steps=2)
    assert trainer.__name__ in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["trainer"])
def test_a_group_that_runs_out_of_memory_is_repeated(kind, folder, tmp_path, monkeypatch):
    whole = finish(build(kind, folder, tmp_path / "whole", accumulation=4), tmp_path / "whole")
    trainer = wrapped(build(kind, folder, tmp_path / "grouped", accumulation=4), 4, room=2 * MIB)
    compute_loss, calls = Trainer.compute_loss, iter(range(100))

    def fails_once(*args, **more):
        if next(calls) == 6:
            assert trainer.memplan.record.passes < 8  # others of the group are under way
            raise torch.OutOfMemoryError("out of memory")
        return compute_loss(*args, **more)

    monkeypatch.setattr(Trainer, "compute_loss", fails_once)
    assert finish(trainer, tmp_path / "grouped") == whole
    assert trainer.memplan.recoveries == 1


@pytest.mark.full
@pytest.mark.parametrize("kind", ["trainer"])
def test_trained_twice(kind, folder, tmp_path):
    runs = []
    for name in ("whole", "grouped"):
        trainer = build(kind, folder, tmp_path / name, accumulation=4)
        if name == "grouped":
            wrapped(trainer, 4)
        finish(trainer, tmp_path / name)
        runs.append(finish(trainer, tmp_path / name))
    assert runs[0] == runs[1]


class Stream(torch.utils.data.IterableDataset):
    """Ends in the middle of a step, which nobody knows before."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows[:10])


@pytest.mark.full
@pytest.mark.parametrize("kind", ["trainer"])
def test_a_stream_that_ends_early(kind, folder, tmp_path):
    runs = []
    for name in ("whole", "grouped"):
        trainer = build(kind, folder, tmp_path / name, accumulation=4, max_steps=7)
        trainer.train_dataset = Stream(trainer.train_dataset)
        if name == "grouped":
            wrapped(trainer, 4)
        runs.append(finish(trainer, tmp_path / name))
    assert runs[0] == runs[1]


@pytest.mark.full
@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_a_run_that_is_resumed(kind, folder, tmp_path):
    """In the middle of an epoch, from a checkpoint of a run in groups."""
    more = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = finish(build(kind, folder, tmp_path / "whole", accumulation=4, **more), tmp_path / "whole")
    finish(wrapped(build(kind, folder, tmp_path / "first", accumulation=4, **more), 4), tmp_path / "first")
    again = wrapped(build(kind, folder, tmp_path / "again", accumulation=4, **more), 4)
    resumed = finish(again, tmp_path / "again", resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert resumed[1] == whole[1]
    assert [row.get("loss") for row in resumed[0]] == [row.get("loss") for row in whole[0]]


class Counting(TrainerCallback):
    def __init__(self):
        self.gradients = []

    def on_substep_end(self, args, state, control, model, **more):
        self.gradients.append(sum(p.grad.abs().sum().item() for p in model.parameters() if p.grad is not None))


@pytest.mark.parametrize("kind", ["trainer"])
def test_a_callback_that_sees_each_micro_batch_sees_its_gradients(kind, folder, tmp_path, capfd):
    seen = []
    for grouped in (False, True):
        trainer = build(kind, folder, tmp_path, accumulation=3, max_steps=1)
        if grouped:
            wrapped(trainer, 3)
        counting = Counting()
        trainer.add_callback(counting)
        trainer.train()
        seen.append(counting.gradients)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 2
    assert "Counting" in capfd.readouterr().err


class Stopping(TrainerCallback):
    def on_step_begin(self, args, state, control, **more):
        if state.global_step == 1:
            control.should_training_stop = True


@pytest.mark.parametrize("kind", ["trainer"])
def test_a_step_that_is_stopped_after_its_first_micro_batch(kind, folder, tmp_path):
    runs = []
    for name in ("whole", "grouped"):
        trainer = build(kind, folder, tmp_path / name, accumulation=3)
        if name == "grouped":
            wrapped(trainer, 3)
        trainer.add_callback(Stopping())
        runs.append(finish(trainer, tmp_path / name))
        assert trainer.state.global_step == 1
    assert runs[0] == runs[1]


@pytest.mark.parametrize("kind", ["trainer"])
def test_micro_batches_that_nobody_asks_for_are_refused(kind, folder, tmp_path):
    """Their gradients are among the others already."""
    trainer = wrapped(build(kind, folder, tmp_path, accumulation=4), 3)
    samples = [trainer.data_collator([row]) for row in list(trainer.train_dataset)[:4]]
    window, _ = trainer.get_batch_samples(iter(samples), 4, trainer.args.device)
    trainer.current_gradient_accumulation_steps = 4  # as train() sets it
    for turn in range(2):  # the first by itself
        trainer.training_step(trainer.model, window[turn])
    with pytest.raises(RunError, match="2 of whose micro-batches had run ahead"):
        trainer.training_step(trainer.model, samples[0] | {"other": None})


def test_a_loop_that_goes_one_by_one_says_so_once(monkeypatch, capfd):
    monkeypatch.setattr(launch.Seen, "group", False)
    assert launch.one_by_one({"vram": 1}) == {"vram": 1, "group": 1}
    assert not capfd.readouterr().err
    for _ in range(2):
        assert launch.one_by_one({"group": "auto"}) == {"group": 1}
    assert capfd.readouterr().err.count("handle.accumulate") == 1
