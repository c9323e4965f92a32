"""What a contender comes down to: a model that trains, and what is measured of it while it does."""

from __future__ import annotations

import ctypes
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.versus.models import Model, batch_of, loss_of
from memplan.model.live_storages import StorageLedger
from memplan.model.names import canonical
from memplan.program.schema import Plan
from memplan.run.handle import Handle

LEARNING_RATE = 1e-3
GRADIENT_STEPS = 2
"""The first steps, whose gradients are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all contenders of a part have in common, and this one's folder."""

    model: Model
    shape: tuple[int, int]
    checkpoint: Path
    plans: Path
    """Folder of the plans, by contender."""
    scratch: Path
    """Folder of this contender's own, which goes when it has ended."""
    device: str
    checkpointing: bool
    """Whether contenders other than memplan recompute every layer (memplan chooses)."""
    card_bytes: int | None
    """Of the emulated card; None: the card as it is."""

    def batch(self) -> dict[str, torch.Tensor]:
        return {name: value.to(self.device) for name, value in batch_of(self.model, self.shape).items()}


@dataclass(slots=True, kw_only=True)
class Training:
    """A model that trains."""

    setting: Setting
    model: nn.Module
    optimizer: torch.optim.Optimizer
    backward: Callable[[torch.Tensor], Any] = torch.Tensor.backward
    step: Callable[[], Any] | None = None
    """In place of the optimizer's own step and clearing of gradients."""
    gradient: Callable[[torch.Tensor], torch.Tensor | None] = lambda parameter: parameter.grad
    handle: Handle | None = None
    plan: Plan | None = None
    batch: Mapping[str, torch.Tensor] = field(init=False)
    losses: list[float] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    """Of the steps after the first ones."""

    def __post_init__(self) -> None:
        self.batch = self.setting.batch()

    # ---- steps
    # ---------------------------------------------------------------------------------------------------------

    def first(self) -> dict[str, Any]:
        """Train the first steps, write their gradients to ``gradients.safetensors``, and one more; return that one's
        peaks.
        """
        kept: dict[str, torch.Tensor] = {}
        missing = 0
        for index in range(GRADIENT_STEPS):
            self._pass()
            for name, parameter in self._trained():
                gradient = self.gradient(parameter)
                if gradient is None:
                    missing += 1
                else:
                    full = gradient.to_local() if hasattr(gradient, "to_local") else gradient  # of one process
                    kept[f"{index}.{name}"] = full.detach().float().cpu().clone()
            self._step()
        from safetensors.torch import save_file

        save_file(kept, self.setting.scratch / "gradients.safetensors")
        kept.clear()
        with self._counted() as ledger:  # in a step of its own: on the CPU those copies would be device bytes
            self._pass()
            self._step()
        found: dict[str, Any] = {"gradients_missing": missing}
        if self.setting.device == "cuda":
            found["device_peak_bytes"] = torch.cuda.max_memory_allocated()
        elif self.handle is not None:
            found["device_peak_bytes"] = self.handle.record.vram_peak_bytes
        elif ledger is not None:
            found["device_peak_bytes"] = ledger.peak_bytes
        return found

    def train(self, steps: int) -> list[float]:
        """Train so many steps; return the seconds of each."""
        times_s = []
        for _ in range(steps):
            began = time.perf_counter()
            self._pass()
            self._step()
            self._synchronize()
            times_s.append(time.perf_counter() - began)
        self.times_s += times_s
        return times_s

    def _pass(self) -> None:
        loss = loss_of(self.model(**self.batch))
        self.backward(loss)
        self.losses.append(loss.item())  # waits for the device: once a step, for every contender alike

    def _step(self) -> None:
        if self.step is not None:
            self.step()
        else:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _trained(self) -> list[tuple[str, torch.Tensor]]:
        """Return what the optimizer holds, by its canonical name."""
        names = {id(parameter): canonical(name) for name, parameter in self.model.named_parameters()}
        held = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return [(names.get(id(parameter), f"lost {index}"), parameter) for index, parameter in enumerate(held)]

    def _synchronize(self) -> None:
        if self.setting.device == "cuda":
            torch.cuda.synchronize()

    # ---- memory
    # --------------------------------------------------------------------------------------------------------

    def _counted(self) -> AbstractContextManager[Any]:
        """Count live device bytes inside: on the CPU where device and host are told apart, or all is on the device."""
        if self.setting.device == "cuda":
            torch.cuda.empty_cache()  # what loading left: else the peak of what is reserved begins with it
            torch.cuda.reset_peak_memory_stats()
            return nullcontext()
        if self.handle is not None:
            return self.handle.watch_memory(self.optimizer)
        is_whole = type(self) is Whole
        return (
            StorageLedger.of_training(self.model, self.optimizer, *self.batch.values()) if is_whole else nullcontext()
        )

    def page_locked_bytes(self) -> int:
        """Return the host bytes that are page-locked: by torch's allocator at its peak, and by memplan."""
        if self.setting.device != "cuda":
            return 0
        found = int(torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0))
        if self.handle is not None and (runtime := self.handle._runtime) is not None:
            locked = [held.untyped_storage() for held in runtime.tiers.on_host() if held.is_pinned()]
            found += sum({storage.data_ptr(): storage.nbytes() for storage in locked}.values())
            found += self.handle.record.ram_peak_bytes - runtime.tiers.host_bytes  # the rings
        return found

    # ---- what came of it
    # -----------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, Any]:
        """Return what was measured until now."""
        found: dict[str, Any] = {
            "losses": self.losses,
            "rss_peak_bytes": peak_rss_bytes(),
            "page_locked_bytes": self.page_locked_bytes(),
        }
        if self.setting.device == "cuda":
            found["device_peak_bytes"] = torch.cuda.max_memory_allocated()
            found["reserved_peak_bytes"] = torch.cuda.max_memory_reserved()
        if self.plan is not None and self.handle is not None:
            record, said = self.handle.record, self.plan.prediction
            outside_s = said.step_s - said.pass_s
            found |= {
                "stall_share": record.stall_s / record.pass_s if record.pass_s else 0.0,
                "misses": record.misses,
                "out_of_order": record.out_of_order,
                "loads_per_pass": record.loads / max(1, record.passes),
                "bound_s": said.bound_s + outside_s,
                "over_bound": statistics.median(self.times_s) / (said.bound_s + outside_s) - 1
                if self.times_s
                else None,
                "predicted_s": said.step_s,
                "predicted_peak_bytes": said.peaks.vram_bytes,
                "vram_bytes": self.plan.budgets.vram_bytes,
                "recomputed": sum(policy == "recompute" for policy in self.plan.policies().values()),
            }
        return found


class Whole(Training):
    """All of it on the device."""


def peak_rss_bytes() -> int:
    """Return the greatest resident memory of this process since it began or since :func:`forget_peak_rss`.

    Page-locked memory that a driver gave is not in it on every system: it is told apart.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if peak is None else peak)


def forget_peak_rss() -> bool:
    """Have the peak begin anew with what is resident now. Returns False where the kernel does not do that
    (gVisor's).
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def end_with_parent() -> None:
    """Have the kernel end this process when the one that began it is gone."""
    die, kill = 1, 9
    ctypes.CDLL(None).prctl(die, kill)
