"""Streamed weights that are read or written where no trigger announces it: by a loss, a callback, an adapter's own
layer.

[Note: direct access] A weight that is not open (see :mod:`memplan.run.schedule.streamed`) has a class of the same name
as its own, whose ``__torch_function__`` torch calls in place of any operator, method or property that it is given to.
That call is given a stand-in with the weight's true values: on the CPU the very bytes of its home in RAM, else a copy
of them on the compute device. What the call returns, and what autograd saves of it, refers to those and not to a slot
that another block will lie in. So reads are right without being foreseen; they are counted, and cost a transfer each.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import nn

from memplan.analyze.graph import Tensor
from memplan.errors import RunError
from memplan.model.weights import is_quantizer_state, is_wrapper, kind_of, rewrapped, wrapped_parts
from memplan.run.access.away import (
    SERVERS,
    away_in,
    kinds_of,
    module_that_calls,
    plain,
    serve_call,
    serve_operator,
    serve_others,
    swap,
)
from memplan.run.access.dispatched import passes_by_no_more, serve_with, unasked
from memplan.run.access.lent import HandedOut, Lent, StandIn, alias_of
from memplan.run.access.torch_functions import replace_functions, restore_functions
from memplan.run.access.written_weights import BlockLoader, WrittenWeights
from memplan.run.memory.arena import shaped
from memplan.run.memory.disk import written_pages
from memplan.run.memory.home import Home, layout_of
from memplan.run.schedule.streamed import OPEN, Streamed, trained_by_now
from memplan.run.transfer.transfer import HostSource

if TYPE_CHECKING:
    from memplan.run.transfer.lock import Lock

_LOG = logging.getLogger("memplan")


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
        self.written = WrittenWeights(device, homes, streamed, own_home, lent)
        self._homes = homes
        self._streamed = streamed
        self._places: dict[int, tuple[Streamed, int]] = {}
        """Of each tensor by its id: its block, and its place in that block's ``pointers``."""
        self._wrapped: dict[int, tuple[torch.Tensor, ...]] = {}
        """What tensors that are made of others are made of, by id."""
        self._shown: dict[int, tuple[HandedOut, int]] = {}
        """By the id of each weight that shows its true values: those, and its version when it began to."""
        self._within: Mapping[int, frozenset[int]] = {}

    # ---- beginning and end -----------------------------------------------------------------------------------------

    def begin(
        self, model: nn.Module, loader: BlockLoader, plain: frozenset[int], within: Mapping[int, frozenset[int]]
    ) -> None:
        """Serve from now on. ``plain``: ids of tensors that torch.compile has seen, whose class must not change in use.
        ``within``: by block, ids of the modules in whose accesses it is read.
        """
        self._within = within
        replace_functions(self, away_in, serve_call, swap)
        serve_with(serve_operator, serve_others)
        for module in model.modules():  # memplan's own come later
            if (
                module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
            ):
                self.hooks_came(module)
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
        self.written.begin(loader)

    def close(self) -> None:
        """Take what was written home, and have the weights be as any others."""
        try:
            self.written.settle_at_end()
        finally:
            restore_functions(self)
            passes_by_no_more()
            for streamed in self._streamed.values():
                for kinds in streamed.kinds:
                    SERVERS.pop(kinds.tensor, None)
                streamed.serve(())
                streamed.announce(None)
            self.written.close()
            # A graph that is still alive must not keep the arenas.
            self._homes, self._streamed, self._places, self._wrapped = {}, {}, {}, {}

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
        return self.written.loader().open_in_backward(streamed, for_good=not keeps_graph)

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
        with self.written.loader().lock:
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
        with self.written.loader().lock:
            failure: RunError | None = None
            for lent in stand_in.let_go():
                streamed = lent.streamed
                if lent.held.is_shared():
                    self.written.share(streamed, lent.held)
                try:
                    if lent.is_written and not lent.is_replaced:
                        # A graph that has saved the weight must know, as it would of the weight itself.
                        torch.autograd.graph.increment_version(streamed.pointers[lent.place][0])
                    if lent.is_replaced or lent.is_written:
                        self.written.write(streamed, lent.held.row, lent.value, replaced=lent.is_replaced)
                except RunError as error:
                    failure = failure or error
            if failure is not None:
                raise failure

    def locked(self) -> Lock:
        """Return the lock under which weights come and go. Raises RunError after a detach."""
        return self.written.loader().lock

    def _lend(self, tensor: torch.Tensor) -> Lent:
        streamed, place = self._places[id(tensor)]
        with torch._C.DisableTorchFunctionSubclass():
            if tensor.requires_grad:
                raise trained_by_now(streamed.name)
        row = streamed.rows[place]
        held = self.written.true_value(streamed.block, row)
        self._count(row)
        return Lent(streamed, place, held, alias_of(held.tensor))

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

    def show_all(self) -> None:
        """Have every streamed weight be its true values, and nothing served, until ``hide_all``. Nothing may be on its
        way.
        """
        with self.written.loader().lock:
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

    def refuse_move(self, storage: torch.UntypedStorage) -> None:
        """Raise RunError where a storage that is to move to shared memory is what weights are brought to or from."""
        if storage.is_shared():
            return
        parts = {key: home.source.part for key, home in self._homes.items() if isinstance(home.source, HostSource)}
        slots = [streamed.part for streamed in self._streamed.values()]
        moves = any(part.untyped_storage()._cdata == storage._cdata for part in (*parts.values(), *slots))
        # An entry of a state_dict has a storage of its own on the same bytes. Of what is streamed it is watched, of the
        # rest what is written to it after it has moved would be lost. An error in the thread of a queue is heard by
        # nobody, and who waits for what was put there would wait for good.
        if not moves and threading.current_thread().name != "QueueFeederThread":
            at = storage.data_ptr()
            stays = [part for key, part in parts.items() if key not in self._streamed]
            moves = any(part.data_ptr() <= at < part.data_ptr() + part.nbytes for part in stays)
        if moves:
            raise RunError(
                "a frozen weight was to move to shared memory (share_memory_(), a queue or a process of "
                "torch.multiprocessing), but memplan brings weights to where it is: share a copy of it (clone()), "
                "or do so before plan()"
            )

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
        with self.written.loader().lock:
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
                    self.written.write(streamed, row, value, replaced=replaced)
                except RunError as error:
                    failure = failure or error
            written.clear()
            del value, tensor
            for held, streamed in lent:
                if held.is_shared():
                    self.written.share(streamed, held)
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
            if streamed.state is OPEN:
                streamed.taken.append((place, ref(data)))
                if not is_versioned:
                    streamed.values.setdefault(place, data.clone())
