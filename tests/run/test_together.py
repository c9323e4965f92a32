"""Checkpoints around several blocks at once: all run again before the backward of any, as the plan foresees."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memplan.run.attach import attach
from tests.run.test_parity import plan_for
from tests.support.training import Plain, assert_equal, train


class InPairs(Plain):
    """Checkpoints two layers at a time."""

    reentrant = False

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids).requires_grad_()
        for index in range(0, len(self.layers), 2):
            x = checkpoint(nn.Sequential(*self.layers[index : index + 2]), x, use_reentrant=self.reentrant)
        return self.head(x)


def in_pairs(reentrant):
    torch.manual_seed(0)
    model = InPairs(dropout=0.1).train()
    model.reentrant = reentrant
    return model


@pytest.mark.each_value
@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("reentrant", [False, True], ids=["other", "reentrant"])
def test_layers_checkpointed_together(reentrant, share, tmp_path):
    whole, model = in_pairs(reentrant), in_pairs(reentrant)
    plan = plan_for(model, "plain", share=share)
    with attach(model, plan, cache=tmp_path, checked=True) as handle:
        assert_equal(train(whole, "plain"), train(model, "plain"))
        assert handle.record.out_of_order == 0
        assert handle.record.misses == 0
