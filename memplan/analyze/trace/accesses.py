"""The sequence of accesses of one pass, as the triggers announce them.

Forward accesses in the order seen, the loss, backward accesses in the order seen, the optimizer. Code between the end
of a trigger's forward and the next trigger counts toward the former, unless it was the last: then it is the loss.

[Note: recomputed together] A checkpoint around several triggers runs the forwards of all before the backward of any
goes on. So each then has two backward accesses, but for the last, whose recompute and backward are one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memplan.analyze.graph import AccessKind


@dataclass(slots=True, kw_only=True)
class Seen:
    """One access."""

    kind: AccessKind
    module: str
    forward: int
    recomputed: bool = False
    """Its module's forward ran again in it."""


class AccessLog:
    """A :class:`memplan.hooks.triggers.Watcher` that writes the sequence down.

    Time is cut into *segments*, numbered as they begin; ``access_of`` says whose each was. ``switch`` is told each.
    """

    def __init__(self, switch: Callable[[int], None]) -> None:
        self.accesses: list[Seen] = []
        self.nested: dict[str, str] = {}
        """Outer trigger modules, each with one that it calls."""
        self.in_backward = False
        self.active: list[str] = []
        """Modules whose forward is under way, outermost first."""
        self._switch = switch
        self._owners: list[int | None] = [0]  # access of each segment; None: known later
        self._begun: set[int] = set()
        """Forwards whose backward was announced by a gradient."""
        self._recomputed: set[int] = set()
        """Forwards that ran again."""
        self._loss = -1
        self._assumed: frozenset[str] = frozenset()

    @property
    def now(self) -> Seen | None:
        """The access under way."""
        owner = self._owners[-1]
        return self.accesses[owner] if owner is not None and self.accesses else None

    def called(self) -> frozenset[str]:
        """Modules whose forward was seen."""
        return frozenset(a.module for a in self.accesses if a.kind == "forward") - self._assumed

    def accesses_alike(self, other: AccessLog) -> bool:
        """Whether both saw the same sequence."""
        mine, others = (
            [(access.kind, access.module, access.forward) for access in log.accesses] for log in (self, other)
        )
        return mine == others

    def access_of(self) -> list[int]:
        """Return the access of each segment."""
        found, before = [], 0
        for segment, owner in enumerate(self._owners):
            if owner is None:
                later = next((o for o in self._owners[segment + 1 :] if o is not None), self._loss)
                owner = before if later < self._loss else self._loss
            found.append(owner)
            before = owner
        return found

    # ---- what the triggers say -------------------------------------------------------------------------------------

    def forward_begins(self, module: str, *, in_backward: bool) -> int:
        if in_backward:
            index = self._recompute_begins(module)
        else:
            if self.active:
                self.nested.setdefault(self.active[-1], module)
            index = self._begin("forward", module, len(self.accesses))
        self.active.append(module)
        return index

    def forward_ends(self, module: str, call: int, *, in_backward: bool) -> None:
        while self.active and self.active.pop() != module:
            pass  # forwards that were left by an exception (an early stop of a recompute)
        if not in_backward and not self.active:
            self._segment(None)

    def forward_failed(self) -> None:
        pass  # what was open is dropped by whichever comes next

    def backward_begins(self, module: str, call: int) -> None:
        now = self.now
        if call < 0 or call in self._begun:
            return
        self._begun.add(call)
        if now is None or now.kind != "backward" or now.forward != call:
            self.active.clear()  # a recompute that stopped early has left its forwards open
            self._begin("backward", module, call)

    def backward_ends(self) -> None:
        self.active.clear()

    # ---- what the trace says ---------------------------------------------------------------------------------------

    def loss_begins(self) -> None:
        """The forward and the loss are done; what comes until the first backward trigger is the loss's too."""
        self.active.clear()
        if self._loss < 0:
            self._loss = self._begin("loss", "", -1)

    def assume(self, modules: Sequence[str]) -> None:
        """Have modules that nothing was seen of accessed too, after all others' forwards and before their backwards."""
        self._assumed = frozenset(modules)
        calls = [self._begin("forward", module, len(self.accesses)) for module in modules]
        self.loss_begins()
        for module, call in zip(reversed(modules), reversed(calls), strict=True):
            self._begun.add(call)
            self._begin("backward", module, call)

    def optimizer_begins(self) -> None:
        """The backward is done."""
        self.active.clear()
        self._begin("optimizer", "", -1)

    # ---- within ----------------------------------------------------------------------------------------------------

    def _recompute_begins(self, module: str) -> int:
        """A forward in backward: the access under way if it is this module's, else another: of a forward that the
        backward lacks yet, or of one whose backward had others run again first (see [Note: recomputed together]).
        """
        now = self.now
        if now is not None and now.kind == "backward" and now.module == module and not now.recomputed:
            now.recomputed = True
            self._recomputed.add(now.forward)
            return now.forward
        calls = [i for i, a in enumerate(self.accesses) if a.kind == "forward" and a.module == module]
        calls = [call for call in calls if call not in self._recomputed]
        call = max((c for c in calls if c not in self._begun), default=max(calls, default=-1))
        if call >= 0:
            self._recomputed.add(call)
            self._begin("backward", module, call)
            self.accesses[-1].recomputed = True
        return call

    def _begin(self, kind: AccessKind, module: str, forward: int) -> int:
        self.accesses.append(Seen(kind=kind, module=module, forward=forward))
        if len(self.accesses) > 1 or self._owners != [0]:
            self._segment(len(self.accesses) - 1)
        return len(self.accesses) - 1

    def _segment(self, owner: int | None) -> None:
        self._owners.append(owner)
        self._switch(len(self._owners) - 1)
