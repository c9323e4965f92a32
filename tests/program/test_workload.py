"""How much a micro-batch is, in the words of a report."""

from __future__ import annotations

import pytest

from memplan.program.schema import Workload


@pytest.mark.parametrize(
    ("batch", "tokens", "said"),
    [
        ({"input_ids": (2, 512), "labels": (2, 512)}, 1024, "1,024 tokens"),
        ({"0.input_ids": (2, 12), "1.input_ids": (2, 12)}, 48, "48 tokens"),
        ({"0": (3, 16)}, 48, "48 tokens"),
        ({"inputs_embeds": (2, 7, 64)}, 14, "14 tokens"),
        ({"input_features": (2, 80, 3000), "labels": (2, 40)}, 2, "2 samples"),
        ({"pixel_values": (8, 3, 224, 224), "labels": (8,)}, 8, "8 samples"),
        ({"sample": (1, 4, 128, 128), "timestep": (1,), "added_cond_kwargs.1": (1, 6)}, 1, "1 sample"),
        ({}, 64, "64 tokens"),
    ],
)
def test_tokens_or_samples(batch, tokens, said):
    workload = Workload(batch=batch, tokens=tokens, accumulation=1, optimizer="adamw", adapter="")
    assert workload.size == said
