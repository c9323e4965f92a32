"""Lightning's trainer is asked for its first call without a trace of that."""

from __future__ import annotations

import lightning
import pytest
import torch
from torch import nn

from memplan.trainers import lightning as trainers
from tests.support.fingerprint import assert_same, fingerprint


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)).requires_grad_(False)
        self.adapter = nn.Linear(8, 8)

    def forward(self, x):
        return self.adapter(x)


class Counting(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.inner, self.calls, self.seen = Inner(), 0, []
        self.register_buffer("steps", torch.zeros(()))

    def training_step(self, batch, index):
        self.calls += 1
        self.seen.append(batch)
        self.steps += 1
        return self.inner(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.inner.adapter.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
def test_a_look_leaves_the_module_as_it_was():
    class Look(lightning.Callback):
        def on_train_start(self, trainer, module):
            before = fingerprint(module.inner, module.calls, module.seen, module.steps)
            found, call = trainers._first_call(trainer, module)
            assert found is module.inner
            assert call.args[0].shape == (2, 8)
            assert_same(before, fingerprint(module.inner, module.calls, module.seen, module.steps))
            looked.append(module)

    looked: list[lightning.LightningModule] = []
    rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(4, 8)), batch_size=2)
    trainer = lightning.Trainer(
        max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        callbacks=[Look()],
    )  # fmt: skip
    trainer.fit(Counting(), rows)
    assert looked
