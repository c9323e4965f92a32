"""The other models of a process: what they take of the one budget that all share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from msgspec import structs
from torch import nn

from memplan import api
from memplan.case import case_of_plan, profile_of, ram_of, vram_of
from memplan.device_kinds import is_apart
from memplan.errors import DoesNotFitError
from memplan.program.schema import Plan
from memplan.queries.one_plan import one_plan
from memplan.ranks.session import Session
from memplan.request import Sizes
from memplan.run.handle import Handle
from memplan.run.memory.arena import is_placeholder
from memplan.trainers.loading.deferred_placement import asked_device, is_trained_in_part, waits_itself
from memplan.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What other models take, in bytes, and which they are."""

    vram_bytes: int
    ram_bytes: int
    names: tuple[str, ...]


class Scope:
    """Models that share budgets: those of a process under ``memplan run``, or of one ``placing``."""

    def __init__(self) -> None:
        self.loaded: WeakSet[nn.Module] = WeakSet()
        """What ``from_pretrained`` gave, and what was made of it with an adapter."""
        self.placed: WeakSet[Handle] = WeakSet()
        """What is, or was, under a plan."""

    def plan(
        self,
        model: nn.Module,
        planned: Callable[[dict[str, Any]], Plan],
        options: Mapping[str, Any],
        more: Iterable[nn.Module] = (),
        *,
        call: object = None,
        ranks: Session | None = None,
    ) -> Plan:
        """Return the plan that is ``planned`` within what others leave of the budgets among ``options``.

        A model under a plan takes what that predicts. One that is only read (a reference, a teacher, a reward) takes
        vram where it lies on the compute device or was asked to, and RAM else, as much as there is: beyond that the
        kernel reads a mapped one from its files again. One that waits to be trained takes nothing yet. ``more``: models
        that ``from_pretrained`` may not have given. ``call``: what the model is called with: of several ranks
        the one with the largest plans for all. ``ranks``: as for ``one_plan``. Raises DoesNotFitError, which names the
        others; RankError.
        """
        only_to_come = Sizes.of(options).vram_bytes is None

        def within(given: dict[str, Any]) -> Plan:
            return self._plan(model, planned, given, more, only_to_come=only_to_come)

        return one_plan(model, within, options, call, ranks)

    def _plan(
        self,
        model: nn.Module,
        planned: Callable[[dict[str, Any]], Plan],
        options: Mapping[str, Any],
        more: Iterable[nn.Module],
        *,
        only_to_come: bool,
    ) -> Plan:
        """``only_to_come``: as for ``_taken``."""
        profile = profile_of(options.get("hardware", "auto"))
        sizes = Sizes.of(options)
        taken = self._taken(model, profile.device, more, only_to_come=only_to_come)
        if not taken.names:
            return planned(dict(options))
        vram_bytes, ram_bytes = vram_of(sizes, profile), ram_of(sizes, profile)
        rest_bytes = max(0, vram_bytes - taken.vram_bytes)
        rest = {"vram": rest_bytes, "margin": 0, "ram": max(0, ram_bytes - taken.ram_bytes)}
        try:
            plan = planned({**options, **rest})
        except DoesNotFitError as error:
            raise _refused(error, model, taken, vram_bytes, ram_bytes) from None
        return structs.replace(plan, notes=(*plan.notes, f"{_takes(taken)}; the budgets here are what is left."))

    def trained_beside(self, model: nn.Module) -> list[nn.Module]:
        """Return the other models that a script has loaded, trains in part, and has not called to be trained yet."""
        own = {id(module) for module in model.modules()}
        return [
            other
            for other in self._in_order()
            if waits_itself(other)
            and is_trained_in_part(other)
            and not any(id(module) in own for module in other.modules())
        ]

    def share_of_ram(self, model: nn.Module, others: Sequence[nn.Module], options: Mapping[str, Any]) -> dict[str, Any]:
        """Return options with a model's share of the RAM, where others wait to be trained beside it."""
        if not others:
            return dict(options)
        ram_bytes = ram_of(Sizes.of(options), profile_of(options.get("hardware", "auto")))
        own = frozen_bytes(model)
        return {**options, "ram": ram_bytes * own // max(1, own + sum(map(frozen_bytes, others)))}

    def make_room(self, model: nn.Module, error: DoesNotFitError, options: Mapping[str, Any]) -> bool:
        """Have the models that are under a plan take less, for one that did not fit beside them; return whether they
        do.

        Each keeps its share of the budgets by its weights, or what it needs at least. Only where none of them is at
        work: no forward may have been before it whose backward comes after.
        """
        if error.least_vram_bytes is None:
            return False
        vram_bytes = vram_of(Sizes.of(options), profile_of(options.get("hardware", "auto")))
        short = error.least_vram_bytes - vram_bytes
        own = frozen_bytes(model)
        smaller = False
        for handle in list(self.placed):
            if short <= 0 or not handle.is_attached:
                continue
            case, peaks = case_of_plan(handle.plan), handle.plan.prediction.peaks
            its = sum(block.size_bytes for block in handle.plan.table.blocks)
            share = its / max(1, its + own)
            budgets = structs.replace(case.budgets, ram_bytes=int(case.budgets.ram_bytes * share))
            case = replace(case, budgets=budgets)
            least = case.least_vram_bytes()
            if least is None or least >= peaks.vram_bytes:
                continue
            taken = max(least, min(peaks.vram_bytes - short, int(vram_bytes * share)))
            plan = case.place(pieces=False, vram_bytes=taken)
            handle.change(plan)
            short -= peaks.vram_bytes - plan.prediction.peaks.vram_bytes
            smaller = True
        return smaller

    def _taken(self, model: nn.Module, device: str, more: Iterable[nn.Module], *, only_to_come: bool) -> Taken:
        """``only_to_come``: of the compute device, what is not there yet; what is there is not among the free bytes."""
        seen = {id(tensor) for tensor in _tensors(model)}
        vram = ram = 0
        names: list[str] = []
        for handle in list(self.placed):
            tensors = {id(tensor) for tensor in _tensors(handle.model)}
            if not handle.is_attached or tensors & seen:
                continue
            seen |= tensors
            peaks = handle.plan.prediction.peaks
            there = (
                sum(arena.size_bytes for arena in handle.plan.arenas if arena.tier == "device") if only_to_come else 0
            )
            vram += max(0, peaks.vram_bytes - there)
            ram += peaks.ram_bytes
            names.append(name_of(handle.model))
        for other in self.trained_beside(model):
            seen |= {id(tensor) for tensor in _tensors(other)}
        for other in (*more, *self._in_order()):
            asked = asked_device(other)
            before = vram + ram
            for tensor in _tensors(other):
                if id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                if is_apart(device) and tensor.device.type == device:
                    vram += 0 if only_to_come else _size(tensor)
                elif is_apart(device) and asked is not None and asked.type == device:
                    vram += _size(tensor)
                elif tensor.device.type == "cpu":
                    ram += _size(tensor)
            if vram + ram > before:
                names.append(name_of(other))
        return Taken(vram_bytes=vram, ram_bytes=ram, names=tuple(names))

    def _in_order(self) -> list[nn.Module]:
        return sorted(self.loaded, key=id)


class Unplaced:
    """The first of several models that did not fit, until the next is called: an error then says what both need."""

    class Refused(NamedTuple):
        """A model and why it has no plan."""

        model: nn.Module
        error: DoesNotFitError

    def __init__(self) -> None:
        self._held: Unplaced.Refused | None = None

    def put(self, model: nn.Module, error: DoesNotFitError) -> None:
        self._held = self.Refused(model, error)

    def is_known(self, model: nn.Module) -> bool:
        return self._held is not None and self._held.model is model

    def take(self, model: nn.Module) -> Refused | None:
        """Return what is held of another model, and hold it no more."""
        held = self._held
        if held is None or held.model is model:
            return None
        self._held = None
        return held


def name_of(model: nn.Module) -> str:
    """Return what a message calls a model: its class, and where it came from."""
    inner: Any = model
    while hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    came_from = getattr(getattr(inner, "config", None), "_name_or_path", None)
    return f"{type(inner).__name__} of {came_from}" if came_from else type(inner).__name__


def frozen_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's frozen weights."""
    return sum(_size(parameter) for parameter in model.parameters() if not parameter.requires_grad)


def plan_of_least(plan: Plan) -> Plan:
    """Return the plan of the same blocks that takes the least vram."""
    least = case_of_plan(plan).least_vram_bytes()
    return plan if least is None else api.smaller(plan, least)


def together(first: DoesNotFitError, one: nn.Module, second: DoesNotFitError, other: nn.Module) -> DoesNotFitError:
    """Return the error of two models neither of which has a plan."""
    least = None
    tips = second.suggestions
    if first.least_vram_bytes is not None and second.least_vram_bytes is not None:
        least = first.least_vram_bytes + second.least_vram_bytes
        rest = [tip for tip in tips if not tip.startswith("give at least") or " of vram" not in tip]
        tips = (f"give at least {format_bytes(least)} of vram ({least} bytes) for both", *rest)
    needed = "do not fit" if least is None else f"need at least {format_bytes(least)} of vram"
    return DoesNotFitError(
        f"{name_of(one)} and {name_of(other)} {needed} to be trained together",
        least_vram_bytes=least,
        limited_by=f"{first.limited_by}, of the first; {second.limited_by}, of the second",
        suggestions=tips,
    )


def _refused(
    error: DoesNotFitError, model: nn.Module, taken: Taken, vram_bytes: int, ram_bytes: int
) -> DoesNotFitError:
    """Return an error that speaks of all models in place of one that speaks of what they leave."""
    least = error.least_vram_bytes
    others = " and ".join(taken.names)
    beside = (
        f"{others} beside it take {format_bytes(taken.vram_bytes)} of vram and {format_bytes(taken.ram_bytes)} of ram"
    )
    tips = [tip for tip in error.suggestions if not tip.startswith("give at least") or " of vram" not in tip]
    if least is None:
        needed = "there is no room for the blocks that would leave it"
    else:
        least += taken.vram_bytes
        needed = f"together they need at least {format_bytes(least)}"
        tips.insert(0, f"give at least {format_bytes(least)} of vram ({least} bytes) for all of them")
    return DoesNotFitError(
        f"{name_of(model)} cannot be trained beside {others} in {format_bytes(vram_bytes)} of vram and "
        f"{format_bytes(ram_bytes)} of ram: {needed}",
        least_vram_bytes=least,
        limited_by=f"{error.limited_by}; {beside}",
        suggestions=tuple(tips),
    )


def _takes(taken: Taken) -> str:
    """Return what others take, in words."""
    take = "takes" if len(taken.names) == 1 else "take"
    sizes = f"{format_bytes(taken.vram_bytes)} of vram and {format_bytes(taken.ram_bytes)} of ram"
    return f"{' and '.join(taken.names)} beside this model {take} {sizes}"


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _size(tensor: torch.Tensor) -> int:
    return 0 if tensor.device.type == "meta" or is_placeholder(tensor) else tensor.numel() * tensor.element_size()
