"""Training in groups of micro-batches that take turns at each block, and what it is compared with."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn

from memplan import Handle
from tests.support.training import LENGTH, Run, batch_of, loss_of


def uneven(kind: str, seed: int = 3) -> dict[str, torch.Tensor]:
    """A micro-batch, of another length for each seed."""
    return batch_of(kind, seed=seed, length=LENGTH - seed % 4)


def train_in_groups(
    model: nn.Module,
    kind: str,
    handle: Handle,
    *,
    steps: int = 3,
    accumulation: int = 8,
    around_forward=nullcontext,
    batches=batch_of,
    loads: list[int] | None = None,
) -> Run:
    """Train as ``tests.support.training.train`` does, each step's micro-batches at once. ``loads`` is given those of
    each step.
    """
    run = Run()
    trainables = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainables.values(), lr=1e-2)
    torch.manual_seed(11)

    def one(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with around_forward():
            loss = loss_of(model(**batch)) / accumulation
        loss.backward()
        return loss.detach().clone()

    for step in range(steps):
        before = handle.record.loads
        seeds = range(100 + step * accumulation, 100 + (step + 1) * accumulation)
        run.losses += handle.accumulate(one, (batches(kind, seed=seed) for seed in seeds))
        run.gradients.append({n: p.grad.clone() for n, p in trainables.items() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
        if loads is not None:
            loads.append(handle.record.loads - before)
    run.adapters = {name: p.detach().clone() for name, p in trainables.items()}
    return run
