"""Modules whose forward would do otherwise a second time: those may not be recomputed where the model does not itself.

A forward may write to what it computes with: running statistics, a codebook, its own weights, a counter. Three ways to
see that: operators that write to tensors which the model holds, tensors that are read and replaced, and objects that
hold something else after a pass in which every layer ran twice. Besides, a forward may draw from random numbers that a
checkpoint does not keep.
"""

from __future__ import annotations

import contextvars
import os
import random
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from memplan.analyze.blocks.blocks import Unit
from memplan.errors import ModelError
from memplan.model.names import canonical
from memplan.model.weights import is_adapters
from memplan.state.snapshot import Snapshot

if TYPE_CHECKING:
    from memplan.analyze.trace.traced import Traced


def stateful_at_first(kept: Traced, units: Sequence[Unit], snapshot: Snapshot) -> dict[str, str]:
    """Return the units of which one pass tells that their forward would do otherwise a second time, with the
    reasons.
    """
    replaced = {key: f"it reads {name} and puts another in its place" for key, name in kept.updated.items()}
    return {**_holders(replaced, units), **kept.stateful}


def stateful_twice(kept: Traced, again: Traced, units: Sequence[Unit], snapshot: Snapshot) -> dict[str, str]:
    """Return those of the units, which ran twice in ``again`` alone, that left another state there."""
    changed = {key for key in {*kept.state, *again.state} if kept.state.get(key) != again.state.get(key)}
    named = {key: f"it changes {snapshot.name_of(key) or 'an object that it holds'}" for key, _ in changed}
    return _holders(named, units) or {unit.name: reason for unit in units for reason in list(named.values())[:1]}


def watch_draws(units: Sequence[Unit]) -> Mapping[str, str]:
    """Hook the units, to see which draw Python's or NumPy's random numbers, or change what the process has. ``faked``
    takes the hooks away.
    """
    drawn: dict[str, str] = {}

    def watch(unit: Unit) -> None:
        before: list[tuple[object, dict[str, str], list[tuple[int, int]]]] = []

        def begins(module: nn.Module, args: object) -> None:
            before.append((_position(), dict(os.environ), _context()))

        def ends(module: nn.Module, args: object, output: object) -> None:
            position, environment, context = before.pop() if before else (_position(), dict(os.environ), _context())
            if position != _position():
                drawn[unit.name] = "it draws Python's or NumPy's random numbers, which a checkpoint does not keep"
            if environment != dict(os.environ):
                drawn[unit.name] = "it changes the environment (os.environ)"
            if context != _context():
                drawn[unit.name] = "it sets a context variable"

        unit.module.register_forward_pre_hook(begins)
        unit.module.register_forward_hook(ends)

    for unit in units:
        if unit.kind in ("layer", "expert"):
            watch(unit)
    return drawn


def refuse_replaced(model: nn.Module, placed: Sequence[tuple[nn.Module, str, nn.Parameter]]) -> None:
    """Raise ModelError where a forward has put others in the place of frozen parameters (of modules, by name)."""
    gone = [
        (m, n) for m, n, p in placed if not p.requires_grad and m._parameters.get(n) is not p and not is_adapters(m)
    ]
    for module, own in gone:
        name = next((name for name, part in model.named_modules() if part is module), "")
        raise ModelError(
            f"the forward of {canonical(name) or 'the model'} puts another tensor in the place of its frozen "
            f"parameter {own}: a plan would lose it. Write to the parameter in place (under torch.no_grad()), or "
            "hold the tensor as a buffer"
        )


def _holders(named: Mapping[int, str], units: Sequence[Unit]) -> dict[str, str]:
    """Return the units from whose modules the objects of these ids can be reached, with what is said of those."""
    found: dict[str, str] = {}
    for unit in units if named else ():
        inside = Snapshot(module=unit.module)
        inside.restore()  # nothing was changed, but large arrays are read-only until then
        reached = inside.reaches(set(named))
        if reached:
            found[unit.name] = next(reason for key, reason in named.items() if key in reached)
    return found


def _context() -> list[tuple[int, int]]:
    """Return what the context variables are set to, by ids: a forward that sets one to what it was sets none."""
    return [(id(variable), id(value)) for variable, value in contextvars.copy_context().items()]


def _position() -> tuple[object, ...]:
    """Return how far Python's and NumPy's generators are."""
    _, words, spare = random.getstate()
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return words[0], words[-1], spare
    state = numpy.random.get_state()
    return words[0], words[-1], spare, int(state[1][0]), *state[2:]
