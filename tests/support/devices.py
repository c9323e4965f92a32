"""Devices with memory and streams of their own, and memplan on them: a CUDA one, or the simulated one.

The simulated one (``tests/device``) has either all copies or all compute go first, where nothing waits: a missing wait
gives NaN or an old weight under one of the two. To the bit a run is the whole model's: on CUDA the device's own, on the
simulated device the CPU's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from memplan.demo import deterministic
from memplan.hardware.profile import HardwareProfile
from memplan.run.attach import attach
from tests.run import test_optimizer_state, test_parity, test_rows
from tests.run.test_parity import assert_forwards, plan_for
from tests.support.training import CPU, Run, assert_equal, batch_of, make, train

ORDERS = ("copies first", "compute first")
NAMES = [pytest.param("cuda", marks=pytest.mark.gpu), *(name.replace(" ", "-") for name in ORDERS)]
"""Of a device in a test's name."""

_PLANNED = (test_parity, test_optimizer_state, test_rows)
"""Whose plans are made for the device."""


@dataclass(frozen=True)
class Apart:
    """A device of that kind, and what a test does on it."""

    kind: str

    @property
    def device(self) -> torch.device:
        return torch.device(self.kind, 0)

    @property
    def module(self) -> Any:
        """``torch.cuda``, or what there is in its place."""
        return torch.get_device_module(self.kind)

    @property
    def profile(self) -> HardwareProfile:
        return replace(CPU, name=f"test-{self.kind}", device=self.kind)

    def attention(self) -> AbstractContextManager[None]:
        """The attention that a device without a kernel of its own takes, where a trace or the CPU is to take it too."""
        return sdpa_kernel(SDPBackend.MATH) if self.kind == "sim" else nullcontext()

    def there(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.to(self.device) for name, value in batch.items()}

    def batches(self, kind: str, seed: int = 3) -> dict[str, torch.Tensor]:
        return self.there(batch_of(kind, seed=seed))

    def train(self, model: nn.Module, kind: str, **options: Any) -> Run:
        """Train on the device and bring home what came of it."""
        return at_home(train(model, kind, **{"batches": self.batches, **options}))

    def whole(self, model: nn.Module, kind: str, *, batches: Any = batch_of, **options: Any) -> Run:
        """Train the whole model where its bits are those that a plan's run must have."""
        if self.kind != "sim":
            there = lambda *args, **more: self.there(batches(*args, **more))  # noqa: E731
            return self.train(model.to(self.device), kind, batches=there, **options)
        with self.attention():
            return train(model, kind, batches=batches, **options)


@cache
def whole_of(apart: Apart, kind: str, **options: Any) -> Run:
    """Return what three steps of the whole model give; trained once in a process, and not to be changed."""
    return apart.whole(make(kind, **options), kind)


def planned(apart: Apart, kind: str, tmp_path, *, checked=False, share=0.4, offload=(), attach=attach, **options):
    """Train three steps under a plan, compare, and return the handle of the run, which has ended."""
    model = make(kind, **options)
    plan = plan_for(model, kind, share=share, offload=offload)
    with attach(model, plan, checked=checked, cache=tmp_path) as handle:
        run = apart.train(model, kind)
    whole = whole_of(apart, kind, **options)
    assert_equal(whole, run)
    again = {policy.module for policy in plan.activations if policy.activations == "recompute"}
    assert_forwards(whole, run, again, steps=3)
    assert handle.record.loads > 0
    return handle


def at_home(run: Run) -> Run:
    return Run(
        losses=[loss.cpu() for loss in run.losses],
        gradients=[{name: value.cpu() for name, value in gradients.items()} for gradients in run.gradients],
        adapters={name: value.cpu() for name, value in run.adapters.items()},
        forwards=run.forwards,
    )


@contextmanager
def on(name: str) -> Iterator[Apart]:
    """Have the device of that name there, and the plans of tests made for it."""
    apart = Apart("cuda" if name == "cuda" else "sim")
    with ExitStack() as there, pytest.MonkeyPatch.context() as patch:
        if name == "cuda":
            there.enter_context(deterministic())  # only warned, attention's backward is not; see conftest.py too
        else:
            from tests.device import backend

            there.enter_context(backend.present(name.replace("-", " ")))
        for module in _PLANNED:
            patch.setattr(module, "CPU", apart.profile)
        yield apart
