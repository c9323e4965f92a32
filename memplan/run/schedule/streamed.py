"""A streamed block: its one address on the device, and its state, which says whether it is there and whether its
weights may be used as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any
from weakref import ReferenceType

import torch

from memplan.analyze.graph import Tensor
from memplan.errors import RunError
from memplan.program.schema import Channel
from memplan.run.access.dispatched import announced, announced_to_others, unasked
from memplan.run.transfer.transfer import Source, Ticket


class BlockState(Enum):
    """Where a block's bytes are, who may write to its slot, and what its weights are meanwhile.

    But for ``OPEN`` they are of the class that sends every operator to :mod:`memplan.run.access.direct_access`.
    """

    AWAY = auto()
    """At home alone. Weights are placeholders. The slot is free: what overlaps it may be loaded or made there."""
    LOADING = auto()
    """On their way: the transfer of ``Streamed.ticket`` writes to the slot, where nobody else may write or read.
    Weights are placeholders.
    """
    HIDDEN = auto()
    """In the slot, to which nobody writes. Weights are placeholders all the same, as no access is under way: who reads
    a view then may go on reading it when another block lies there.
    """
    SHUT = auto()
    """In the slot, to which nobody writes. Weights are views of it, as autograd reads in backward what it saved."""
    OPEN = auto()
    """In the slot, and an access is under way: weights are views of it, of their own class, for which nothing is paid.
    A write to one is a write to the slot, and goes home when the access is over.
    """


AWAY, LOADING, HIDDEN, SHUT, OPEN = BlockState  # an Enum's attribute costs eight times what a name does
IN_SLOT = (HIDDEN, SHUT, OPEN)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kinds:
    """The classes of one tensor of a block's weights, or of what wraps some."""

    tensor: torch.Tensor
    own: type
    """While its block is open."""
    away: type
    """While it is not; of the same name."""
    noting: type
    """While it is, and its module has hooks that came after the plan: it notes who takes hold of its ``data``."""


@dataclass(slots=True, kw_only=True, eq=False)
class Streamed:
    """One streamed block: where it comes from, where it goes, and its state."""

    block: int
    name: str
    channel: Channel
    source: Source
    part: torch.Tensor
    """Its byte range of the device arena: its one address."""
    pointers: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...]
    """Each tensor of its weights, the view of the part that it is, and its placeholder."""
    rows: tuple[Tensor, ...]
    """Beside each of ``pointers``: what the plan has of it."""
    at_home: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    """Each tensor, and the view of its home that it is where rows of it are read there; empty where they never are."""
    holders: tuple[tuple[dict[str, Any], str, torch.Tensor], ...] = ()
    """Where modules hold its weights of quantizers, whose place others may take: the module's parameters, the name
    there, and the weight.
    """
    overlapping: tuple[int, ...] = ()
    """Streamed blocks whose addresses overlap this one's."""
    state: BlockState = AWAY
    """Its own methods alone change it. While rows are read at home (:meth:`point_home`) weights are views of that, of
    their own class, whatever the state.
    """
    ticket: Ticket | None = None
    """Of the transfer that is under way, while it is loading."""
    is_recomputed: bool = False
    """Its module's forward runs a second time in backward, because the plan says so."""
    has_late_hooks: bool = False
    """Its modules have hooks that came after the plan."""
    is_stale: bool = False
    """It was written to in an access that was under way: what is in the slot goes when that is over."""
    opens_in_backward: bool = False
    """Its weights are read in backward by more than autograd's own formulas: by a recompute, or by functions that keep
    them.

    Else it stays shut there: what reads it then is something else, whose graph may outlive the block's stay in its
    slot.
    """
    is_shared_out: bool = False
    """Someone may still hold what was read of it directly."""
    comes_and_goes: bool = False
    """Its bytes of the arena may be given back, and be at another address when they are there again."""
    kinds: tuple[Kinds, ...] = ()
    """Empty until the model runs under the plan: see :meth:`serve`."""
    writes: int = 0
    """To its home."""
    loads: int = 0
    misses: int = 0
    stall_s: float = 0.0
    taken: list[tuple[int, ReferenceType[torch.Tensor]]] = field(default_factory=list)
    """What hooks took hold of in the access under way, with its place in ``pointers``."""
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    """What weights were before a hook took hold of their ``data``, by place."""
    no_writes: set[tuple[int, int]] = field(default_factory=set)
    """By how much the version of a weight, by place, rises in an access that writes nothing."""
    _elements: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    """Views of the slot and placeholders that no dispatcher asks about, as torch.compile has to see them."""
    _tensors: tuple[torch.Tensor, ...] = ()
    _own: tuple[tuple[torch.Tensor, type], ...] = ()
    _noting: tuple[tuple[torch.Tensor, type], ...] = ()
    _away: tuple[tuple[torch.Tensor, type], ...] = ()
    _versions: list[int] = field(default_factory=list)
    _addresses: list[int] = field(default_factory=list)

    @property
    def key(self) -> int:
        return self.block

    # This is done in every access: flat tuples, no call that can be spared.

    def start(self, ticket: Ticket) -> None:
        """A load into the slot was started."""
        self.state, self.ticket = LOADING, ticket
        self.loads += 1

    def arrive(self) -> None:
        """The compute has waited for the load: point the parameters at the block. Raises RunError as ``bind``, and the
        load then is still to be waited for.
        """
        self.bind()
        self.ticket = None

    def bind(self) -> None:
        """Point the parameters at the block. Raises RunError, with nothing changed, where one is trained by now: what
        it learned would be lost.
        """
        with torch._C.DisableTorchFunctionSubclass(), unasked():
            for tensor, _, _ in self.pointers:
                if _is_trained(tensor):  # its class may have the attribute looked up in Python
                    raise trained_by_now(self.name)
            for tensor, there, _ in self.pointers:
                tensor.data = there
        if self.state is not OPEN:
            self.state = SHUT

    def unbind(self) -> None:
        """Have placeholders in the parameters' place."""
        with torch._C.DisableTorchFunctionSubclass(), unasked():
            for tensor, _, away in self.pointers:
                tensor.data = away

    def open(self) -> None:
        """Have the weights be as any others: an access of them begins."""
        if self.state is not OPEN and self.kinds:
            if self.state is HIDDEN:
                self.bind()
            self.state = OPEN
            for tensor, kind in self._noting if self.has_late_hooks else self._own:
                tensor.__class__ = kind
            self._versions = list(map(_version_of, self._tensors))
            if self.comes_and_goes or not self._addresses:
                self._addresses = [there.data_ptr() for _, there, _ in self.pointers]

    def shut(self) -> tuple[int, ...]:
        """Have the weights seen by nobody unnoticed: the access is over. Return which were written to, by place."""
        if self.state is not OPEN:
            return ()
        self.state = SHUT
        written: tuple[int, ...] = ()
        if (
            self.values
            or list(map(_version_of, self._tensors)) != self._versions
            or list(map(_address_of, self._tensors)) != self._addresses
            or (self.has_late_hooks and any(t.stride() != there.stride() for t, there, _ in self.pointers))
        ):
            written = tuple(self._written())
        for held, name, tensor in self.holders:
            if held.get(name) is not tensor:
                self._hold_again(held, name, tensor)
        for tensor, kind in self._away:
            tensor.__class__ = kind
        return written

    def hide(self) -> None:
        """Have placeholders in the parameters' place though the block is there: what asks no class may keep what it
        reads.
        """
        self.unbind()
        self.state = HIDDEN

    def leave(self) -> Ticket | None:
        """Have the block away, once it is shut. Return the load where it is still on its way: the slot is free when
        that was waited for.
        """
        state, ticket = self.state, self.ticket
        self.state, self.ticket = AWAY, None
        if state is SHUT or state is OPEN:
            self.unbind()
        if self.at_home and state in IN_SLOT:  # a forward that raised has left it there
            self.be_away()
        return ticket

    # This is not.

    def forget(self) -> None:
        """Have the block away, whatever was under way: nothing is any more."""
        self.state, self.ticket = AWAY, None
        self.unbind()
        self.be_away()

    def _hold_again(self, held: dict[str, Any], name: str, tensor: torch.Tensor) -> None:
        """Put a weight back where another tensor over its bytes has taken its place. PEFT's DoRA does that to
        bitsandbytes' on a CPU: it moves them to where they are. Of what lies elsewhere the script's own is kept.
        """
        found = held.get(name)
        if isinstance(found, torch.Tensor) and found.data_ptr() == tensor.data_ptr() and found.shape == tensor.shape:
            held[name] = tensor

    def announce(self, plain: frozenset[int] | None) -> None:
        """Have placeholders that torch's dispatcher asks about, and views of the slot that it does in other threads,
        but of the tensors with ids in ``plain``. None: of no tensor.
        """
        elements = self._elements or tuple((there, away) for _, there, away in self.pointers)
        self._elements = elements
        self.pointers = tuple(
            (tensor, there, away)
            if plain is None or id(tensor) in plain
            else (tensor, announced_to_others(there), announced(away))
            for (tensor, _, _), (there, away) in zip(self.pointers, elements, strict=True)
        )
        self.unbind()

    def point_home(self) -> None:
        """Point the parameters at where rows of them are read."""
        self.be_plain()
        with unasked():
            for tensor, there in self.at_home:
                tensor.data = there
        self._versions = [tensor._version for tensor, _ in self.at_home]

    def leave_home(self) -> tuple[dict[int, torch.Tensor], bool]:
        """Have the parameters where the block is: no rows of them are read now.

        Returns what was put in the place of some, by place, and whether some were written to where they lie.
        """
        replaced = {
            place: tensor.data
            for place, (tensor, there) in enumerate(self.at_home)
            if (tensor.data_ptr(), tensor.stride()) != (there.data_ptr(), there.stride())
        }
        is_written = [tensor._version for tensor, _ in self.at_home] != self._versions
        (self.bind if self.state in (SHUT, OPEN) else self.unbind)()
        self.be_away()
        return replaced, is_written

    def serve(self, kinds: tuple[Kinds, ...]) -> None:
        """Have the weights be of these classes from now on: nothing of them is open. Without any they are as others
        are.
        """
        if not kinds:
            self.be_plain()
        self.kinds = kinds
        self._tensors = tuple(tensor for tensor, _, _ in self.pointers)
        self._own = tuple((one.tensor, one.own) for one in kinds)
        self._noting = tuple((one.tensor, one.noting) for one in kinds)
        self._away = tuple((one.tensor, one.away) for one in kinds)
        self._addresses = []
        self.be_away()

    def be_plain(self) -> None:
        """Have the weights be of their own classes; who calls this sees to it that they have true values meanwhile."""
        for tensor, kind in self._own:
            tensor.__class__ = kind

    def be_away(self) -> None:
        """Have the weights be read by nobody unnoticed."""
        for tensor, kind in self._away:
            tensor.__class__ = kind
        if self.state is OPEN:
            self.state = SHUT

    def _written(self) -> Iterator[int]:
        for place, ((tensor, there, _), version) in enumerate(zip(self.pointers, self._versions, strict=True)):
            if (
                (tensor._version != version and not self._is_no_write(place, tensor._version - version))
                or (tensor.data_ptr(), tensor.stride()) != (there.data_ptr(), there.stride())
                or (place in self.values and not torch.equal(self.values[place], there))
            ):
                yield place
        self.values.clear()

    def _is_no_write(self, place: int, rise: int) -> bool:
        return not self.has_late_hooks and (place, rise) in self.no_writes

    def note_no_write(self, place: int) -> None:
        """Note that a weight's version rose in the access that is over, but its values are what they were.

        So it is wherever parametrizations come and go in a forward (PEFT's on experts): they set a tensor to itself.
        What else writes in a forward the trace has seen, and the block then stays; but for hooks that came later.
        """
        self.no_writes.add((place, self.pointers[place][0]._version - self._versions[place]))


_address_of: Callable[[torch.Tensor], int] = torch._C.TensorBase.data_ptr
_version_of: Callable[[torch.Tensor], int] = torch._C.TensorBase._version.__get__  # type: ignore[attr-defined]
_is_trained: Callable[[torch.Tensor], bool] = torch._C.TensorBase.requires_grad.__get__  # type: ignore[attr-defined]


def trained_by_now(block: str) -> RunError:
    """Return the error for a weight that was placed as a frozen one."""
    return RunError(
        f"a weight of {block} was frozen when it was placed and is trained now, but memplan only ever reads it: "
        "detach() first, then plan and attach anew"
    )
