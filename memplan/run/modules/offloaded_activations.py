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

import torch
from torch import nn

from memplan.errors import RunError
from memplan.hooks.offload import Layout, copy_of
from memplan.model.weights import plain_parts, small_tensors
from memplan.program.page_lock import pageable_items
from memplan.program.schema import Address, Plan
from memplan.run.memory.arena import Arena
from memplan.run.schedule.sequence import offload_key
from memplan.run.transfer.transfer import HostSource, Ticket, Transfers
from memplan.run.verify.race_check import ClockedTransfers
from memplan.units import align_up


@dataclass(slots=True, kw_only=True)
class Offloaded:
    """One module's saved activations: where they lie and where they are."""

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
    in_slot: bool = False
    """The owner's bytes are in the slot, as far as the compute goes."""
    store: Ticket | None = None
    """They are on their way to the host."""
    on_host: bool = False
    """They are there."""
    load: Ticket | None = None
    """They are on their way back."""
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
            pinned = arena.bytes.device.type == "cuda" and not is_pageable
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
        self._offloads.ended(self._held)


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
        self._making: set[int] = set()
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
            held.owner, held.in_slot, held.on_host = weakref.ref(call), True, False
            self._making.add(held.key)
            return call

    def ended(self, held: Offloaded) -> None:
        """A forward is over: what it saved goes to the host if the plan says so."""
        with self._lock:
            self._making.discard(held.key)
            if not self._closed and held.host is not None and held.is_owned():
                self._store(held)

    def _store(self, held: Offloaded) -> None:
        if held.host is None:  # the plan leaves it in its slot, and something off the sequence wants that
            with torch.inference_mode(False):
                held.host = torch.empty(held.part.numel(), dtype=torch.uint8)
        held.store = self._transfers.load("d2h", held.key + 1, HostSource(held.part), held.host)
        held.stored += 1

    def _clear(self, held: Offloaded) -> None:
        """Have the slot free for anybody: what it holds is on the host, or nobody's."""
        if held.load is not None:
            ticket, held.load = held.load, None
            self._transfers.wait(ticket, held.key)
        if held.is_owned() and held.in_slot and held.store is None and not held.on_host:
            self._store(held)
        self._wait_for_store(held)
        held.in_slot = False

    def _wait_for_store(self, held: Offloaded) -> None:
        """Have the compute wait until what was sent to the host is there."""
        if held.store is not None:
            ticket, held.store = held.store, None
            self._transfers.wait(ticket, held.key + 1)
            held.on_host = True

    def clear(self, key: int) -> None:
        """Have the slot free: see ``_clear``. Raises RunError where a forward is writing to it."""
        if key in self._making and self.by_key[key].is_owned():  # else it was interrupted as it began
            raise RunError(
                f"the slot of what {self.by_key[key].module} saves is wanted while its forward still writes to it: "
                "the model calls that block within another one's forward; do not offload its activations"
            )
        self._clear(self.by_key[key])

    def is_due(self, key: int) -> bool:
        """Whether a planned load has anything to bring."""
        held = self.by_key[key]
        return held.is_owned() and not held.in_slot and held.load is None

    def load(self, key: int) -> None:
        """Start bringing what is on the host back into its slot, whose bytes are evicted first."""
        held = self.by_key[key]
        for rival in held.overlapping:
            self._evict(rival)
        self._wait_for_store(held)
        assert held.host is not None
        assert held.on_host
        held.load = self._transfers.load("h2d", held.key, HostSource(held.host), held.part)

    def bring(self, call: _Call, held: Offloaded) -> None:
        """Have the compute wait until a call's bytes are in their slot. Raises RunError after detach()."""
        with self._lock:
            if self._closed or held.owner is None or held.owner() is not call:
                raise RunError(
                    f"a backward wants what {held.module} saved, but memplan was detached or interrupted since its "
                    "forward: run the forward again"
                )
            if not held.in_slot:
                if held.load is None:
                    self.load(held.key)
                assert held.load is not None
                ticket, held.load = held.load, None
                self._transfers.wait(ticket, held.key)
                held.in_slot = True
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
        self._making.clear()
        for held in self.by_key.values():
            held.owner = held.store = held.load = None
            held.in_slot = held.on_host = False

    def close(self) -> None:
        """Bring and take nothing any more; what is on its way is waited for."""
        self._closed = True
        for held in self.by_key.values():
            for ticket, key in ((held.load, held.key), (held.store, held.key + 1)):
                if ticket is not None:
                    self._transfers.wait(ticket, key)
            held.load = held.store = None
            held.part = held.part.new_empty(0)  # a graph that is still alive must not keep the arenas
            held.host = None
        self._evict = _nothing  # it belongs to who owns this: no circle is left
