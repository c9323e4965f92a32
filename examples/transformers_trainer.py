"""LoRA with transformers' Trainer on a model that need not fit: python transformers_trainer.py MODEL_FOLDER VRAM RAM OUT

Three lines differ from a script without memplan: the import, and the ``with`` around loading and building.
"""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import memplan


class Counting(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequences that count upward: something a model can learn."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = (torch.arange(32) + index) % 90 + 3
        return {"input_ids": row, "labels": row}


def main() -> None:
    folder, vram, ram, out = sys.argv[1:]
    args = TrainingArguments(
        output_dir=out, max_steps=4, per_device_train_batch_size=2, learning_rate=1e-3, report_to=[], save_strategy="no"
    )
    with memplan.placing(vram=vram, ram=ram):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
        trainer = Trainer(model=model, args=args, train_dataset=Counting())
    trainer.train()
    model.save_pretrained(out)
    memplan.report(trainer.memplan.plan, trainer.memplan.record)


if __name__ == "__main__":
    main()
