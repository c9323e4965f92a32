"""A script that knows nothing of memplan: ``python script.py FOLDER OUT [MODE]``.

MODE: ``lora`` (default), ``dora`` begins from the weights, ``resized`` has a new token, ``full`` trains all, ``hooks``
has accelerate place a layer, ``unsloth`` has it imported, ``cast`` has the model in bfloat16, ``generate`` asks the
model before it is trained, ``never`` trains nothing, ``fail`` raises; ``written`` has a weight changed in its last
bytes, ``reordered`` has its layers in another order, ``swapped`` the weights of another model, ``adapters`` trains a
second adapter after the first, and then the first again, those of ``ARGUMENTS`` are what their arguments say,
``counted`` has data and a loss that notice each use, ``merged`` merges its adapter at the end, ``saved`` saves each
step and begins from what is saved, ``killed`` does so and is killed in the third step.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

ARGUMENTS = {
    "best": {"save_strategy": "steps", "save_steps": 1, "eval_steps": 1, "load_best_model_at_end": True},
    "grouped": {"train_sampling_strategy": "group_by_length", "group_by_length": True, "remove_unused_columns": False},
    "workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "autocast": {"bf16": True},
    "found": {"auto_find_batch_size": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "full_eval": {"bf16_full_eval": True},
    "smoothed": {"label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0, "gradient_accumulation_steps": 2},
}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def bound(self, index):
        if index >= len(self):
            raise IndexError(index)

    def __getitem__(self, index):
        self.bound(index)
        row = (torch.arange(24) * (index + 3)) % 90 + 3
        return {"input_ids": row, "labels": row}


class Uneven(Rows):
    def __getitem__(self, index):
        self.bound(index)
        row = (torch.arange(8 + 5 * (index % 4)) * (index + 3)) % 90 + 3
        return {"input_ids": row, "labels": row}


def padded(rows):
    """A batch of rows of several lengths."""
    given = {name: [row[name] for row in rows] for name in rows[0]}
    fill = {"input_ids": 0, "labels": -100}
    return {name: torch.nn.utils.rnn.pad_sequence(given[name], True, fill[name]) for name in given}


class Stopping(TrainerCallback):
    """Stops early."""

    def on_evaluate(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


class Killed(Trainer):
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss


class Counting(Trainer):
    """Its loss prints, and its data draws random numbers: not to be asked once more than without memplan."""

    def compute_loss(self, *args, **kwargs):
        print("made a loss", flush=True)
        return super().compute_loss(*args, **kwargs)


class Drawn(Rows):
    drawn = random.Random(0)

    def __getitem__(self, index):
        row = (torch.arange(24) * self.drawn.randrange(3, 9)) % 90 + 3
        return {"input_ids": row, "labels": row}


def main() -> None:
    folder, out, mode = (*sys.argv[1:], "lora")[:3]
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16" if mode == "cast" else "auto")
    if mode == "adapter":
        print(
            "sum",
            model(torch.tensor([[3, 4, 5]])).logits.double().sum().item().hex(),
            sum(1 for _ in model.parameters()),
        )
        return
    if mode == "never":
        print("sum", sum(p.double().sum().item() for p in model.parameters()).hex())
        return
    if mode == "fail":
        raise SystemExit(7)
    if mode == "generate":
        print("made", model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=5, do_sample=False).tolist())
    if mode == "resized":
        torch.manual_seed(3)
        model.resize_token_embeddings(101)
    if mode == "written":
        with torch.no_grad():
            model.lm_head.weight[-1].zero_()
            model.model.layers[3].mlp.up_proj.weight[-1, -1] += 0.5
    if mode == "reordered":
        layers = model.model.layers
        model.model.layers = torch.nn.ModuleList(layers[index] for index in (0, 2, 1, 3, 5, 4))
    if mode == "swapped":
        other = AutoModelForCausalLM.from_pretrained(Path(folder) / "other")
        for parameter, its in zip(model.parameters(), other.parameters(), strict=True):
            parameter.data = its.data
    if mode == "hooks":
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        add_hook_to_module(model.model.layers[2], AlignDevicesHook("cpu", io_same_device=True))
    if mode == "unsloth":
        sys.modules["unsloth"] = ModuleType("unsloth")
    torch.manual_seed(6)
    if mode != "full":
        lora = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", use_dora=mode == "dora")
        model = get_peft_model(model, lora)
    if mode == "adapters":
        model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
        model.set_adapter("default")
    saves = mode in ("saved", "killed")
    given = {"save_strategy": "steps" if saves else "no", "save_steps": 1, "eval_steps": 2} | ARGUMENTS.get(mode, {})
    known = {field.name for field in fields(TrainingArguments)}  # group_by_length has had two forms
    args = TrainingArguments(
        output_dir=out, max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
        report_to=[], disable_tqdm=True, seed=7, eval_strategy="steps", logging_steps=100,
        **{name: value for name, value in given.items() if name in known},
    )  # fmt: skip
    kind = {"counted": Counting, "killed": Killed}.get(mode, Trainer)
    rows = {"counted": Drawn(), "grouped": Uneven()}.get(mode, Rows())
    trainer = kind(
        model=model, args=args, train_dataset=rows, eval_dataset=Rows(),
        data_collator=padded if mode == "grouped" else None, callbacks=[Stopping()] if mode == "best" else [],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=any(Path(out).glob("checkpoint-*")))
    if mode == "adapters":
        for name in ("second", "default"):
            model.set_adapter(name)
            args.max_steps += 2
            Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows).train()
    print("eval", trainer.evaluate()["eval_loss"].hex())
    trainer.model.save_pretrained(out)
    if mode == "merged":
        trainer.model.merge_and_unload().save_pretrained(out + "/merged")


if __name__ == "__main__":
    main()
