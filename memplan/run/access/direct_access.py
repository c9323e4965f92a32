"""Streamed weights that are read or written where no trigger announces it: by a loss, a callback, an adapter's own
layer.

[Note: direct access] A weight that is not open (see :mod:`memplan.run.schedule.streamed`) has a class of the same name
as its own, whose ``__torch_function__`` torch calls in place of any operator, method or property that it is given to.
That call is given a stand-in with the weight's true values: on the CPU the very bytes of its home in RAM, else a copy
of them on the compute device. What the call returns, and what autograd saves of it, refers to those and not to a slot
that another block will lie in. So reads are right without being foreseen; they are counted, and cost a transfer each.

[Note: written weights] Frozen weights are only ever read by training, but scripts write to them between steps (ReLoRA,
an adapter that takes its beginning out of the base), and a few models do in their forward. A write is taken to the
block's home, and what lies in its slot is dropped, so that the next load has it: at once where a call writes to the
weight itself or puts another tensor in its place; when the access is over, where it was under way; and for views and
``data`` that were handed out, before the block is loaded again. What only looks at raw addresses (``data_ptr`` handed
to a kernel of one's own that writes) is not seen. A block that is homed in a file gets a home of its own, within the
budgets.
"""

from __future__ import annotations

import copy
import logging
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol
from weakref import ref

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from memplan.analyze.graph import Tensor
from memplan.errors import RunError
from memplan.hooks.compiled import untraced_deep
from memplan.hooks.nested import tensors_in
from memplan.model.weights import is_quantizer_state, is_wrapper, kind_of, rewrapped, wrapped_parts
from memplan.run.access.dispatched import announced_in, serve_with, unasked
from memplan.run.access.torch_functions import replace_functions, restore_functions
from memplan.run.memory.arena import dtype_of, shaped, strides_of
from memplan.run.memory.disk import written_pages
from memplan.run.memory.home import Home, as_bytes, layout_of
from memplan.run.schedule.streamed import Kinds, Streamed, trained_by_now

if TYPE_CHECKING:
    from memplan.run.transfer.lock import Lock

_LOG = logging.getLogger("memplan")

_SERVERS = WeakIdKeyDictionary()
"""Who serves each tensor that is not open, as a weak reference: a model that is dropped must not be kept."""


class Loader(Protocol):
    """What brings blocks and has them dropped: the conductor, as far as direct access knows it."""

    lock: Lock

    def open_in_backward(self, streamed: Streamed, *, for_good: bool) -> bool: ...

    def drop(self, block: int) -> None: ...


class DirectAccess:
    """Serves direct reads and writes of the streamed weights of one model."""

    def __init__(
        self,
        device: torch.device,
        homes: dict[int, Home],
        streamed: dict[int, Streamed],
        own_home: Callable[..., None],
        lent: dict[int, list[_HandedOut]],
    ) -> None:
        """``own_home``: gives a block that is homed in a file a home that may be written to. Raises RunError where the
        budgets have no room, unless called with ``bounded=False``. ``lent``: what was handed out under the plan before;
        what still is at the end is put there.
        """
        self.reads = 0
        self.read_bytes = 0
        self.writes = 0
        self._device = device
        self._homes = homes
        self._streamed = streamed
        self._own_home = own_home
        self._lent = lent
        self._places: dict[int, tuple[Streamed, int]] = {}
        """Of each tensor by its id: its block, and its place in that block's ``pointers``."""
        self._wrapped: dict[int, tuple[torch.Tensor, ...]] = {}
        """What tensors that are made of others are made of, by id."""
        self._handed_out: dict[int, list[_HandedOut]] = {}
        """By block."""
        self._shown: dict[int, tuple[_HandedOut, int]] = {}
        """By the id of each weight that shows its true values: those, and its version when it began to."""
        self._state: tuple[dict[str, Any], int] | None = None
        """The ``state_dict`` that is being made, and its entries so far."""
        self._conductor: Callable[[], Loader | None] = lambda: None
        self._within: Mapping[int, frozenset[int]] = {}

    # ---- beginning and end -----------------------------------------------------------------------------------------

    def begin(
        self, model: nn.Module, conductor: Loader, plain: frozenset[int], within: Mapping[int, frozenset[int]]
    ) -> None:
        """Serve from now on. ``plain``: ids of tensors that torch.compile has seen, whose class must not change in use.
        ``within``: by block, ids of the modules in whose accesses it is read.
        """
        self._within = within
        replace_functions(self, _away_in, _served)
        serve_with(_dispatched)
        for module in model.modules():  # memplan's own come later
            if (
                module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
            ):
                self.hooks_came(module)
        self._conductor = ref(conductor)
        for streamed in self._streamed.values():
            for place, (tensor, _, _) in enumerate(streamed.pointers):
                self._places[id(tensor)] = (streamed, place)
        shells: dict[int, list[torch.Tensor]] = {}
        for module in model.modules():
            for parameter in module._parameters.values():
                if parameter is not None and is_wrapper(parameter) and id(parameter) not in self._wrapped:
                    parts = tuple(part for part in wrapped_parts(parameter) if id(part) in self._places)
                    if parts:
                        self._wrapped[id(parameter)] = parts
                        shells.setdefault(self._places[id(parts[0])][0].block, []).append(parameter)
        for streamed in self._streamed.values():
            streamed.announce(plain)
            tensors = [*(tensor for tensor, _, _ in streamed.pointers), *shells.get(streamed.block, ())]
            streamed.serve(tuple(_kinds(tensor, id(tensor) in plain) for tensor in tensors))
            for tensor in tensors:
                _SERVERS[tensor] = ref(self)
            streamed.unbind()
        for block, lent in self._lent.items():
            if block in self._streamed:
                for one in lent:
                    if one.state == "home":  # of the plan before
                        one.state = "copy"
                    self._share(self._streamed[block], one)
        self._lent.clear()

    def close(self) -> None:
        """Take what was written home, and have the weights be as any others."""
        try:
            self._own_home = partial(self._own_home, bounded=False)  # what is given back has memory of its own anyway
            self.settle()
        finally:
            restore_functions(self)
            for streamed in self._streamed.values():
                for kinds in streamed.kinds:
                    _SERVERS.pop(kinds.tensor, None)
                streamed.serve(())
                streamed.announce(None)
            self._lent.update(self._handed_out)  # another plan may follow
            # A graph that is still alive must not keep the arenas.
            self._homes, self._streamed, self._handed_out, self._places, self._wrapped = {}, {}, {}, {}, {}
            self._lent = {}
            self._own_home = _refuse

    # ---- serving a call --------------------------------------------------------------------------------------------

    def is_of_backward(self, tensor: torch.Tensor) -> bool:
        """Whether a weight is read by the backward of its own module, in which it lies where it is. It is open then.

        By a function of its own that has kept it (bitsandbytes), or by a checkpoint of the script's that runs the
        module again. What else reads it there with gradients may have autograd keep it for longer.
        """
        found = self._places.get(id(tensor))
        if found is None:
            parts = self._wrapped.get(id(tensor), ())
            return bool(parts) and all(self.is_of_backward(part) for part in parts)
        streamed = found[0]
        keeps_graph = torch.is_grad_enabled()
        if keeps_graph and _module_that_calls() not in self._within.get(streamed.block, ()):
            return False
        return self._running().open_in_backward(streamed, for_good=not keeps_graph)

    def stand_in(self, tensor: torch.Tensor) -> _StandIn:
        """Return what a call is given in a weight's place: its true values. Raises RunError where it is trained by
        now.
        """
        with self._running().lock:
            parts = self._wrapped.get(id(tensor))
            if parts is None:
                lent: tuple[_Lent, ...] = (self._lend(tensor),)
                shown = lent[0].alias
                own = kind_of(tensor)
                if own is not torch.Tensor:
                    shown.__class__ = own
                    more: list[_Lent] = []
                    shown.__dict__.update(
                        {name: self._true_state(held, more) for name, held in tensor.__dict__.items()}
                    )
                    lent = (*lent, *more)
            else:
                by_id = {id(part): self._lend(part) for part in parts}
                lent = tuple(by_id.values())
                shown = rewrapped(tensor, lambda part: by_id[id(part)].alias if id(part) in by_id else part)
            return _StandIn(tensor, shown, lent)

    def _true_state(self, held: Any, lent: list[_Lent]) -> Any:
        """Return what a quantized weight keeps beside itself, with true values: of a state a copy."""
        if isinstance(held, torch.Tensor):
            if id(held) not in self._places:
                return held
            lent.append(self._lend(held))
            return lent[-1].alias
        if not is_quantizer_state(held):
            return held
        state = copy.copy(held)
        state.__dict__.update({name: self._true_state(value, lent) for name, value in vars(held).items()})
        return state

    def take_back(self, stand_in: _StandIn) -> None:
        """Take home what a call has written to what it was given. Raises RunError."""
        with self._running().lock:
            failure: RunError | None = None
            for lent in stand_in.let_go():
                streamed = lent.streamed
                if lent.held.is_shared():
                    self._share(streamed, lent.held)
                try:
                    if lent.is_written and not lent.is_replaced:
                        # A graph that has saved the weight must know, as it would of the weight itself.
                        torch.autograd.graph.increment_version(streamed.pointers[lent.place][0])
                    if lent.is_replaced or lent.is_written:
                        self.write(streamed, lent.held.row, lent.value, replaced=lent.is_replaced)
                except RunError as error:
                    failure = failure or error
            if failure is not None:
                raise failure

    def locked(self) -> Lock:
        """Return the lock under which weights come and go. Raises RunError after a detach."""
        return self._running().lock

    def _running(self) -> Loader:
        conductor = self._conductor()
        if conductor is None:
            raise _gone()
        return conductor

    def _lend(self, tensor: torch.Tensor) -> _Lent:
        streamed, place = self._places[id(tensor)]
        with torch._C.DisableTorchFunctionSubclass():
            if tensor.requires_grad:
                raise trained_by_now(streamed.name)
        row = streamed.rows[place]
        held = self._true(streamed.block, row)
        self._count(row)
        return _Lent(streamed, place, held, _alias(held.tensor))

    def _true(self, block: int, row: Tensor) -> _HandedOut:
        """Return a weight's true values where the device can read them."""
        for held in self._handed_out.get(block, ()):
            if held.row is row and held.state == "copy":
                return held  # who reads it twice sees what he wrote to it
        home = self._homes[block]
        home.touched.add(row.name)
        there = home.tensor(row)
        if home.is_writable and there.device == self._device:
            return _HandedOut(_alias(there), row, "home")
        self._drop_copies()
        with torch.inference_mode(False), torch.no_grad():
            raw = torch.empty(row.size_bytes, dtype=torch.uint8, device=self._device)
            raw.copy_(as_bytes(there))
        return _HandedOut(_alias(shaped(raw, row, home.strides[row.name])), row, "copy")

    def _drop_copies(self) -> None:
        """Forget the copies that nobody holds any more: who looks at all weights in turn must not fill the memory."""
        for block, held in list(self._handed_out.items()):
            if any(one.state == "copy" and not one.is_shared() for one in held):
                self.settle(block)

    def _count(self, row: Tensor) -> None:
        self.reads += 1
        self.read_bytes += row.size_bytes
        if self.reads == 1:
            _LOG.warning(
                "the weight %s was read outside of its module's forward and backward: what is read so is brought each "
                "time "
                "that it is read, and is right; the run's record counts it",
                row.name,
            )

    # ---- writes ----------------------------------------------------------------------------------------------------

    def write(self, streamed: Streamed, row: Tensor, value: torch.Tensor, *, replaced: bool = False) -> None:
        """Have a weight be ``value`` from its next load on. Raises RunError where it cannot be.

        ``replaced``: it is another tensor than before, which those who hold that one keep; who holds this one writes to
        it.
        """
        home = self._homes[streamed.block]
        if tuple(value.shape) != row.shape or value.dtype != dtype_of(row.dtype):
            raise RunError(
                f"the frozen weight {row.name} ({row.dtype} {row.shape}) was to become {value.dtype} "
                f"{tuple(value.shape)}, but "
                "memplan streams it as it was when it was placed: detach() first, change it, then plan and attach anew"
            )
        strides = home.strides[row.name]
        if replaced:
            if sum(one is row for one in streamed.rows) > 1:
                raise RunError(
                    f"the frozen weight {row.name} was given other data, but bitsandbytes computes with what its "
                    f"module keeps of it "
                    "beside it, which stays the old: write to the weight in place, or detach() first and load the "
                    "layer anew"
                )
            if strides_of(value) != strides or (strides is None and not value.is_contiguous()):
                raise RunError(
                    f"the frozen weight {row.name} was to become a tensor of another memory layout (strides "
                    f"{value.stride()}), but "
                    "memplan streams it as it was when it was placed: give it a contiguous copy, or detach() first"
                )
            given, value = value, value.clone()  # it may be made of what lies at home
        self._running().drop(streamed.block)
        held = self._handed_out.setdefault(streamed.block, [])
        same = [one for one in held if one.row is row]
        if replaced:
            held[:] = [one for one in held if one.row is not row]
        if not home.is_writable or (replaced and any(one.state == "home" and one.is_shared() for one in same)):
            self._own_home(streamed.block)
            for one in held:
                if one.state == "home":  # of memory that is not the home any more
                    one.state = "copy"
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # copies out of the home may be under way
        home.write(row, value)
        streamed.writes += 1
        self.writes += 1
        if replaced:
            held.append(_HandedOut(_alias(given), row, "copy"))  # until it is found that nobody holds it
            streamed.is_shared_out = True
            return
        with torch.inference_mode(False), torch.no_grad():
            for one in same:
                if one.state != "home" and one.tensor is not value:
                    one.tensor.copy_(value)

    def written_in_access(self, streamed: Streamed, places: Sequence[int]) -> None:
        """Take home what was written to a block's weights while an access of it was under way. Raises RunError."""
        values = []
        for place in places:
            tensor, there, _ = streamed.pointers[place]
            row = streamed.rows[place]
            with plain(tensor):
                value, tensor.data = tensor.data, there
                is_replaced = layout_of(value) != layout_of(there)
                if not is_replaced and _equal(there, self._homes[streamed.block].tensor(row)):
                    streamed.note_no_write(place)
                else:
                    # The slot's bytes are about to be another block's.
                    values.append((row, value if is_replaced else value.clone(), is_replaced))
        if values and streamed.is_recomputed:
            self._running().drop(streamed.block)
            raise RunError(
                f"the frozen weights of {streamed.name} were written to in a forward of it, or in its backward by what "
                f"reads them there, and "
                "the plan runs the forward a second time in backward, which would write twice: plan with "
                'activations={...: "keep"} for it, or pin it to the device'
            )
        for row, value, is_replaced in values:
            self.write(streamed, row, value, replaced=is_replaced)

    def settle(self, block: int | None = None) -> None:
        """Take home what was written to what is handed out, of a block or of all. Forget what nobody holds any more.

        What is no alias of the home is kept equal to it: where it differs it was written to. Raises RunError.
        """
        self._state = None
        blocks = list(self._handed_out) if block is None else [block] if block in self._handed_out else []
        mapped = [held.tensor for key in blocks for held in self._handed_out[key] if held.state == "mapped"]
        touched = {id(tensor) for tensor in written_pages(mapped)} if mapped else set()
        for key in blocks:
            held, home = self._handed_out[key], self._homes[key]
            for one in held:
                if one.checksum and not one.is_shared() and one.checksum != _checksum(one.tensor):
                    self._streamed[key].writes += 1  # before nobody knows any more
            for one in list(held):
                may_differ = one.state == "copy" or id(one.tensor) in touched
                if may_differ and not _equal(one.tensor, home.tensor(one.row)):
                    others = [o for o in held if o.row is one.row and o is not one and o.state != "home"]
                    if any(
                        not _equal(o.tensor, home.tensor(o.row)) and not _equal(o.tensor, one.tensor) for o in others
                    ):
                        raise RunError(
                            f"the frozen weight {one.row.name} was written to through two tensors that hold copies of "
                            f"it (its data, a "
                            "view, or entries of a state_dict), and which came last is not known: write to the weight "
                            "itself"
                        )
                    self.write(self._streamed[key], one.row, one.tensor)
            held[:] = [one for one in held if one.is_shared()]
            if not held:
                del self._handed_out[key]
            self._streamed[key].is_shared_out = bool(held)

    def _share(self, streamed: Streamed, held: _HandedOut) -> None:
        """Note that someone else holds true values of a weight, and may write to them."""
        known = self._handed_out.setdefault(streamed.block, [])
        known[:] = [one for one in known if one is not held and (one.state != "home" or one.is_shared())]
        known.append(held)
        streamed.is_shared_out = True
        if held.state == "home" and streamed.is_recomputed and not held.checksum:
            held.checksum = _checksum(held.tensor)
        self._running().drop(streamed.block)  # what is in the slot would not be what is written

    def settle_before(self, state: dict[str, Any]) -> None:
        """Take home what was written, once for each ``state_dict`` that is being made: ``state``, which grows by each
        module.
        """
        if self._state is None or self._state[0] is not state or len(state) <= self._state[1]:
            self.settle()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # who is given a home's bytes may write to them at once
        self._state = (state, len(state))  # held, lest another be taken for it

    def writes_to(self, streamed: Streamed) -> int:
        """Return how often a block was written to so far. Raises RunError where what was written cannot be kept."""
        if streamed.is_shared_out:
            with self.locked():
                self.settle(streamed.block)
                for held in self._handed_out.get(streamed.block, ()):
                    if held.state == "home" and held.checksum != (now := _checksum(held.tensor)):
                        held.checksum = now
                        streamed.writes += 1
        return streamed.writes

    def hand_out(self, block: int, row: Tensor, value: torch.Tensor) -> None:
        """Note that a weight's true values were given to someone who may write to them: an entry of a
        ``state_dict``.
        """
        streamed = self._streamed.get(block)
        if streamed is not None:
            self._homes[block].touched.add(row.name)
            self._share(
                streamed, _HandedOut(_alias(value), row, "home" if self._homes[block].is_writable else "mapped")
            )

    def show_all(self) -> None:
        """Have every streamed weight be its true values, and nothing served, until ``hide_all``. Nothing may be on its
        way.
        """
        with self.locked():
            for streamed in self._streamed.values():
                home = self._homes[streamed.block]
                values = [home.tensor(row) for row in streamed.rows]
                streamed.be_plain()
                for (tensor, _, _), row, value in zip(streamed.pointers, streamed.rows, values, strict=True):
                    home.touched.add(row.name)
                    held = _HandedOut(_alias(value), row, "home" if home.is_writable else "mapped")
                    self._shown[id(tensor)] = (held, tensor._version)
                    with unasked():
                        tensor.data = value

    def put_in(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return what was put in the place of a weight that shows its true values, or None."""
        shown = self._shown.get(id(tensor))
        if shown is None or layout_of(tensor) == layout_of(shown[0].tensor):
            return None
        return tensor.data

    def hide_all(self) -> None:
        """Have every streamed weight be away again, and what was written to them be in their homes. Raises RunError."""
        shown, self._shown = self._shown, {}
        touched = {
            id(tensor)
            for tensor in written_pages([held.tensor for held, _ in shown.values() if held.state == "mapped"])
        }
        written: list[tuple[Streamed, Tensor, torch.Tensor, bool]] = []
        lent: list[tuple[_HandedOut, Streamed]] = []
        value = tensor = torch.empty(0)
        with self.locked():
            for streamed in self._streamed.values():
                for tensor, _, _ in streamed.pointers:
                    held, version = shown.pop(id(tensor), (None, 0))
                    if held is None:
                        continue
                    with plain(tensor):
                        replaced = layout_of(tensor) != layout_of(held.tensor)
                        if replaced or tensor._version != version or id(held.tensor) in touched:
                            written.append((streamed, held.row, tensor.data, replaced))
                    if not replaced:
                        lent.append((held, streamed))
                streamed.unbind()
                streamed.be_away()
            failure: RunError | None = None
            for streamed, row, value, replaced in written:
                try:
                    self.write(streamed, row, value, replaced=replaced)
                except RunError as error:
                    failure = failure or error
            written.clear()
            del value, tensor
            for held, streamed in lent:
                if held.is_shared():
                    self._share(streamed, held)
            if failure is not None:
                raise failure

    def hooks_came(self, module: nn.Module) -> None:
        """Note that a module has a hook that the plan's trace may not have seen."""
        for block, ids in self._within.items():
            if id(module) in ids and block in self._streamed:
                self._streamed[block].has_late_hooks = True

    def taken(self, tensor: torch.Tensor, data: torch.Tensor, *, is_versioned: bool) -> None:
        """Note that a hook takes hold of a weight that is open. ``is_versioned``: the weight tells if it is written
        to.
        """
        if id(tensor) in self._places:
            streamed, place = self._places[id(tensor)]
            if streamed.is_open:
                streamed.taken.append((place, ref(data)))
                if not is_versioned:
                    streamed.values.setdefault(place, data.clone())

    def keep_taken(self, streamed: Streamed) -> None:
        """Have what hooks took hold of in an access, and still hold, be the weights' true values from now on."""
        taken, streamed.taken = streamed.taken, []
        for place, reference in taken:
            data = reference()
            if data is not None and data.data_ptr() == streamed.pointers[place][1].data_ptr():
                held = self._true(streamed.block, streamed.rows[place])
                data.data = _alias(held.tensor)
                self._share(streamed, held)


@dataclass(slots=True, eq=False)
class _HandedOut:
    """True values of a weight that someone else may hold and write to."""

    tensor: torch.Tensor
    row: Tensor
    state: Literal["home", "copy", "mapped"]
    """The home's own bytes; a copy on the device; or a private mapping of the home's file."""
    checksum: int = 0
    """Of the home's own bytes, of a block that is recomputed: who writes to them between forward and backward is heard.
    """
    for_good: bool = False
    """Its storage itself was handed out, of which nobody tells who holds it."""

    def is_shared(self) -> bool:
        """Whether anyone but this refers to its memory."""
        return self.for_good or _uses_of(self.tensor) > _ALONE


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same memory as a tensor that is no view of another: it holds nothing but the storage."""
    with torch.inference_mode(False), torch.no_grad():
        made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return made.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _uses_of(tensor: torch.Tensor) -> int:
    """Return how many refer to a tensor's memory, this look included."""
    uses: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return uses


_ALONE = _uses_of(torch.empty(1))
"""Of a tensor whose memory nobody else refers to."""


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(as_bytes(tensor).numpy().data) or 1


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(as_bytes(one).cpu(), as_bytes(other).cpu())


@dataclass(slots=True, eq=False)
class _Lent:
    """True values of a weight in one call."""

    streamed: Streamed
    place: int
    held: _HandedOut
    alias: torch.Tensor
    is_replaced: bool = False
    is_written: bool = False
    value: torch.Tensor = field(init=False)
    _version: int = field(init=False)

    def __post_init__(self) -> None:
        self._version = self.alias._version

    def look(self) -> None:
        """See what the call has done to it, and let go of it."""
        alias, true = self.alias, self.held.tensor
        self.is_replaced = layout_of(alias) != layout_of(true)
        self.is_written = alias._version != self._version
        self.value = alias.data if self.is_replaced else true
        del self.alias


@dataclass(slots=True, eq=False)
class _StandIn:
    """What a call is given in a weight's place.

    Not the weight itself: autograd saves a tensor that was given to an operator as it is, whatever it is pointed at
    later.
    """

    weight: torch.Tensor
    shown: torch.Tensor
    lent: tuple[_Lent, ...]

    def let_go(self) -> tuple[_Lent, ...]:
        """Hold nothing that was shown any more, and return what was made of it."""
        del self.shown
        for lent in self.lent:
            lent.look()
        return self.lent


# ---- the classes -----------------------------------------------------------------------------------------------------

_FRAMES = 8
"""As far back as a caller is looked for: torch's own frames lie between."""
_AWAY: dict[type, type] = {}
_NOTING: dict[type, type] = {}


def _kinds(tensor: torch.Tensor, is_plain: bool) -> Kinds:
    own = kind_of(tensor)
    away = _AWAY.get(own)
    if away is None:
        served = {
            name: _serving(getattr(own, name))
            for name in _COPIES
            if getattr(own, name, None) is not getattr(torch.Tensor, name, None)
        }
        looks = {name: _looking(getattr(own, name)) for name in ("grad", "requires_grad")}
        away = _AWAY[own] = _named(own, {**served, **looks, "__torch_function__": classmethod(_torch_function)})
    noting = own
    if own is nn.Parameter and not is_plain:
        noting = _NOTING.get(own) or _NOTING.setdefault(
            own, _named(own, {"data": property(_data, _set_data), "detach": _detach})
        )
    return Kinds(tensor=tensor, own=own, away=away, noting=noting)


def _named(own: type, more: dict[str, Any]) -> type:
    """Return a subclass that goes by its parent's name: libraries know quantized weights by it."""

    def new(kind: type, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)  # type(weight)(...) makes one of the same kind

    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "_memplan_kind": own, "__new__": new}
    made: type = type(own)(own.__name__, (own,), {**names, **more})
    return made


_COPIES = ("__copy__", "__deepcopy__", "__reduce_ex__", "to", "cuda", "cpu", "xpu")
"""Methods of which classes of parameters have their own, that look at ``type(self)`` before torch looks at them."""


def _serving(method: Callable[..., Any]) -> Callable[..., Any]:
    def served(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        server = _server_of(tensor)
        if torch._C._current_graph_task_id() != -1 and server is not None and server.is_of_backward(tensor):
            return method(tensor, *args, **kwargs)
        return _served(method, (tensor, *args), kwargs, (tensor,))

    return served


def _looking(attribute: Any) -> property:
    """Return an attribute that is looked at of all parameters in each step, by the short way: nothing is read for
    it.
    """

    def get(tensor: torch.Tensor) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return attribute.__get__(tensor)

    def put(tensor: torch.Tensor, value: Any) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            attribute.__set__(tensor, value)

    def drop(tensor: torch.Tensor) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            attribute.__delete__(tensor)

    return property(get, put, drop)


def _data(tensor: torch.Tensor) -> torch.Tensor:
    data: torch.Tensor = nn.Parameter.data.__get__(tensor)  # type: ignore[attr-defined]
    server = _server_of(tensor)
    if server is not None:
        server.taken(tensor, data, is_versioned=False)
    return data


def _detach(tensor: torch.Tensor) -> torch.Tensor:
    detached = torch.Tensor.detach(tensor)
    server = _server_of(tensor)
    if server is not None:
        server.taken(tensor, detached, is_versioned=True)
    return detached


def _set_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    nn.Parameter.data.__set__(tensor, data)  # type: ignore[attr-defined]


@untraced_deep
def _torch_function(
    kind: type,
    func: Callable[..., Any],
    types: Sequence[type],
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> Any:
    kwargs = kwargs or {}
    if func in _DESCRIBE or (func is torch.Tensor.type and len(args) == 1 and not kwargs):
        with torch._C.DisableTorchFunctionSubclass(), unasked():
            return func(*args, **kwargs)
    return _serve(func, args, kwargs)


def _serve(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is torch.Tensor.detach and _is_for_a_parameter():
        raise RunError(
            "nn.Parameter was given a frozen weight that memplan streams, and torch makes no parameter of such: give "
            "it "
            "weight.data, or detach() from memplan first"
        )
    held = {id(tensor): tensor for tensor in _away_in((args, kwargs))}
    # Of its ``data`` nothing tells whether a hook of the backward writes to it where it is open.
    if torch._C._current_graph_task_id() != -1 and func != _GET_DATA:
        servers = [(_server_of(tensor), tensor) for tensor in held.values()]
        if all(server is not None and server.is_of_backward(tensor) for server, tensor in servers):
            return func(*args, **kwargs)
    if func in _LAYOUT and len(held) == 1 and args and id(args[0]) in held:
        like = _like(args[0])
        if like is not None:
            return func(like, *args[1:], **kwargs)
    return _served(func, args, kwargs, tuple(held.values()))


def _dispatched(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer an operator that torch's C++ gives weights that are away."""
    held = {id(tensor): tensor for tensor in announced_in((args, kwargs))}
    if operator is torch.ops.aten._has_compatible_shallow_copy_type.default:
        raise RunError(
            "a frozen weight that memplan streams was put in another tensor's place (other.data = weight), which would "
            "hold a "
            "placeholder: give it weight.data"
        )
    if torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled():
        # Of what autograd saved beside it, views lie in a slot that is another block's by now.
        raise RunError(
            "a backward read a frozen weight that was not there: it entered a layer by a tensor that was made inside "
            "of it (taken by "
            "a hook, or from a cache), not by what it returned, or a hook gave the weight to C++. Plan with "
            'activations="recompute", pin that layer to the device (pins={...: "device"}), or give weight.detach()'
        )
    if operator in _LOOK_AT_MEMORY:
        raise RunError(
            "a frozen weight that memplan streams was read by C++ that looks at its memory next (tolist() where torch "
            "asks no class): "
            "give it weight.detach()"
        )
    if any(_server_of(tensor) is None for tensor in held.values()):
        raise _gone()
    return _served(operator, args, kwargs, tuple(held.values()))


def _served(func: Callable[..., Any], args: Any, kwargs: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """Call a function with weights' true values in their place."""
    given: list[tuple[DirectAccess, _StandIn]] = []
    try:
        for tensor in tensors:
            server = _server_of(tensor)
            if server is None:
                raise _gone()
            with _outside_of_functorch():
                given.append((server, server.stand_in(tensor)))
        shown = {id(one.weight): one.shown for _, one in given}
        result = func(*_exchanged(args, shown), **_exchanged(kwargs, shown))
        if func in _STORAGES:
            for _, one in given:
                for lent in one.lent:
                    lent.held.for_good = True
        # What is done in place gives back the tensor that it was done to.
        return next((one.weight for _, one in given if one.shown is result), result)
    finally:
        shown = {}
        failure: RunError | None = None
        for server, one in given:
            try:
                server.take_back(one)
            except RunError as error:
                failure = failure or error
        if failure is not None:
            raise failure


def _outside_of_functorch() -> AbstractContextManager[object]:
    """Return a context in which tensors are made as they are: within ``torch.func.grad`` they would be wrapped."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return nullcontext()
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


def _exchanged(value: Any, shown: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return shown.get(id(value), value)
    if isinstance(value, (tuple, list)):
        parts = [_exchanged(part, shown) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {key: _exchanged(part, shown) for key, part in value.items()}
    return value


def _refuse(block: int, **options: bool) -> None:
    raise _gone()


def _gone() -> RunError:
    return RunError(
        "a weight was read whose model ran under a plan and is gone: keep the model, or call detach() before it is "
        "dropped"
    )


def _server_of(tensor: torch.Tensor) -> DirectAccess | None:
    found = _SERVERS.get(tensor)
    return None if found is None else found()


def _module_that_calls() -> int:
    """Return the id of the module in whose method a call is made, 0 where none is near."""
    frame = sys._getframe(1).f_back
    for _ in range(2 * _FRAMES):
        if frame is None:
            break
        held = frame.f_locals.get("self")
        if isinstance(held, nn.Module):
            return id(held)
        frame = frame.f_back
    return 0


def _is_for_a_parameter() -> bool:
    """Whether a call comes from the making of a parameter, which then demands a tensor of the very same class."""
    frame = sys._getframe()
    for _ in range(_FRAMES):
        if frame.f_code is nn.Parameter.__new__.__code__:
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def _away_in(value: Any) -> Iterator[torch.Tensor]:
    return (tensor for tensor in tensors_in(value) if type(tensor) is _AWAY.get(kind_of(tensor)))


def _like(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return a tensor without memory that is laid out as a weight is at home."""
    server = _server_of(tensor)
    place = None if server is None else server._places.get(id(tensor))
    if server is None or place is None:
        return None
    row = place[0].rows[place[1]]
    raw = torch.empty(row.size_bytes, dtype=torch.uint8, device="meta")
    return shaped(raw, row, server._homes[place[0].block].strides[row.name])


class plain:
    """Has a tensor be of its own class for a while."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._kind: type = type(tensor)

    def __enter__(self) -> None:
        self._tensor.__class__ = kind_of(self._tensor)

    def __exit__(self, *error: object) -> None:
        self._tensor.__class__ = self._kind


def _descriptors() -> Iterator[Any]:
    """Yield what says of a tensor what a placeholder says as well."""
    for name in [
        "shape",
        "dtype",
        "device",
        "layout",
        "requires_grad",
        "grad",
        "grad_fn",
        "is_leaf",
        "retains_grad",
        "output_nr",
        "_version",
        "ndim",
        "nbytes",
        "itemsize",
        "is_cpu",
        "is_cuda",
        "is_xpu",
        "is_mps",
        "is_meta",
        "is_sparse",
        "is_sparse_csr",
        "is_quantized",
        "is_nested",
        "is_mkldnn",
        "is_ipu",
        "is_vulkan",
        "is_mtia",
        "is_maia",
        "name",
        "names",
        "volatile",
        "_backward_hooks",
        "_post_accumulate_grad_hooks",
        "_grad",
        "grad_dtype",
        "_base",
    ]:
        held = getattr(torch.Tensor, name, None)
        for way in ("__get__", "__set__", "__delete__"):
            if hasattr(held, way):
                yield getattr(held, way)
    for name in [
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "element_size",
        "get_device",
        "is_floating_point",
        "is_complex",
        "is_signed",
        "requires_grad_",
        "register_hook",
        "register_post_accumulate_grad_hook",
        "retain_grad",
        "new_empty",
        "new_zeros",
        "new_ones",
        "new_full",
        "is_inference",
        "is_neg",
        "is_conj",
        "__len__",
        "__hash__",
        "__dir__",
        "is_pinned",
        "is_shared",
        "is_coalesced",
        "_is_view",
        "is_same_size",
        "is_distributed",
        "has_names",
    ]:
        if hasattr(torch.Tensor, name):
            yield getattr(torch.Tensor, name)
    for name in [
        "numel",
        "is_floating_point",
        "is_complex",
        "is_signed",
        "is_conj",
        "is_neg",
        "is_inference",
        "is_same_size",
    ]:
        yield getattr(torch, name)


_DESCRIBE = frozenset(_descriptors())
_GET_DATA: Any = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_LOOK_AT_MEMORY = frozenset({torch.ops.aten.resolve_conj.default, torch.ops.aten.resolve_neg.default})
"""What torch's C++ calls before it reads by an address and by the strides of the tensor that it was given."""
_LAYOUT = frozenset(
    {torch.Tensor.stride, torch.Tensor.is_contiguous, torch.Tensor.storage_offset, torch.Tensor.dim_order}
)
_STORAGES = frozenset({torch.Tensor.untyped_storage, torch.Tensor.storage, torch.Tensor._typed_storage})
