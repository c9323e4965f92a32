"""Births and deaths of storages in a shortened stack -> those of the whole one, in their order.

What is allocated beside what decides how well the allocator's segments are used, so a few layers do not tell of many.
A forward in the middle is as that of period 2, behind one like itself; a backward as that of period 1, which comes
after one like itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import groupby
from typing import NamedTuple

from memplan.analyze.graph import LayerGraph
from memplan.analyze.repeat.periodic import KEPT, Run
from memplan.analyze.repeat.unroll import period_of

Event = tuple[int, int, int]
"""Access, number of the storage, and its bytes: less than none where it dies."""

_MIDDLE = {"forward": 2, "backward": 1}
"""Of the periods that were traced, the one that those in the middle are like."""
_LAST = KEPT - 1


class _Birth(NamedTuple):
    """Where a storage was born. ``period``: None outside the run; ``order``: among births there, or its number."""

    side: str
    period: int | None
    order: int


class _Section(NamedTuple):
    """Accesses side by side of one period, or outside."""

    side: str
    period: int | None
    accesses: range


def whole_events(events: Sequence[Event], graph: LayerGraph, run: Run) -> Sequence[Event] | None:
    """Return the events of a pass with ``run`` at its whole length; None where the periods do not allocate alike.

    ``graph``: of the short stack, in whose accesses the events are.
    """
    sections = _sections(graph, run)
    inside: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        inside[event[0]].append(event)
    births: dict[int, _Birth] = {}
    sizes: dict[tuple[str, int | None], list[int]] = defaultdict(list)
    for section in sections:
        born = sizes[section.side, section.period]
        for access in section.accesses:
            for _, number, size_bytes in inside[access]:
                if size_bytes > 0:
                    order = number if section.period is None else len(born)
                    births[number] = _Birth(section.side, section.period, order)
                    born.append(size_bytes)
    if any(sizes[side, 1] != sizes[side, 2] for side in _MIDDLE):
        return None
    more, found = run.count - KEPT, list[Event]()
    numbers: dict[Hashable, int] = {}
    first = 0
    for section in sections:
        for period in _periods(section, more):
            for place, access in enumerate(section.accesses):
                for _, number, size_bytes in inside[access]:
                    birth = births[number]
                    for key in _keys(birth, section, period, more):
                        found.append((first + place, numbers.setdefault(key, len(numbers) + 1), size_bytes))
            first += len(section.accesses)
    return found


def _sections(graph: LayerGraph, run: Run) -> list[_Section]:
    def where(index: int) -> tuple[str, int | None]:
        access = graph.accesses[index]
        period = period_of(access.module, run)
        return (access.kind, period) if period is not None and access.kind in _MIDDLE else ("outside", None)

    return [
        _Section(*key, range((indices := list(found))[0], indices[-1] + 1))
        for key, found in groupby(range(len(graph.accesses)), where)
    ]


def _periods(section: _Section, more: int) -> Sequence[int | None]:
    """Return the periods of the whole run that a section stands for, in their order."""
    period = section.period
    if period is None:
        return (None,)
    if period == _MIDDLE[section.side]:
        return range(2, more + 3) if section.side == "forward" else range(more + 1, 0, -1)
    return (period + more if period > _MIDDLE[section.side] else period,)


def _keys(birth: _Birth, section: _Section, period: int | None, more: int) -> Sequence[Hashable]:
    """Return which storages of the whole run an event is of: one that was born as ``birth`` says, in the short stack's
    ``section``, which stands for ``period``.
    """
    if birth.period is None:
        last = period is None or period == [*_periods(section, more)][-1]
        return (birth,) if last else ()
    if period is None or section.period is None:  # born inside, gone outside: so are the others like it
        return [birth._replace(period=one) for one in _periods(_Section(*birth[:2], range(0)), more)]
    away = birth.period - section.period
    if {birth.period, section.period} == {0, _LAST}:
        return (birth._replace(period=birth.period and birth.period + more),)
    return (birth._replace(period=period + away),)
