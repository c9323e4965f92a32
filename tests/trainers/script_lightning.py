"""PyTorch Lightning: ``python script_lightning.py FOLDER OUT``. Prints its losses to the last bit."""

from __future__ import annotations

import sys

import lightning
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.trainers.script import Rows


class Adapted(lightning.LightningModule):
    def __init__(self, folder):
        super().__init__()
        model = AutoModelForCausalLM.from_pretrained(folder)
        torch.manual_seed(6)
        self.model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear"))

    def training_step(self, batch, index):
        loss = self.model(**batch).loss
        print("loss", loss.item().hex())
        return loss

    def validation_step(self, batch, index):
        print("eval", self.model(**batch).loss.item().hex())

    def on_train_epoch_start(self):
        self.model.train()

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def main() -> None:
    folder, out = sys.argv[1:]
    torch.set_num_threads(1)
    lightning.seed_everything(7)
    module = Adapted(folder)
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=6, accumulate_grad_batches=2, gradient_clip_val=0.5, logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=out, val_check_interval=4,
        check_val_every_n_epoch=None,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(Rows(), 2), torch.utils.data.DataLoader(Rows(), 4))
    module.model.save_pretrained(out)


if __name__ == "__main__":
    main()
