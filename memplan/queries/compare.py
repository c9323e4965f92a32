"""A plan beside what other ways of placing come to."""

from __future__ import annotations

import dataclasses

from memplan.case import case_of_plan
from memplan.place.baselines import WAYS
from memplan.program.results import Point, point_of
from memplan.program.schema import Plan


def compare(plan: Plan) -> dict[str, Point | None]:
    """Return the plan (``memplan``), where micro-batches share its loads the one in which they do not, and by name each
    other way (:mod:`memplan.place.baselines`); None where it does not fit.
    """
    case = case_of_plan(plan)
    found: dict[str, Point | None] = {"memplan": point_of(plan)}
    if plan.group > 1:
        found["memplan, no groups"] = point_of(dataclasses.replace(case, groups=(1,)).place())
    for way in WAYS:
        made = case.place_as(way)
        found[way] = None if made is None else point_of(made)
    return found
