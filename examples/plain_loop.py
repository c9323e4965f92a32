"""A loop of one's own, any module with frozen weights, no transformers and no PEFT: python plain_loop.py [VRAM RAM]"""

from __future__ import annotations

import sys

import torch
from torch import nn

import memplan


class Layer(nn.Module):
    """A frozen linear layer and a low-rank adapter beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.down = nn.Linear(width, 8, bias=False)
        self.up = nn.Linear(8, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.frozen(x)) + self.up(self.down(x))


class Model(nn.Module):
    """Twelve of them."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def main() -> None:
    vram, ram = sys.argv[1:] or ("auto", "auto")
    torch.manual_seed(0)
    model = Model()
    x, target = torch.randn(64, 256), torch.randn(64, 256)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    plan = memplan.plan(model, {"x": x}, vram=vram, ram=ram, loss=lambda output: nn.functional.mse_loss(output, target))
    with memplan.attach(model, plan) as handle:
        for _ in range(5):
            loss = nn.functional.mse_loss(model(x), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"loss {loss.item():.4f}")
        memplan.report(plan, handle.record)


if __name__ == "__main__":
    main()
