"""The generators: each proposes candidates, the evaluator judges them, and the best of all is the plan.

A generator sees what became of what it proposed (``found = yield candidate``) and of all that was proposed before it
(``evaluator``). ``GENERATORS`` are run in their order; ``benchmarks/place.py --ablate`` says what each gains and costs.
To add a way of placing, write a generator and name it there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator

from memplan.place.evaluator import TIE, Candidate, Choice, Evaluator
from memplan.place.layout.ring_layout import LayoutRecipe
from memplan.place.problem import FEW_BLOCKS, MOST_SUBSETS, Problem

Candidates = Generator[Candidate, Choice | None, None]
CandidateGenerator = Callable[[Evaluator], Candidates]

_REGIONS = (2.0, 1.0, 3.0, 5.0, 8.0)
"""Sizes of the shared region, in units of the least: small ones leave more to residents, large ones bring further
ahead. At first the first two alone are tried."""

_FINER = (0.5, 0.75, 1.25, 1.5)
"""The best of them is multiplied by these: beside the disk what lies between two of them may be 4% better."""

_LEVELS = 9
"""Numbers of recomputed modules in the coarse grid: more of them cost time, fewer may miss where the best lies."""

_NEAR = 2
"""How many more or fewer are tried where the best is about known: of split blocks it is nearly that of whole ones."""

_THOROUGH = 2
"""Of them, those for which every recipe is tried: each costs as much, and the second is the best now and then."""

_DISK_SHARES = 4
"""Parts of the streamed blocks, by number, that lie on the disk where RAM would hold more: each number of few."""

_MOST_CLIMBED = 6000
"""Changes of what stays that are looked at, times the blocks there are: about a second of a climb."""

_STARTS = 24
"""Recipes from whose best the climb begins where blocks are few: where it ends depends on where it begins."""

_MOST_STACKED = 11_000
"""Arrangements of a few blocks: the 10,000 of six take a second. To beat something a fortieth of them is looked at."""


def search(evaluator: Evaluator, generators: Iterable[CandidateGenerator] | None = None) -> Choice | None:
    """Return the choice with the shortest pass, or None where nothing fits. ``generators``: None for all."""
    generators = GENERATORS if generators is None else tuple(generators)
    for tails in (False, True) if evaluator.elastic else (False,):
        if tails and evaluator.is_best():
            break  # tails would win nothing, and what a search finds without them is never lost
        evaluator.begin_round(tails=tails)
        for generator in generators:
            _run(generator(evaluator), evaluator)
    return evaluator.chosen()


def _run(candidates: Candidates, evaluator: Evaluator) -> None:
    found: Choice | None = None
    while True:
        try:
            candidate = candidates.send(found)
        except StopIteration:
            return
        found = evaluator.judge(candidate)


def recipes(problem: Problem, *, every: bool = True, tails: bool = False) -> Iterator[LayoutRecipe]:
    """Yield the recipes that are tried for a number of recomputed modules: what the least vram is the least of, too.
    Fewer, where not ``every``, tell which numbers are worth the others. ``tails``: those with tails instead.
    """
    in_parts = any(len(bundle) > 1 for bundle in problem.bundles)
    may_be_disk = problem.budgets.disk_bytes is None or problem.budgets.disk_bytes > 0
    total = problem.room((*problem.movable, *problem.forced))
    mixed = may_be_disk and problem.ram_bytes < total + problem.table.ranks.node_bytes(0, problem.staging_bytes)
    mixed = mixed or "disk" in problem.pins.values()
    for times in _REGIONS if every else _REGIONS[:2]:
        recipe = LayoutRecipe(times, "bundle", 0, tails=tails)
        yield recipe
        if tails:
            continue
        if in_parts:
            yield recipe._replace(grain="block")
        if mixed:
            yield recipe._replace(disk_bundles=1)
            yield recipe._replace(disk_bundles=2)


def coarse_grid(evaluator: Evaluator) -> Candidates:
    """A few recipes at some numbers of recomputed modules: spread evenly, or near what is known to be about the
    best.
    """
    levels, near = len(evaluator.rooms), evaluator.near
    if near is not None:
        yield from _at(evaluator, range(max(near - _NEAR, 0), min(near + _NEAR + 1, levels)))
    else:
        roomiest = max(range(levels), key=lambda level: (evaluator.rooms[level], -level))
        yield from _at(evaluator, [*range(0, levels, _stride(evaluator)), levels - 1, roomiest])


def finer_grid(evaluator: Evaluator) -> Candidates:
    """The numbers of recomputed modules beside the best, ever nearer: with more of them less streams and more is
    computed, so the best lies beside the best, or where it begins to fit.
    """
    stride = _stride(evaluator)
    while stride > 1:
        stride = max(1, stride // 2)
        beside = {level + step for level in evaluator.levels()[:2] for step in (-stride, stride)}
        yield from _at(evaluator, beside & set(range(len(evaluator.rooms))))


def _stride(evaluator: Evaluator) -> int:
    """Return the step between the numbers that are tried first; 1 where all of them are, or are known about."""
    if evaluator.near is not None or len(evaluator.problem.free_modules) <= MOST_SUBSETS:
        return 1
    return max(1, -(-len(evaluator.rooms) // _LEVELS))


def _at(evaluator: Evaluator, levels: Iterable[int]) -> Candidates:
    """Yield a few recipes at levels that were not looked at yet, that which may be the shortest first."""
    few = list(recipes(evaluator.problem, every=False, tails=evaluator.tails))
    fresh = set(levels) - set(evaluator.levels())
    for level in sorted(fresh, key=lambda level: (evaluator.least_s(level), level)):
        for recipe in few:
            yield Candidate(level, recipe)


def every_recipe(evaluator: Evaluator) -> Candidates:
    """Every recipe at the best numbers of recomputed modules."""
    for level in evaluator.levels()[:_THOROUGH]:
        for recipe in recipes(evaluator.problem, tails=evaluator.tails):
            yield Candidate(level, recipe)


def finer_region(evaluator: Evaluator) -> Candidates:
    """The best recipe with a shared region a little smaller and larger, twice."""
    for _ in range(2):
        best = evaluator.chosen()
        if best is None or best.recipe is None or evaluator.is_best(best.level):
            return
        for factor in _FINER:
            yield Candidate(best.level, best.recipe._replace(times=best.recipe.times * factor))


def more_on_disk(evaluator: Evaluator) -> Candidates:
    """More on the disk than RAM forces: both bring bytes at once, so that with fewer there a pass may be longer."""
    best, problem = evaluator.chosen(), evaluator.problem
    if best is None or evaluator.tails:
        return
    tried = list(recipes(problem))
    if not any(recipe.disk_bundles for recipe in tried):  # RAM holds all
        if not problem.disk_may_help:
            return
        tried = [recipe._replace(disk_bundles=bundles) for recipe in tried for bundles in range(3)]
    levels, parts = evaluator.levels()[:_THOROUGH], len(problem.movable)
    if parts > FEW_BLOCKS:
        levels, parts, tried = [best.level], _DISK_SHARES, [best.recipe or tried[0]]
    for level in levels:
        for part, recipe in itertools.product(range(1, parts + 1), tried):
            if not evaluator.is_best(level):
                yield Candidate(level, recipe._replace(disk_share=part / parts))


def every_stacking(evaluator: Evaluator) -> Candidates:
    """Every arrangement in which each block lies on another or at the start, where there are few blocks."""
    if evaluator.tails:
        return
    left = _MOST_STACKED if math.isinf(evaluator.below_s) else _MOST_STACKED // 40
    for level in evaluator.levels():
        stacked = () if evaluator.is_best(level) else evaluator.rings.stacked(evaluator.rooms[level])
        for arrangement in itertools.islice(stacked, left):
            left -= 1
            yield Candidate(level, None, arrangement)


def climb(evaluator: Evaluator) -> Candidates:
    """Change what stays, a bundle at a time, as long as that helps and is not too much work: from the best, and where
    blocks are few from the best of other recipes too, since where a climb ends depends on where it begins.
    """
    for start, recipe in _starts(evaluator):
        left = _MOST_CLIMBED // max(1, len(evaluator.problem.movable))
        room, spare = evaluator.rooms[start.level], evaluator.spare_bytes(start.level)
        top, higher = start, True
        while higher and left > 0 and not evaluator.is_best(start.level):
            higher = False
            for arrangement in evaluator.rings.beside(top.arrangement, recipe, room, spare):
                left -= 1 + recipe.tails  # which are twice the work
                found = yield Candidate(start.level, recipe, arrangement)
                if found is not None and found.pass_s < top.pass_s * (1 - TIE):
                    top, higher = found, True
                    break
                if left <= 0:
                    break


def _starts(evaluator: Evaluator) -> list[tuple[Choice, LayoutRecipe]]:
    """Return what is climbed from."""
    best = evaluator.chosen()
    if best is None:
        return []
    starts = {best.recipe or LayoutRecipe(1.0, "bundle", 0): best}
    if len(evaluator.problem.movable) <= FEW_BLOCKS:
        for choice in sorted(evaluator.timed, key=lambda choice: choice.pass_s):
            if len(starts) < _STARTS and choice.recipe is not None:
                starts.setdefault(choice.recipe, choice)
    return [(choice, recipe) for recipe, choice in starts.items()]


GENERATORS: tuple[CandidateGenerator, ...] = (
    coarse_grid,
    finer_grid,
    every_recipe,
    finer_region,
    more_on_disk,
    every_stacking,
    climb,
)
"""In the order in which they are run, once without tails and, where the device arena may be elastic, once with."""
