"""Device memory against step time: what each further GiB buys, and the least for a given speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from memplan.case import Case
from memplan.errors import DoesNotFitError, InputError, TooSlowError
from memplan.program.results import Point, point_of
from memplan.program.schema import Plan
from memplan.request import check_speed
from memplan.units import format_bytes, format_seconds

POINTS = 17
"""Budgets that are looked at."""

_BETTER = 1e-3
"""A point that is faster than a cheaper one by less than this share is left out."""

_CLOSE = 1 / 256
"""Of the span of budgets: the least vram for a speed is sought to that."""


def budgets_of(case: Case, points: int = POINTS) -> list[int]:
    """Return vram budgets in bytes from the least that works to all weights on the device.

    Raises DoesNotFitError where no vram would do.
    """
    if points < 2:
        raise InputError(f"points were given as {points!r}: give a whole number, at least 2")
    least = case.least_vram_bytes()
    if least is None:
        case.place(vram_bytes=1)  # says why
        raise AssertionError("no vram is enough, but a plan was found")
    whole = max(least, case.whole_vram_bytes())
    return sorted({least + (whole - least) * turn // (points - 1) for turn in range(points)})


def frontier(
    case: Case, points: int = POINTS, progress: Callable[[str], None] | None = None, beyond: Sequence[int] = ()
) -> tuple[Point, ...]:
    """Return the Pareto set: budgets of vram, each with a shorter step than every smaller one.

    ``points``: budgets that are tried, at least 2; ``beyond``: others in bytes besides. Raises DoesNotFitError where no
    vram would do.
    """
    tried: list[Point] = []
    budgets = sorted({*budgets_of(case, points), *beyond})
    for number, vram_bytes in enumerate(budgets, 1):
        if progress is not None:
            progress(f"{number} of {len(budgets)}")
        try:
            tried.append(point_of(case.place(vram_bytes=vram_bytes)))
        except DoesNotFitError:
            continue  # below the least
    return tuple(_best(tried))


def _best(points: Sequence[Point]) -> Iterator[Point]:
    best_s = float("inf")
    for point in points:
        if point.step_s < best_s * (1 - _BETTER):
            best_s = point.step_s
            yield point


def ends_of(case: Case) -> tuple[Point, Point]:
    """Return the plan in the least vram that works, and the one with all weights on the device.

    Raises DoesNotFitError where no vram would do.
    """
    budgets = budgets_of(case, 2)  # one where the least keeps all of them
    low, high = (point_of(case.place(vram_bytes=vram_bytes)) for vram_bytes in (budgets[0], budgets[-1]))
    return low, high


def least_for(case: Case, ends: tuple[Point, Point], step_s: float) -> Point | None:
    """Return the least vram, to a 256th of its span, whose plan takes at most ``step_s`` seconds a step; None where
    none does. ``ends``: those of :func:`ends_of`.
    """
    cheapest, found = ends
    if cheapest.step_s <= step_s:
        return cheapest
    if found.step_s > step_s:
        return None
    low, high = cheapest.vram_bytes, found.vram_bytes
    close = max(1, int((high - low) * _CLOSE))
    while high - low > close:
        middle = (low + high) // 2
        point = point_of(case.place(vram_bytes=middle))
        if point.step_s <= step_s:
            found, high = point, middle
        else:
            low = middle
    return found


def require_speed(case: Case, plan: Plan, max_step_s: float) -> None:
    """Raise TooSlowError where a plan's step takes longer than ``max_step_s`` seconds, with what would do."""
    check_speed(max_step_s)
    said = plan.prediction
    if said.step_s <= max_step_s:
        return
    enough = least_for(case, ends_of(case), max_step_s)
    # Of a smaller group that ends a step no more is known than that its waiting is not its compute.
    full, rest = plan.groups
    rest_s = max(0.0, said.last_pass_s - said.compute_s * rest / plan.group)
    bound_step_s = said.step_s - (said.pass_s - said.bound_s) * full - rest_s
    way_out = (
        f"{format_bytes(enough.vram_bytes)} of vram would do ({format_seconds(enough.step_s)})"
        if enough is not None
        else "no vram would do on this hardware: use a smaller batch, fewer micro-batches per step, or a faster card"
    )
    raise TooSlowError(
        f"a step was to take at most {format_seconds(max_step_s)}, but takes {format_seconds(said.step_s)} under the "
        f"best plan in {format_bytes(plan.budgets.vram_bytes)} of vram, and no plan of these blocks and activations "
        f"takes less than {format_seconds(bound_step_s)}: {way_out}",
        step_s=said.step_s,
        least_vram_bytes=None if enough is None else enough.vram_bytes,
    )
