"""What recurrent layers keep for their backward, of which torch's own fake operators tell nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memplan
from tests.support import inside
from tests.support.counting import LiveBytes, held_by
from tests.support.training import CPU


class Speech(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.begin, self.end = nn.Linear(16, 32), nn.Linear(32, 4)
        self.layers = nn.ModuleList(kind(32, 32, batch_first=True) for _ in range(4))
        self.layers.requires_grad_(False)

    def forward(self, sound):
        hidden = self.begin(sound)
        for layer in self.layers:
            hidden = hidden + layer(hidden)[0]
        return self.end(hidden).square().mean()


def planned(model, sound):
    return memplan.plan(
        model, (sound,), loss=lambda loss: loss, vram="1GiB", ram="1GiB", hardware=CPU, gains=False, activations="keep"
    )


@pytest.mark.quick("LSTM")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda kind: kind.__name__)
def test_the_peak_is_foreseen_whichever_plan_comes_first(kind):
    model, sound = Speech(kind), torch.randn(3, 20, 16)
    plan = planned(model, sound)
    predicted = plan.prediction.peaks.vram_bytes
    assert predicted == planned(model, sound).prediction.peaks.vram_bytes
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    with memplan.attach(model, plan) as handle:
        for _ in range(2):
            with LiveBytes(held_by(model, optimizer), arena=inside.device_arena(handle)) as count:
                model(sound).backward()
                optimizer.step()
                optimizer.zero_grad()
    assert 0.97 * predicted <= count.peak <= predicted
