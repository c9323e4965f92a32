"""What tests look at inside a handle, by name: where memplan renames it, this file alone follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from memplan import Handle
from memplan.run.memory.arena import Arena
from memplan.run.schedule.conductor import Conductor
from memplan.run.schedule.loader import Loader
from memplan.run.schedule.streamed import IN_SLOT, Streamed
from memplan.run.tiers import Tiers
from memplan.run.transfer.worker import Job
from memplan.run.verify.race_check import _ClockedTicket


def tiers(handle: Handle) -> Tiers:
    assert handle._runtime is not None
    return handle._runtime.tiers


def bytes_read_from_disk(handle: Handle) -> int:
    """By this process itself, for the homes of blocks and for loads."""
    return tiers(handle).reader.read_bytes


def device_arena(handle: Handle) -> Arena:
    return tiers(handle).arena


def host_arenas(handle: Handle) -> dict[int, Arena]:
    """By the plan's number."""
    return tiers(handle).host


def arenas(handle: Handle) -> list[Arena]:
    """The device's, then the host's."""
    return [device_arena(handle), *host_arenas(handle).values()]


def on_host(handle: Handle) -> list[torch.Tensor]:
    """What lies in RAM for the plan."""
    return [*tiers(handle).on_host()]


def activation_rooms(handle: Handle) -> dict[str, torch.Tensor]:
    """Where offloaded activations wait in RAM, by module."""
    return tiers(handle).rooms


def optimizer_rooms(handle: Handle) -> list[torch.Tensor]:
    """Where the optimizer's state waits in RAM."""
    state = tiers(handle).optimizer_state
    assert state is not None
    return [*state.rooms()]


def streamed(handle: Handle) -> list[Streamed]:
    return [*tiers(handle).streamed.values()]


def away(handle: Handle) -> list[Streamed]:
    """The streamed blocks that are not in their slots."""
    return [one for one in streamed(handle) if one.state not in IN_SLOT]


def counted_bytes(handle: Handle) -> int:
    """Live device bytes, as ``watch_memory`` counts them."""
    assert handle._ledger is not None
    return handle._ledger.live_bytes


def take_less(handle: Handle) -> None:
    """Go on under a plan for less vram, as where memory has run out."""
    handle._take_less("the test")


def conductor(handle: Handle) -> Conductor:
    assert handle._runtime is not None
    return handle._runtime.conductor


def index_of_access(handle: Handle) -> int:
    """Which access of the plan is under way."""
    position = conductor(handle)._position
    return position.now % position.sequence.length


def quiesce(handle: Handle) -> None:
    """Have every streamed block away."""
    loader(handle).quiesce()


def loader(handle: Handle) -> Loader:
    return conductor(handle).loader


@contextmanager
def after_each(handle: Handle, name: str, look: Callable[[], None]) -> Iterator[None]:
    """Look each time that the loader has done something: ``use`` an access's blocks, ``start_loads``."""
    inner = getattr(loader(handle), name)

    def looked(*args: Any, **kwargs: Any) -> None:
        inner(*args, **kwargs)
        look()

    setattr(loader(handle), name, looked)
    try:
        yield
    finally:
        delattr(loader(handle), name)


def never_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have blocks taken for there when they have come, though the compute was not made to wait for them."""

    def wait(self: Loader, streamed: Streamed) -> None:
        assert isinstance(streamed.ticket, _ClockedTicket)
        assert isinstance(streamed.ticket.inner, Job)
        streamed.ticket.inner.result()
        streamed.arrive()

    monkeypatch.setattr(Loader, "_wait", wait)


def never_wait_to_evict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a slot taken for free while a load may still write to it."""
    monkeypatch.setattr(Loader, "_evict", lambda self, streamed: streamed.leave())
