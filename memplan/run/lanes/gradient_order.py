"""Gradients are summed in the order of micro-batches, as one by one: floating-point sums are others in another order.

Lanes come to each layer's backward in their order, so mostly there is nothing to wait for. A lane that has left the
common way (another expert, an early exit) may come to a parameter before one of lower number: then it waits until that
one has given its own, is over, or cannot give any, since it never called the only trigger module that the parameter is
in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from memplan.errors import RunError

if TYPE_CHECKING:
    from memplan.run.lanes.turns import Group


class GradientOrder:
    """The hooks of one group on its model's trained parameters. Gone after :meth:`remove`."""

    def __init__(self, parameters: Sequence[nn.Parameter], owners: Mapping[int, str]) -> None:
        """``owners``: the one trigger module that each parameter is in, by the parameter's id, where it is one."""
        self._owners = [owners.get(id(parameter)) for parameter in parameters]
        self._places = {id(parameter): place for place, parameter in enumerate(parameters)}
        self._due = [0] * len(parameters)
        """By parameter, the lane that is to give a gradient next."""
        self._given = [0] * len(parameters)
        """By parameter, the lanes that have given one, as bits."""
        self.group: Group | None = None
        self.serve_again: Callable[[], Callable[[], None]] = lambda: lambda: None
        """Returns what has the access under way go on once others have had their turn."""
        self._hooks = [p.register_hook(self._coming(place)) for place, p in enumerate(parameters)]

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def gave(self, parameter: nn.Parameter) -> bool:
        """Return whether the lane whose turn it is has given a parameter a gradient."""
        assert self.group is not None
        place = self._places.get(id(parameter))
        return place is not None and bool(self._given[place] >> self.group.now.index & 1)

    def _coming(self, place: int) -> Callable[[torch.Tensor], None]:
        """Return the hook of a parameter, which is called before each of its gradients is added."""
        due, given = self._due, self._given

        def comes(gradient: torch.Tensor) -> None:
            group = self.group
            if group is None:
                return
            lane = group.now.index
            if due[place] != lane:
                self._out_of_turn(place, lane, group)
            due[place] = lane + 1
            given[place] |= 1 << lane

        return comes

    def _out_of_turn(self, place: int, lane: int, group: Group) -> None:
        """Return when the lane's gradient may be added. Raises RunError where it is too late."""
        if self._due[place] < lane:
            self._wait(place, lane, group)
        elif self._due[place] > lane + 1:
            raise RunError(
                "a parameter was given a gradient twice in one backward, with another micro-batch's between, so the "
                "sum is not that of the micro-batches one by one: do not step the optimizer; zero the gradients"
            )

    def _wait(self, place: int, lane: int, group: Group) -> None:
        """Return when all lanes before have given theirs, or never will."""
        owner = self._owners[place]

        def is_due() -> bool:
            return all(
                other.is_over
                or self._given[place] >> other.index & 1
                or (other.is_in_backward and owner is not None and owner not in other.called)
                for other in group.lanes[:lane]
            )

        if not is_due():
            group.refuse_changed()
            again = self.serve_again()
            group.let_others(is_due)
            again()
