"""What a trace makes up where a forward decides by chance or by activations lies within the range it would come
from.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memplan
from memplan.analyze.trace.trace import analyze
from tests.support.training import CPU

WIDTH = 16
CHOICES = {
    "randint": lambda x, n: torch.randint(0, n, (1,)).item(),
    "randint-low": lambda x, n: torch.randint(5, 5 + n, ()).item() - 5,
    "randint-like": lambda x, n: torch.randint_like(x[0, :1], n).long().item(),
    "random": lambda x, n: torch.empty((), dtype=torch.long).random_(n).item(),
    "random-from": lambda x, n: torch.empty((), dtype=torch.long).random_(2, 2 + n).item() - 2,
    "randperm": lambda x, n: torch.randperm(n)[-1].item(),
    "rand": lambda x, n: int(torch.rand(()).item() * n),
    "rand-bfloat16": lambda x, n: int(torch.rand((), dtype=torch.bfloat16).item() * n),
    "uniform": lambda x, n: int(torch.empty(1).uniform_(0, n).item()),
    "multinomial": lambda x, n: torch.multinomial(torch.ones(n), 1).item(),
    "bernoulli": lambda x, n: torch.bernoulli(torch.full((), 0.5)).long().item() % n,
    "argmax": lambda x, n: x[0, :n].argmax().item(),
    "max": lambda x, n: x[0, :n].max(0).indices.item(),
    "min": lambda x, n: torch.min(x[0, :n], -1)[1].item(),
    "median": lambda x, n: x[0, :n].median(0).indices.item(),
    "kthvalue": lambda x, n: x[0, :n].kthvalue(n, 0).indices.item(),
    "mode": lambda x, n: x[0, :n].mode(0).indices.item(),
    "topk": lambda x, n: x[0, :n].topk(1).indices.item(),
    "sort": lambda x, n: x[0, :n].sort().indices[-1].item(),
    "nonzero": lambda x, n: (x[0, :n] > -9).nonzero()[0].item(),
}


class Chosen(nn.Module):
    def __init__(self, choose, count):
        super().__init__()
        self.choose = choose
        self.ways = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count)).requires_grad_(False)
        self.adapter = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        ways = list(self.ways)
        index = self.choose(x.detach(), len(ways))
        assert 0 <= index < len(ways)
        return ways[index](self.adapter(x))


@pytest.mark.quick("randint-1")
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("choose", CHOICES)
def test_a_choice_is_one_of_those_that_there_are(choose, count):
    model, batch = Chosen(CHOICES[choose], count), {"x": torch.rand(4, WIDTH)}
    model(**batch)
    plan = memplan.plan(model, batch, vram="1GiB", ram="1GiB", hardware=CPU, loss=lambda out: out.sum(), gains=False)
    assert [block.name for block in plan.table.blocks if block.kind in ("other", "layer", "head")]


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.adapter = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        return self.frozen(self.dropout(self.adapter(x)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dropout_on_a_gpu_keeps_a_byte_an_element(dtype):
    """A CPU's keeps as many as the input has: tests/device/test_sim.py has what torch does."""
    model, batch = Dropping().to(dtype), {"x": torch.rand(4, WIDTH, dtype=dtype)}
    kept = {}
    for device in ("cpu", "cuda"):
        lives = analyze(model, batch, loss=lambda out: out.float().sum(), device=device).lifetimes
        kept[device] = sum(life.size_bytes for life in lives if life.kind == "activations")
    assert kept["cpu"] - kept["cuda"] == 4 * WIDTH * (dtype.itemsize - 1)
    model.eval()
    assert analyze(model, batch, loss=lambda out: out.float().sum(), device="cuda").lifetimes


class Attending(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.adapter = nn.Linear(WIDTH, WIDTH)
        self.dropout = dropout

    def forward(self, x):
        x = self.adapter(x).unflatten(-1, (2, WIDTH // 2)).transpose(-2, -3)
        x = nn.functional.scaled_dot_product_attention(x, x, x, None, self.dropout, is_causal=True)
        return self.frozen(x.transpose(-2, -3).flatten(-2))


def test_attention_that_drops_keeps_no_scores_on_a_gpu():
    batch, kept = {"x": torch.rand(1, 64, WIDTH)}, {}
    for device, dropout in (("cpu", 0.1), ("cuda", 0.1), ("cuda", 0.0)):
        lives = analyze(Attending(dropout), batch, loss=lambda out: out.sum(), device=device).lifetimes
        kept[device, dropout] = sum(life.size_bytes for life in lives if life.kind == "activations")
    assert kept["cuda", 0.1] == kept["cuda", 0.0] < kept["cpu", 0.1] - 2 * 64 * 64 * 4
