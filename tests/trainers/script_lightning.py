"""A LightningModule whose model is its own: ``python script_lightning.py OUT``."""

from __future__ import annotations

import sys

import lightning
import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.down, self.up = nn.Linear(width, 4, bias=False), nn.Linear(4, width, bias=False)

    def forward(self, x):
        return x + torch.tanh(self.frozen(x)) + self.up(self.down(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(256, 256).requires_grad_(False)
        self.layers = nn.ModuleList(Layer(256) for _ in range(8))

    def forward(self, x):
        x = self.inside(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Model()

    def training_step(self, batch, index):
        return self.model(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def main() -> None:
    torch.set_num_threads(1)
    lightning.seed_everything(7)
    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=4, logger=False, enable_progress_bar=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 256)), 4))
    torch.save(module.model.layers[3].up.weight.detach(), sys.argv[1])


if __name__ == "__main__":
    main()
