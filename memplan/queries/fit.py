"""The most that fits: batch, sequence, rank, quantization; each alone, the rest as asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Unpack

from memplan.case import Case, case_of
from memplan.errors import DoesNotFitError, InputError
from memplan.plan_options import PlanOptions
from memplan.program.results import Fit, Point, point_of
from memplan.queries.frontier import ends_of, least_for
from memplan.request import Request, refuse

SLOWDOWN = 0.05
"""Of the step with everything on the device: the least vram is said for a step that is at most so much longer."""

MOST = {"batch": 4096, "sequence": 1 << 20, "rank": 1024}
"""Nobody asks for more."""

STEPS = {"batch": 1, "sequence": 64, "rank": 8}
"""What is counted in."""

_FORETOLD = 6
"""Sizes that are looked at by a line through what is known; then the span is halved."""

QUANTIZATIONS = ("int8", "nf4", "nf4-nested")
"""From the dearest to the cheapest."""


def fit(
    model: Any,
    batch: tuple[int, ...] | Mapping[str, int],
    *,
    rank: int,
    targets: str | Sequence[str] = "all-linear",
    slowdown: float = SLOWDOWN,
    quantizations: bool = True,
    **options: Unpack[PlanOptions],
) -> Fit:
    """Find the largest batch, sequence and rank that fit. ``quantizations``: look at those of a model given by name,
    too. ``options``: those of :func:`memplan.plan` but for adapter, max_step_s and gains.

    Raises InputError for what cannot be asked at all.
    """
    if not 0 <= slowdown < float("inf"):
        raise InputError(f"slowdown was given as {slowdown!r}: give a share such as 0.05, at least 0")
    if isinstance(batch, Mapping):
        raise InputError("fit was asked of a size in pixels, which it does not vary: plan it, or give a batch alone")
    if not isinstance(batch, (tuple, list)):
        raise InputError(f"the batch was given as a {type(batch).__name__}: give a shape, such as (4, 512)")
    refuse(options, ("adapter",), "fit", "which is asked with rank and targets")
    refuse(options, ("max_step_s", "gains"), "fit", "which says the most that fits, however long a step takes")
    tell = options.get("progress") or _nothing

    def case(shape: tuple[int, ...], of_rank: int, **more: Any) -> Case:
        adapter = {"rank": of_rank, "targets": targets}
        return case_of(Request.of(model, shape, {**options, "adapter": adapter, **more}))

    tell("what was asked")
    asked = case(batch, rank)
    asked_point = _point(asked)
    least = least_at = whole = None
    with suppress(DoesNotFitError):
        least, whole = ends_of(asked)
        least_at = least_for(asked, (least, whole), whole.step_s * (1 + slowdown))
    most: dict[str, tuple[int, Point] | None] = {}
    bounded: list[str] = []
    asks: dict[str, tuple[int, Callable[[int], Case]]] = {
        "batch": (batch[0], lambda size: case((size, *batch[1:]), rank)),
        "rank": (rank, lambda size: case(batch, size)),
    }
    if len(batch) == 2:
        asks["sequence"] = (batch[1], lambda size: case((batch[0], size), rank))
    for what, (start, make) in sorted(asks.items()):
        tell(f"the greatest {what}")
        step = STEPS[what] if start >= STEPS[what] else 1
        found, is_bounded = _greatest(make, start, step, MOST[what])
        most[what] = found
        if is_bounded:
            bounded.append(what)
    quantized: dict[str, Point | None] = {}
    if quantizations and options.get("quantization") is None and not options.get("qlora") and isinstance(model, str):
        for name in QUANTIZATIONS:
            tell(name)
            with suppress(InputError):  # its package is not there, or does not know this model
                quantized[name] = _point(case(batch, rank, quantization=name))
    return Fit(
        asked=asked_point,
        least=least,
        least_at=least_at,
        whole=whole,
        slowdown=slowdown,
        most=most,
        bounded=tuple(bounded),
        quantized=quantized,
    )


def _greatest(make: Callable[[int], Case], start: int, step: int, most: int) -> tuple[tuple[int, Point] | None, bool]:
    """Return the greatest size that fits with its plan, and whether something else than memory stands in its way.

    Memory grows about linearly: what is known foretells where it ends, and looking there mends the foretelling.
    """
    needs: dict[int, int] = {}  # least vram in bytes, by size
    best: Case | None = None
    low, high = 0, most + 1  # fits (nothing does), does not
    wrong = high  # the least size that is known to be none, whatever the memory
    size, tries = start, 0
    while True:
        try:
            case = make(size)
            need = case.least_vram_bytes()
        except InputError:
            if size == start:
                raise
            need, wrong = None, size
        else:
            if need is not None:
                needs[size] = need
        if need is not None and need <= case.budgets.vram_bytes:
            low, best = size, case
        else:
            high = size
        first, last = (low // step + 1) * step, (high - 1) // step * step
        if first > last:
            break
        tries += 1
        if tries > _FORETOLD or high == wrong <= most:
            size = (low + high) // 2 if high <= most else 2 * low
        else:
            size = _foretold(needs, case.budgets.vram_bytes, (low, high))
        size = min(max(size // step * step, first), last)
    return (None if best is None else (low, point_of(best.place()))), high == wrong


def _foretold(needs: Mapping[int, int], budget: int, between: tuple[int, int]) -> int:
    """Return the size at which a line through two needs reaches the budget: those of the greatest size that is known to
    fit and the least that is known not to (``between``), else the two that are nearest.
    """
    ends = [size for size in between if size in needs]
    nearest = sorted(needs, key=lambda size: (abs(needs[size] - budget), size))[:2]
    one, *others = ends if len(ends) == 2 else nearest or [1]
    if one not in needs:
        return 1
    if not others or needs[others[0]] == needs[one]:
        alike = [size for size, need in needs.items() if need == needs[one]]
        return max(alike) * 2 if needs[one] <= budget else min(alike) // 2
    two = others[0]
    return int(one + (budget - needs[one]) * (two - one) / (needs[two] - needs[one]))


def _point(case: Case) -> Point | None:
    try:
        return point_of(case.place())
    except DoesNotFitError:
        return None


def _nothing(text: str) -> None:
    pass
