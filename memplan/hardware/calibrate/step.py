"""What one operator of a training step costs the host: Python, dispatch, autograd. A tiny step, its operators counted.

Kernels that take in no time what is in the caches leave only that. A bare operator in a loop takes a fraction of it:
modules, adapters around them, views and the graph for backward come with each operator that computes something.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from memplan.analyze.trace.operators import operator

_WIDTH, _TOKENS, _HEADS, _RANK, _LAYERS = 32, 8, 4, 4, 4
_PASSES = 40


class _Adapted(nn.Module):
    """A frozen linear layer with a LoRA beside it."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.base = nn.Linear(width_in, width_out, bias=False).requires_grad_(False)
        self.down = nn.Linear(width_in, _RANK, bias=False)
        self.up = nn.Linear(_RANK, width_out, bias=False)
        self.dropout = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.base(x) + self.up(self.down(self.dropout(x))) * 2.0
        return made


class _Norm(nn.Module):
    """Root mean square, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(_WIDTH), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        made: torch.Tensor = self.weight * wide.to(x.dtype)
        return made


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = _Norm(), _Norm()
        self.q, self.k, self.v, self.o = (_Adapted(_WIDTH, _WIDTH) for _ in range(4))
        self.gate, self.up, self.down = _Adapted(_WIDTH, 64), _Adapted(_WIDTH, 64), _Adapted(64, _WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.before(x)
        q, k, v = (
            part(y).view(1, _TOKENS, _HEADS, _WIDTH // _HEADS).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(1, _TOKENS, _WIDTH))
        y = self.between(x)
        made: torch.Tensor = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return made


class _Count(TorchDispatchMode):
    """Counts operators that compute something."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not operator(func).is_free
        return func(*args, **(kwargs or {}))


def operator_s(device: str) -> float:
    """Return the host's time for each operator of a step whose kernels take none, in seconds: near the least of many
    passes.
    """
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.device(device), torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=devices):
        layers = nn.Sequential(*(_Layer() for _ in range(_LAYERS)))
        x = torch.randn(1, _TOKENS, _WIDTH)

        def step() -> None:
            for parameter in layers.parameters():
                parameter.grad = None
            layers(x).sum().backward()

        for _ in range(3):
            step()
        with _Count() as counter:
            step()
        times: list[float] = []
        for _ in range(_PASSES):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        if device == "cuda":
            torch.cuda.synchronize()
    # A tenth from the least: a step that something else cut into is not the machine's own.
    return float(sorted(times)[len(times) // 10] / counter.count)
