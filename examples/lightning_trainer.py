"""PyTorch Lightning on lines of {"text": ...}: python lightning_trainer.py MODEL DATA.jsonl OUT [--vram 10GiB --ram
24GiB]

One line differs from a script without memplan: the callback. ``memplan run`` needs none.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

import memplan
from memplan.trainers.lightning import Placement


class Adapted(lightning.LightningModule):
    """A model with its adapter."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        model = AutoModelForCausalLM.from_pretrained(folder)
        self.model = get_peft_model(model, LoraConfig(r=8, lora_dropout=0.05, target_modules="all-linear"))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def on_train_epoch_start(self) -> None:
        self.model.train()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "out"):
        given.add_argument(name, nargs="?")
    given.add_argument("--vram", help="budget of the device, as 10GiB; without it memplan is not used")
    given.add_argument("--ram", help="budget of RAM")
    given.add_argument("--steps", type=int, default=20)
    args = given.parse_args()
    if args.model is None:
        from small import small  # random weights and some rows

        args.model, args.data, args.out, args.vram = small("llama", "text")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = load_dataset("json", data_files=args.data, split="train")
    rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=32), remove_columns=["text"])
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    lightning.seed_everything(0)
    module = Adapted(args.model)
    placement = Placement(vram=args.vram, ram=args.ram) if args.vram else None
    trainer = lightning.Trainer(
        max_steps=args.steps,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        default_root_dir=args.out,
        callbacks=placement,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    train = torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True, collate_fn=collate)
    trainer.fit(module, train, torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=collate))
    print("val_loss", float(trainer.callback_metrics["val_loss"]).hex())
    module.model.save_pretrained(args.out)
    if placement:
        memplan.report(placement.handle.plan, placement.handle.record)


if __name__ == "__main__":
    main()
