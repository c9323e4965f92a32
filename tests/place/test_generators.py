"""The search is a tuple of generators: each is told what became of what it proposed, and may be left out or added."""

from __future__ import annotations

import random

import pytest

from benchmarks import ablation, unequal
from memplan.place import generators
from memplan.place.evaluator import Candidate, Evaluator
from memplan.place.generators import GENERATORS, climb, coarse_grid, search
from memplan.place.layout.ring_layout import LayoutRecipe
from memplan.place.problem import make_problem
from memplan.place.solve import place
from memplan.program.schema import Budgets
from tests.support.tables import MIB, NAMES, budgets, make_table


def problem_of(room=40 * MIB):
    table = make_table([8 * MIB, 3 * MIB, 5 * MIB, 7 * MIB], link=4e8)
    return make_problem(table, budgets(room), 0, {}, {})


def test_one_that_is_added_is_told_what_became_of_its_candidates(monkeypatch):
    told = []

    def mine(evaluator):
        for level in (0, 0, len(evaluator.rooms) - 1):
            told.append((yield Candidate(level, LayoutRecipe(1.0, "bundle", 0))))
        told.append((yield Candidate(0, None)))

    problem = problem_of()
    found = search(Evaluator(problem), [mine])
    assert told[0] is told[1]  # it is timed once
    assert told[3] is None
    assert found.pass_s == min(choice.pass_s for choice in told[:3] if choice)
    monkeypatch.setattr(generators, "GENERATORS", (mine,))
    plan = place(problem.table, problem.budgets, pieces=False, elastic=False, optimizer_state="device", **NAMES)
    assert plan.prediction.pass_s == found.pass_s


@pytest.mark.parametrize("left_out", [one for one in GENERATORS if one is not coarse_grid])
def test_each_may_be_left_out(left_out):
    """None makes another's plan longer: what is left is the best of what is proposed."""
    problem = problem_of()
    whole = search(Evaluator(problem, elastic=True))
    without = search(Evaluator(problem, elastic=True), [one for one in GENERATORS if one is not left_out])
    assert whole.pass_s <= without.pass_s * (1 + 1e-3)


def test_no_candidate_is_no_plan():
    assert search(Evaluator(problem_of()), []) is None
    assert search(Evaluator(problem_of(room=MIB))) is None


def test_what_cannot_be_the_best_is_not_timed():
    problem = problem_of()
    best = search(Evaluator(problem))
    evaluator = Evaluator(problem, below_s=best.pass_s * 0.9)
    assert search(evaluator) is None
    assert not evaluator.timed


def test_the_benchmark_says_what_one_gains():
    table, vram_bytes = unequal.random_list(random.Random(7))
    within = Budgets(vram_bytes=vram_bytes, ram_bytes=1 << 40, disk_bytes=0)
    case = ablation.Case("lists", "one", table, within, unequal.NAMES)
    whole, without = ablation.placed(case), ablation.placed(case, climb.__name__)
    assert whole["proposed"]["coarse_grid"] > 0
    assert "climb" in whole["proposed"]
    assert "climb" not in without["proposed"]
    plan = place(table, within, **unequal.NAMES)
    assert whole["pass_s"] == plan.prediction.pass_s <= without["pass_s"] * (1 + 1e-3)
    pairs = [{"all": whole, "without": without}]
    result = {"every": 1, "cases": {"lists": 1}, "table": {"lists": {"climb": ablation._summary(pairs)}}}
    assert "| lists | climb | 1 |" in ablation.as_markdown(result)
