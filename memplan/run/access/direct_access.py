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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol
from weakref import ref

import torch
from torch import nn

from memplan.analyze.graph import Tensor
from memplan.errors import RunError
from memplan.model.weights import is_quantizer_state, is_wrapper, kind_of, rewrapped, wrapped_parts
from memplan.run.access.away import (
    SERVERS,
    away_in,
    gone,
    kinds_of,
    module_that_calls,
    plain,
    refuse_home,
    serve_call,
    serve_operator,
)
from memplan.run.access.dispatched import serve_with, unasked
from memplan.run.access.lent import HandedOut, Lent, StandIn, alias_of, are_equal, checksum
from memplan.run.access.torch_functions import replace_functions, restore_functions
from memplan.run.memory.arena import dtype_of, shaped, strides_of
from memplan.run.memory.disk import written_pages
from memplan.run.memory.home import Home, as_bytes, layout_of
from memplan.run.schedule.streamed import Streamed, trained_by_now

if TYPE_CHECKING:
    from memplan.run.transfer.lock import Lock

_LOG = logging.getLogger("memplan")


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
        lent: dict[int, list[HandedOut]],
    ) -> None:
        """``own_home``: gives a block that is homed in a file a home that may be written to. Raises RunError where the
        budgets have no room, unless called with ``bounded=False``. ``lent``: what was handed out under the plan before;
        what still is at the end is put there.
        """
        self.reads = 0
        self.read_names: set[str] = set()
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
        self._handed_out: dict[int, list[HandedOut]] = {}
        """By block."""
        self._shown: dict[int, tuple[HandedOut, int]] = {}
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
        replace_functions(self, away_in, serve_call)
        serve_with(serve_operator)
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
            streamed.serve(tuple(kinds_of(tensor, id(tensor) in plain) for tensor in tensors))
            for tensor in tensors:
                SERVERS[tensor] = ref(self)
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
                    SERVERS.pop(kinds.tensor, None)
                streamed.serve(())
                streamed.announce(None)
            self._lent.update(self._handed_out)  # another plan may follow
            # A graph that is still alive must not keep the arenas.
            self._homes, self._streamed, self._handed_out, self._places, self._wrapped = {}, {}, {}, {}, {}
            self._lent = {}
            self._own_home = refuse_home

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
        if keeps_graph and module_that_calls() not in self._within.get(streamed.block, ()):
            return False
        return self._running().open_in_backward(streamed, for_good=not keeps_graph)

    def like_of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return a tensor without memory that is laid out as a weight is at home; None for one that is not served."""
        found = self._places.get(id(tensor))
        if found is None:
            return None
        row = found[0].rows[found[1]]
        raw = torch.empty(row.size_bytes, dtype=torch.uint8, device="meta")
        return shaped(raw, row, self._homes[found[0].block].strides[row.name])

    def stand_in(self, tensor: torch.Tensor) -> StandIn:
        """Return what a call is given in a weight's place: its true values. Raises RunError where it is trained by
        now.
        """
        with self._running().lock:
            parts = self._wrapped.get(id(tensor))
            if parts is None:
                lent: tuple[Lent, ...] = (self._lend(tensor),)
                shown = lent[0].alias
                own = kind_of(tensor)
                if own is not torch.Tensor:
                    shown.__class__ = own
                    more: list[Lent] = []
                    shown.__dict__.update(
                        {name: self._true_state(held, more) for name, held in tensor.__dict__.items()}
                    )
                    lent = (*lent, *more)
            else:
                by_id = {id(part): self._lend(part) for part in parts}
                lent = tuple(by_id.values())
                shown = rewrapped(tensor, lambda part: by_id[id(part)].alias if id(part) in by_id else part)
            return StandIn(tensor, shown, lent)

    def _true_state(self, held: Any, lent: list[Lent]) -> Any:
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

    def take_back(self, stand_in: StandIn) -> None:
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
            raise gone()
        return conductor

    def _lend(self, tensor: torch.Tensor) -> Lent:
        streamed, place = self._places[id(tensor)]
        with torch._C.DisableTorchFunctionSubclass():
            if tensor.requires_grad:
                raise trained_by_now(streamed.name)
        row = streamed.rows[place]
        held = self._true(streamed.block, row)
        self._count(row)
        return Lent(streamed, place, held, alias_of(held.tensor))

    def _true(self, block: int, row: Tensor) -> HandedOut:
        """Return a weight's true values where the device can read them."""
        for held in self._handed_out.get(block, ()):
            if held.row is row and held.state == "copy":
                return held  # who reads it twice sees what he wrote to it
        home = self._homes[block]
        home.touched.add(row.name)
        there = home.tensor(row)
        if home.is_writable and there.device == self._device:
            return HandedOut(alias_of(there), row, "home")
        self._drop_copies()
        with torch.inference_mode(False), torch.no_grad():
            raw = torch.empty(row.size_bytes, dtype=torch.uint8, device=self._device)
            raw.copy_(as_bytes(there))
        return HandedOut(alias_of(shaped(raw, row, home.strides[row.name])), row, "copy")

    def _drop_copies(self) -> None:
        """Forget the copies that nobody holds any more: who looks at all weights in turn must not fill the memory."""
        for block, held in list(self._handed_out.items()):
            if any(one.state == "copy" and not one.is_shared() for one in held):
                self.settle(block)

    def _count(self, row: Tensor) -> None:
        self.reads += 1
        self.read_names.add(row.name)
        self.read_bytes += row.size_bytes
        if self.reads == 1:
            _LOG.warning(
                "the weight %s was read outside of its module's forward and backward: what is read so is brought "
                "each time that it is read, and is right; the run's record counts it",
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
                f"{tuple(value.shape)}, but memplan streams it as it was when it was placed: detach() first, change "
                "it, then plan and attach anew"
            )
        strides = home.strides[row.name]
        if replaced:
            if sum(one is row for one in streamed.rows) > 1:
                raise RunError(
                    f"the frozen weight {row.name} was given other data, but bitsandbytes computes with what its "
                    "module keeps of it beside it, which stays the old: write to the weight in place, or detach() "
                    "first and load the layer anew"
                )
            if strides_of(value) != strides or (strides is None and not value.is_contiguous()):
                raise RunError(
                    f"the frozen weight {row.name} was to become a tensor of another memory layout (strides "
                    f"{value.stride()}), but memplan streams it as it was when it was placed: give it a contiguous "
                    "copy, or detach() first"
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
            held.append(HandedOut(alias_of(given), row, "copy"))  # until it is found that nobody holds it
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
                if not is_replaced and are_equal(there, self._homes[streamed.block].tensor(row)):
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
                if one.checksum and not one.is_shared() and one.checksum != checksum(one.tensor):
                    self._streamed[key].writes += 1  # before nobody knows any more
            for one in list(held):
                may_differ = one.state == "copy" or id(one.tensor) in touched
                if may_differ and not are_equal(one.tensor, home.tensor(one.row)):
                    others = [o for o in held if o.row is one.row and o is not one and o.state != "home"]
                    if any(
                        not are_equal(o.tensor, home.tensor(o.row)) and not are_equal(o.tensor, one.tensor)
                        for o in others
                    ):
                        raise RunError(
                            f"the frozen weight {one.row.name} was written to through two tensors that hold copies "
                            "of it (its data, a view, or entries of a state_dict), and which came last is not known: "
                            "write to the weight itself"
                        )
                    self.write(self._streamed[key], one.row, one.tensor)
            held[:] = [one for one in held if one.is_shared()]
            if not held:
                del self._handed_out[key]
            self._streamed[key].is_shared_out = bool(held)

    def _share(self, streamed: Streamed, held: HandedOut) -> None:
        """Note that someone else holds true values of a weight, and may write to them."""
        known = self._handed_out.setdefault(streamed.block, [])
        known[:] = [one for one in known if one is not held and (one.state != "home" or one.is_shared())]
        known.append(held)
        streamed.is_shared_out = True
        if held.state == "home" and streamed.is_recomputed and not held.checksum:
            held.checksum = checksum(held.tensor)
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
                    if held.state == "home" and held.checksum != (now := checksum(held.tensor)):
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
                streamed, HandedOut(alias_of(value), row, "home" if self._homes[block].is_writable else "mapped")
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
                    held = HandedOut(alias_of(value), row, "home" if home.is_writable else "mapped")
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
        lent: list[tuple[HandedOut, Streamed]] = []
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
                data.data = alias_of(held.tensor)
                self._share(streamed, held)
