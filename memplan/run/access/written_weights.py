"""What was handed out of streamed weights, and what was written to them: it goes to their homes.

[Note: written weights] Frozen weights are only ever read by training, but scripts write to them between steps (ReLoRA,
an adapter that takes its beginning out of the base), and a few models do in their forward. A write is taken to the
block's home, and what lies in its slot is dropped, so that the next load has it: at once where a call writes to the
weight itself or puts another tensor in its place; when the access is over, where it was under way; and for views and
``data`` that were handed out, before the block is loaded again. What only looks at raw addresses (``data_ptr`` handed
to a kernel of one's own that writes) is not seen. A block that is homed in a file gets a home of its own, within the
budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol
from weakref import ref

import torch

from memplan.analyze.graph import Tensor
from memplan.errors import RunError
from memplan.run.access.away import gone, plain, refuse_home
from memplan.run.access.lent import HandedOut, alias_of, are_equal, checksum
from memplan.run.memory.arena import dtype_of, shaped, strides_of
from memplan.run.memory.disk import written_pages
from memplan.run.memory.home import Home, as_bytes, layout_of
from memplan.run.schedule.streamed import Streamed
from memplan.run.transfer.device import synchronize

if TYPE_CHECKING:
    from memplan.run.transfer.lock import Lock


class BlockLoader(Protocol):
    """What brings blocks and has them dropped, as far as direct access knows it."""

    lock: Lock

    def open_in_backward(self, streamed: Streamed, *, for_good: bool) -> bool: ...

    def drop(self, block: int) -> None: ...


class WrittenWeights:
    """True values of one model's streamed weights, who holds them, and what becomes of writes to them."""

    def __init__(
        self,
        device: torch.device,
        homes: dict[int, Home],
        streamed: dict[int, Streamed],
        own_home: Callable[..., None],
        lent: dict[int, list[HandedOut]],
    ) -> None:
        """As for :class:`memplan.run.access.direct_access.DirectAccess`."""
        self.count = 0
        """Weights that were written to."""
        self._device = device
        self._homes = homes
        self._streamed = streamed
        self._own_home = own_home
        self._lent = lent
        self._handed_out: dict[int, list[HandedOut]] = {}
        """By block."""
        self._state: tuple[dict[str, Any], int] | None = None
        """The ``state_dict`` that is being made, and its entries so far."""
        self._loader: Callable[[], BlockLoader | None] = lambda: None

    def begin(self, loader: BlockLoader) -> None:
        """Take writes home from now on, those too to what was handed out under the plan before."""
        self._loader = ref(loader)
        for block, lent in self._lent.items():
            if block in self._streamed:
                for one in lent:
                    if one.state == "home":  # of the plan before
                        one.state = "copy"
                    self.share(self._streamed[block], one)
        self._lent.clear()

    def settle_at_end(self) -> None:
        """Take home what was written, within whatever budget: what is given back has memory of its own anyway."""
        self._own_home = partial(self._own_home, bounded=False)
        self.settle()

    def close(self) -> None:
        """Note what is still handed out for a plan that may follow, and hold nothing any more."""
        self._lent.update(self._handed_out)
        # A graph that is still alive must not keep the arenas.
        self._homes, self._streamed, self._handed_out, self._lent = {}, {}, {}, {}
        self._own_home = refuse_home

    def loader(self) -> BlockLoader:
        """Return what brings blocks. Raises RunError after a detach."""
        loader = self._loader()
        if loader is None:
            raise gone()
        return loader

    def true_value(self, block: int, row: Tensor) -> HandedOut:
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
        self.loader().drop(streamed.block)
        held = self._handed_out.setdefault(streamed.block, [])
        same = [one for one in held if one.row is row]
        if replaced:
            held[:] = [one for one in held if one.row is not row]
        if not home.is_writable or (replaced and any(one.state == "home" and one.is_shared() for one in same)):
            self._own_home(streamed.block)
            for one in held:
                if one.state == "home":  # of memory that is not the home any more
                    one.state = "copy"
        synchronize(self._device)  # copies out of the home may be under way
        home.write(row, value)
        streamed.writes += 1
        self.count += 1
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
            self.loader().drop(streamed.block)
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
                if one.tensor.data_ptr() != one.address:  # who holds it has moved it to shared memory
                    one.state = "copy"
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

    def share(self, streamed: Streamed, held: HandedOut) -> None:
        """Note that someone else holds true values of a weight, and may write to them."""
        known = self._handed_out.setdefault(streamed.block, [])
        known[:] = [one for one in known if one is not held and (one.state != "home" or one.is_shared())]
        known.append(held)
        streamed.is_shared_out = True
        if held.state == "home" and streamed.is_recomputed and not held.checksum:
            held.checksum = checksum(held.tensor)
        self.loader().drop(streamed.block)  # what is in the slot would not be what is written

    def settle_before(self, state: dict[str, Any]) -> None:
        """Take home what was written, once for each ``state_dict`` that is being made: ``state``, which grows by each
        module.
        """
        if self._state is None or self._state[0] is not state or len(state) <= self._state[1]:
            self.settle()
            synchronize(self._device)  # who is given a home's bytes may write to them at once
        self._state = (state, len(state))  # held, lest another be taken for it

    def writes_to(self, streamed: Streamed) -> int:
        """Return how often a block was written to so far. Raises RunError where what was written cannot be kept."""
        if streamed.is_shared_out:
            with self.loader().lock:
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
            self.share(
                streamed, HandedOut(alias_of(value), row, "home" if self._homes[block].is_writable else "mapped")
            )

    def keep_taken(self, streamed: Streamed) -> None:
        """Have what hooks took hold of in an access, and still hold, be the weights' true values from now on."""
        taken, streamed.taken = streamed.taken, []
        for place, reference in taken:
            data = reference()
            if data is not None and data.data_ptr() == streamed.pointers[place][1].data_ptr():
                held = self.true_value(streamed.block, streamed.rows[place])
                data.data = alias_of(held.tensor)
                self.share(streamed, held)
