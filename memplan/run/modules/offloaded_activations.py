"""Saved activations that the plan offloads: set aside in their slot, stored over the link's way back, brought again.

A slot's owner is a *call*: one forward whose activations autograd still holds. It lives exactly as long as anything may
ask for them, so a second forward before the backward finds its place taken, and keeps what it saves on the device:
right, and counted. What is asked for and is not in its slot is brought on demand; the plan's loads only make that rare.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import nn

from memplan.errors import RunError
from memplan.hooks.offload import Layout, copy_of
from memplan.model.weights import plain_parts, small_tensors
from memplan.program.page_lock import pageable_items
from memplan.program.schema import Address, Plan
from memplan.run.memory.arena import Arena
from memplan.run.schedule.sequence import offload_key
from memplan.run.transfer.device import is_apart
from memplan.run.transfer.transfer import HostSource, Ticket, Transfers
from memplan.run.verify.race_check import ClockedTransfers
from memplan.units import align_up


class SavedState(Enum):
    """Where the bytes are that a call has saved, and who may write to the slot and to the room on the host."""

    NOWHERE = auto()
    """There are none. Slot and room are free."""
    FILLING = auto()
    """In the slot alone, to which the call's forward still writes."""
    IN_SLOT = auto()
    """In the slot alone. Nobody writes."""
    STORING = auto()
    """In the slot, and a transfer writes them to the room. Nobody writes to the slot, nor reads the room."""
    ON_HOST = auto()
    """In the room alone. The slot is free."""
    LOADING = auto()
    """In the room, and a transfer writes them to the slot. Nobody reads the slot, nor writes to the room."""
    IN_BOTH = auto()
    """In both. Nobody writes; the slot may be had without a store."""


@dataclass(slots=True, kw_only=True)
class Offloaded:
    """One module's saved activations: their addresses, and where they are."""

    key: int
    """Its name to the transfers on its way to the device; ``key + 1`` on its way to the host."""
    module: str
    part: torch.Tensor
    """Its byte range of the device arena: its one address."""
    size_bytes: int
    host: torch.Tensor | None
    """Its byte range of the host arena; None where the plan leaves it in its slot."""
    outside: frozenset[int]
    """Addresses of the storages of weights, adapters and buffers that the module may save."""
    overlapping: tuple[int, ...] = ()
    """Keys of what lies on the same bytes."""
    owner: weakref.ref[_Call] | None = None
    """The call. What is left of one that is gone is nobody's."""
    state: SavedState = SavedState.NOWHERE
    ticket: Ticket | None = None
    """Of the transfer that is under way, while they are storing or loading."""
    stored: int = 0
    offload_skipped: int = 0
    """Forwards whose activations stayed on the device: their place was taken, or too small for all of them."""

    def is_owned(self) -> bool:
        return self.owner is not None and self.owner() is not None


def offloaded_activations(
    plan: Plan,
    modules: Mapping[str, nn.Module],
    arena: Arena,
    host: Mapping[int, Arena],
    rooms: dict[str, torch.Tensor],
) -> dict[int, Offloaded]:
    """Return what the plan offloads, by key. ``modules``: its trigger modules by name. ``host``: the plan's host
    arenas; where one is missing each has memory of its own there. ``rooms``: what they had there before, by module;
    what they have is put there.
    """
    tiers, slow = {arena.id: arena.tier for arena in plan.arenas}, pageable_items(plan)
    found: dict[int, Offloaded] = {}
    for item in plan.items:
        if item.kind != "saved":
            continue
        places = {tiers[a.arena]: a for a in plan.addresses if a.item == item.id}
        module, away = modules[item.module], places.get("host")
        small = (tensor for inner in module.modules() for tensor in small_tensors(inner))
        still = (*module.parameters(), *module.buffers(), *small)
        key = offload_key(plan, item.id)
        found[key] = Offloaded(
            key=key,
            module=item.module,
            part=arena.part(places["device"].offset_bytes, item.size_bytes),
            size_bytes=item.size_bytes,
            host=None if away is None else _room(away, item.module, arena, host, rooms, item.id in slow),
            outside=frozenset(part.untyped_storage().data_ptr() for held in still for part in plain_parts(held)),
        )
    return found


def _room(
    away: Address,
    module: str,
    arena: Arena,
    host: Mapping[int, Arena],
    rooms: dict[str, torch.Tensor],
    is_pageable: bool,
) -> torch.Tensor:
    """Return a module's bytes on the host."""
    if module not in rooms:
        if away.arena in host:
            rooms[module] = host[away.arena].part(away.offset_bytes, away.size_bytes)
        else:
            pinned = is_apart(arena.bytes.device) and not is_pageable
            rooms[module] = Arena(away.size_bytes, torch.device("cpu"), pinned=pinned).bytes
    return rooms[module]


class _Call:
    """A :class:`memplan.hooks.offload.Call`: a forward that owns its module's slot."""

    def __init__(self, offloads: Offloads, held: Offloaded) -> None:
        self._offloads = offloads
        self._held = held
        self._used = 0
        self._crowded = False

    def is_outside(self, tensor: torch.Tensor) -> bool:
        return self._offloads.is_outside(self._held, tensor.untyped_storage().data_ptr())

    def take(self, tensor: torch.Tensor) -> int | None:
        storage = tensor.untyped_storage()
        size_bytes, part = storage.nbytes(), self._held.part
        if tensor.device != part.device or self._used + size_bytes > part.numel():
            self._crowded = True
            return None
        offset = self._used
        self._used += align_up(size_bytes)
        with torch.no_grad():
            raw = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (size_bytes,), (1,))
            part[offset : offset + size_bytes].copy_(raw)
        return offset

    def give(self, offset_bytes: int, like: Layout) -> torch.Tensor:
        self._offloads.bring(self, self._held)
        with torch.inference_mode(False), torch.no_grad():
            return copy_of(self._held.part[offset_bytes:], like)

    def ended(self) -> None:
        self._held.offload_skipped += self._crowded
        self._offloads.ended(self, self._held)


def _nothing(key: int) -> None:
    pass


class Offloads:
    """All offloaded activations of a plan. Every method takes the conductor's lock."""

    def __init__(
        self,
        held: dict[int, Offloaded],
        transfers: Transfers,
        lock: AbstractContextManager[object],
        evict: Callable[[int], None],
        arena: Arena,
    ) -> None:
        """``evict``: clears the bytes of what has that key. ``arena``: the device's."""
        self.by_key = held
        self._transfers = transfers
        self._clocks = transfers if isinstance(transfers, ClockedTransfers) else None
        self._lock = lock
        self._evict = evict
        self._weights = arena.addresses
        self._closed = False

    def is_outside(self, held: Offloaded, address: int) -> bool:
        """Whether a storage holds weights: those of a streamed block would be another's by the backward."""
        return self._weights.holds(address) or address in held.outside

    def beginning(self, key: int) -> Callable[[], _Call | None]:
        """Return what begins a forward of a module."""
        return lambda: self._begin(self.by_key[key])

    def _begin(self, held: Offloaded) -> _Call | None:
        with self._lock:
            if self._closed:
                return None
            if held.is_owned():
                held.offload_skipped += 1
                return None
            self._clear(held)
            for rival in held.overlapping:
                self._evict(rival)
            if self._clocks is not None:
                self._clocks.write(held.key, held.part, f"what {held.module} saves")
            call = _Call(self, held)
            held.owner, held.state = weakref.ref(call), SavedState.FILLING
            return call

    def ended(self, call: _Call, held: Offloaded) -> None:
        """A forward is over: what it saved goes to the host if the plan says so."""
        with self._lock:
            if not self._closed and held.owner is not None and held.owner() is call:
                held.state = SavedState.IN_SLOT
                if held.host is not None:
                    self._store(held)

    def _store(self, held: Offloaded) -> None:
        if held.host is None:  # the plan leaves it in its slot, and something off the sequence wants that
            with torch.inference_mode(False):
                held.host = torch.empty(held.part.numel(), dtype=torch.uint8)
        held.ticket = self._transfers.load("d2h", held.key + 1, HostSource(held.part), held.host)
        held.state = SavedState.STORING
        held.stored += 1

    def _clear(self, held: Offloaded) -> None:
        """Have the slot free for anybody: what it holds is on the host, or nobody's."""
        if held.state is SavedState.IN_SLOT and held.is_owned():
            self._store(held)
        on_host = held.state in (SavedState.ON_HOST, SavedState.IN_BOTH) or held.ticket is not None
        self._wait(held)
        held.state = SavedState.ON_HOST if on_host else SavedState.NOWHERE

    def _wait(self, held: Offloaded) -> None:
        """Make the compute wait for the transfer that is under way, where one is."""
        if held.ticket is not None:
            ticket, held.ticket = held.ticket, None
            self._transfers.wait(ticket, held.key + 1 if held.state is SavedState.STORING else held.key)

    def clear(self, key: int) -> None:
        """Have the slot free: see ``_clear``. Raises RunError where a forward is writing to it."""
        held = self.by_key[key]
        if held.state is SavedState.FILLING and held.is_owned():  # else it was interrupted as it began
            raise RunError(
                f"what {held.module} saves is to be offloaded while its forward still writes to it: "
                "the model calls that block within another one's forward; do not offload its activations"
            )
        self._clear(held)

    def is_due(self, key: int) -> bool:
        """Whether a planned load has anything to bring."""
        held = self.by_key[key]
        return held.state is SavedState.ON_HOST and held.is_owned()

    def load(self, key: int) -> None:
        """Start bringing what is on the host back into its slot, whose bytes are evicted first."""
        held = self.by_key[key]
        for rival in held.overlapping:
            self._evict(rival)
        assert held.host is not None
        assert held.state is SavedState.ON_HOST
        held.ticket = self._transfers.load("h2d", held.key, HostSource(held.host), held.part)
        held.state = SavedState.LOADING

    def bring(self, call: _Call, held: Offloaded) -> None:
        """Have the compute wait until a call's bytes are in their slot. Raises RunError after detach()."""
        with self._lock:
            if self._closed or held.owner is None or held.owner() is not call:
                raise RunError(
                    f"a backward wants what {held.module} saved, but memplan was detached or interrupted since its "
                    "forward: run the forward again"
                )
            assert held.state is not SavedState.NOWHERE
            if held.state is SavedState.ON_HOST:
                self.load(held.key)
            if held.state is SavedState.LOADING:
                self._wait(held)
                held.state = SavedState.IN_BOTH
            if self._clocks is not None:
                self._clocks.read(held.key, "asked for in backward")

    @property
    def stored_bytes(self) -> int:
        return sum(held.stored * held.size_bytes for held in self.by_key.values())

    @property
    def offload_skipped(self) -> int:
        return sum(held.offload_skipped for held in self.by_key.values())

    def forget(self) -> None:
        """Take all as empty: an error or a Ctrl-C came in the middle of something, and nothing is on its way any
        more.
        """
        for held in self.by_key.values():
            held.owner = held.ticket = None
            held.state = SavedState.NOWHERE

    def close(self) -> None:
        """Bring and take nothing any more; what is on its way is waited for."""
        self._closed = True
        for held in self.by_key.values():
            self._wait(held)
            held.state = SavedState.NOWHERE
            held.part = held.part.new_empty(0)  # a graph that is still alive must not keep the arenas
            held.host = None
        self._evict = _nothing  # it belongs to who owns this: no circle is left
