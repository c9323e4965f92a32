"""Trains a model from disk in a process of its own: ``python big_model.py FOLDER OUT MODE VRAM RAM``.

MODE is ``whole`` or ``placed``. Prints one JSON object: losses, and how far the peak of resident memory rose above
that of the imports.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import memplan
import memplan.api
import memplan.trainers.placing
from tests.support.training import CPU


def peak_resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM")


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        row = torch.arange(16) * (index + 3) % 500 + 1
        return {"input_ids": row, "labels": row}


class Exact(Trainer):
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.__dict__.setdefault("losses", []).append(loss.item())
        return loss


def main() -> None:
    folder, out, mode, vram, ram = sys.argv[1:]
    torch.set_num_threads(1)
    before = peak_resident_bytes()

    def build():
        model = AutoModelForCausalLM.from_pretrained(folder)
        if mode == "whole":
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        torch.manual_seed(1)
        adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
        args = TrainingArguments(
            output_dir=out, max_steps=2, per_device_train_batch_size=1, save_strategy="no", report_to=[],
            disable_tqdm=True, use_cpu=True, seed=3, learning_rate=1e-2,
        )  # fmt: skip
        return Exact(model=adapted, args=args, train_dataset=Rows())

    plan = None
    if mode == "placed":
        with memplan.placing(vram=vram, ram=ram, hardware=CPU):
            trainer = build()
        plan = trainer.memplan.plan
    else:
        trainer = build()
    trainer.train()
    trainer.model.save_pretrained(out)
    print(
        json.dumps(
            {
                "losses": trainer.losses,
                "rise_bytes": peak_resident_bytes() - before,
                "homes": [item.home for item in plan.items] if plan else [],
            }
        )
    )


if __name__ == "__main__":
    main()
