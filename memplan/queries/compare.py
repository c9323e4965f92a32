"""A plan beside what other ways of placing come to."""

from __future__ import annotations

from memplan.case import case_of_plan
from memplan.place.baselines import WAYS
from memplan.program.results import Point, point_of
from memplan.program.schema import Plan


def compare(plan: Plan) -> dict[str, Point | None]:
    """Return the plan (``memplan``), and by name each other way (:mod:`memplan.place.baselines`); None where it does
    not fit.
    """
    case = case_of_plan(plan)
    found: dict[str, Point | None] = {"memplan": point_of(plan)}
    for way in WAYS:
        made = case.place_as(way)
        found[way] = None if made is None else point_of(made)
    return found
