"""What plans amount to, without their rows: points of memory against time, and the most that fits."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

from memplan.atomic_write import read, reason
from memplan.errors import PlanFormatError, PlanMismatchError
from memplan.program.schema import Plan


class Point(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One budget of vram and the plan for it. Bytes; times in seconds, predicted."""

    vram_bytes: int
    """The budget."""
    peak_bytes: int
    """What the plan needs of it."""
    ram_bytes: int
    disk_bytes: int
    pass_s: float
    step_s: float
    bound_s: float
    """The window bound of a micro-batch (docs/theory.md)."""
    compute_s: float
    loaded_bytes_per_pass: int
    recomputed: int
    """Layers whose activations are recomputed in backward."""
    offloaded: int
    """Layers whose activations wait in RAM."""
    binds: str
    group: int = 1
    """Micro-batches that share each load: figures but the step's are of so many."""


def point_of(plan: Plan) -> Point:
    """Return a plan as a point."""
    said = plan.prediction
    policies = list(plan.policies().values())
    return Point(
        vram_bytes=plan.budgets.vram_bytes,
        peak_bytes=said.peaks.vram_bytes,
        ram_bytes=said.peaks.ram_bytes,
        disk_bytes=said.peaks.disk_bytes,
        pass_s=said.pass_s,
        step_s=said.step_s,
        bound_s=said.bound_s,
        compute_s=said.compute_s,
        loaded_bytes_per_pass=said.loaded_bytes_per_pass,
        recomputed=policies.count("recompute"),
        offloaded=policies.count("offload"),
        binds=said.binds,
        group=plan.group,
    )


class Frontier(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Budgets of vram, each with a shorter step than every smaller one: what ``memplan frontier --json`` prints."""

    model: str
    hardware: str
    tokens: int
    """Of one micro-batch."""
    points: tuple[Point, ...]

    @classmethod
    def load(cls, path: str | Path) -> Frontier:
        """Read what ``memplan frontier --json`` printed. Raises PlanFormatError."""
        try:
            return msgspec.json.decode(read(path), type=cls)
        except (OSError, ValueError) as error:  # ValueError: no frontier, or a zero byte in the path
            raise PlanFormatError(
                f"{path} is no frontier: {reason(error)}; give a file that memplan frontier --json wrote"
            ) from None

    def beside(self, plan: Plan) -> tuple[Point, ...]:
        """Return the points. Raises PlanMismatchError where they are of another case than ``plan``."""
        mine = (self.model, self.hardware, self.tokens)
        its = (plan.model, plan.hardware, plan.workload.tokens)
        if mine != its:
            raise PlanMismatchError(
                f"the frontier is of {mine[0]} on {mine[1]}, {mine[2]:,} tokens or samples per micro-batch, the plan "
                f"of {its[0]} on {its[1]}, {its[2]:,}: make it with what the plan was made with"
            )
        return self.points


class Fit(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Answers; a ``Point`` is None where nothing fits."""

    asked: Point | None
    """What was asked."""
    least: Point | None
    """The least vram for that."""
    least_at: Point | None
    """The least vram for a step that is at most ``slowdown`` longer than with everything on the device."""
    whole: Point | None
    """Everything on the device, whatever that takes."""
    slowdown: float
    most: dict[str, tuple[int, Point] | None]
    """The greatest ``batch``, ``sequence`` and ``rank`` that fit, each with its plan; a key lacks where it was not
    asked.
    """
    bounded: tuple[str, ...]
    """Those of them that more memory would not make greater."""
    quantized: dict[str, Point | None]
    """By quantization; those that are not installed lack."""
