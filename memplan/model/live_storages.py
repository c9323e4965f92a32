"""StorageLedger: which tensors' storages are alive, how many bytes they hold, and from when to when.

It sees every operator that runs under it and keeps a weak reference to each storage that one returns, so it costs a
few microseconds an operator and holds nothing alive. Fake tensors count as what they stand for.

[Note: storages, not tensors] Views share a storage and in-place operators return one that is known: each counts once.
torch keeps a storage's Python object as long as the storage itself lives, whoever holds it (autograd's saved tensors
too), so the weak reference's callback comes when the memory is given back, and the storage's address names it till
then.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from memplan.model.weights import is_wrapper_type, plain_parts, small_tensors


class Held:
    """One storage that is alive."""

    __slots__ = ("born", "number", "reference", "size_bytes")

    def __init__(self, born: int, size_bytes: int) -> None:
        self.born = born
        """Segment in which it was first seen."""
        self.number = 0
        """Of its birth, counted from 1."""
        self.size_bytes = size_bytes
        self.reference: weakref.ref[torch.UntypedStorage] | None = None


class StorageLedger(TorchDispatchMode):
    """Live bytes of all storages that operators return while it is entered.

    ``ignore``: tensors whose storages never count (weights that are counted elsewhere). Kernels' own workspaces and
    what an operator allocates and frees within itself are not seen. Deaths are still noted after it was left.
    """

    def __init__(self, ignore: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self.segment_peaks: dict[int, int] = {0: 0}
        """Greatest live bytes in each segment; a segment begins with what is alive then."""
        self.spans: dict[tuple[int, int], int] = {}
        """Bytes of the dead by the segments of birth and death."""
        self.events: list[tuple[int, int, int]] | None = None
        """Where there is a list, births and deaths in their order: the segment, the storage's number and its bytes,
        less than none where it dies.
        """
        self._births = 0
        self._segment = 0
        self._segment_peak = 0
        self._looks_away = False
        self._held: dict[int, Held] = {}
        self._ignored: dict[int, torch.UntypedStorage] = {}  # kept, lest their addresses be used again
        for tensor in ignore:
            self.ignore(tensor)

    @classmethod
    def of_training(
        cls,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *more: torch.Tensor,
        ignore: Iterable[torch.Tensor] = (),
    ) -> StorageLedger:
        """Return a ledger that counts what training holds already: weights, buffers, gradients, optimizer state."""
        ledger = cls(ignore)
        held: list[object] = [*more, *model.parameters(), *model.buffers()]
        held += [tensor for module in model.modules() for tensor in small_tensors(module)]
        held += [parameter.grad for parameter in model.parameters()]
        if optimizer is not None:
            held += [value for state in optimizer.state.values() for value in state.values()]
        for tensor in held:
            if isinstance(tensor, torch.Tensor):
                ledger.add(tensor)
        return ledger

    # ---- what is told ----------------------------------------------------------------------------------------------

    def ignore(self, tensor: torch.Tensor) -> None:
        """Never count the tensor's storage. It is kept alive as long as the ledger."""
        for part in plain_parts(tensor):
            storage = _storage_of(part)
            self._ignored[storage._cdata] = storage

    def is_ignored(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's storage never counts."""
        return _storage_of(tensor)._cdata in self._ignored

    def regard(self, tensor: torch.Tensor) -> None:
        """Let go of a tensor that was ignored."""
        for part in plain_parts(tensor):
            self._ignored.pop(_storage_of(part)._cdata, None)

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor that was there before."""
        for part in plain_parts(tensor):
            self._note(part)

    def touch(self, size_bytes: int) -> None:
        """Count bytes that were alive for a moment, beside all that are alive now."""
        if size_bytes:
            self._grow(size_bytes)
            self.live_bytes -= size_bytes
            number = self._is_born(size_bytes)
            self._died(number, size_bytes)

    def hold(self, size_bytes: int) -> None:
        """Count bytes that are no storage of their own from now on; less than none where they go."""
        self._grow(size_bytes)

    @contextmanager
    def looking_away(self) -> Iterator[None]:
        """Count nothing that comes inside; what goes there is noted as ever."""
        self._looks_away = True
        try:
            yield
        finally:
            self._looks_away = False

    def begin_segment(self, segment: int) -> None:
        """Count births, deaths and the peak toward ``segment`` from now on."""
        self._segment_ends()
        self._segment = segment
        self._segment_peak = self.live_bytes

    @property
    def segment(self) -> int:
        return self._segment

    # ---- what is asked ---------------------------------------------------------------------------------------------

    def held(self, tensor: torch.Tensor) -> Held | None:
        """Return the entry of the tensor's storage, or None where it is not counted."""
        return self._held.get(_storage_of(tensor)._cdata)

    def alive(self) -> Iterator[Held]:
        """Yield the entries of all storages that are alive."""
        yield from list(self._held.values())

    def finish(self) -> None:
        """Bring ``segment_peaks`` up to date."""
        self._segment_ends()

    # ---- what is seen ----------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if opens(types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        if not self._looks_away:
            self.note_all(result)
        return result

    def note_all(self, result: object) -> None:
        """Count what an operator returned."""
        if isinstance(result, torch.Tensor):
            for part in plain_parts(result):
                self._note(part)
        elif isinstance(result, (tuple, list)):
            for value in result:
                self.note_all(value)

    def _note(self, tensor: torch.Tensor) -> None:
        storage = storage_of(tensor)
        if storage is None:
            return
        key = storage._cdata
        if key in self._ignored:
            return
        held = self._held.get(key)
        size_bytes = storage.nbytes()
        if held is None:
            held = Held(self._segment, size_bytes)
            held.reference = weakref.ref(storage, self._death_of(key))
            self._held[key] = held
            held.number = self._is_born(size_bytes)
            self._grow(size_bytes)
        elif held.size_bytes != size_bytes:  # resized in place
            self._grow(size_bytes - held.size_bytes)
            held.size_bytes = size_bytes

    def _grow(self, size_bytes: int) -> None:
        self.live_bytes += size_bytes
        if self.live_bytes > self._segment_peak:
            self._segment_peak = self.live_bytes
            if self.live_bytes > self.peak_bytes:
                self.peak_bytes = self.live_bytes

    def _death_of(self, key: int) -> Callable[[object], None]:
        def died(_: object) -> None:
            held = self._held.pop(key)
            self.live_bytes -= held.size_bytes
            self._died(held.number, held.size_bytes)
            span = (held.born, self._segment)
            self.spans[span] = self.spans.get(span, 0) + held.size_bytes

        return died

    def _is_born(self, size_bytes: int) -> int:
        self._births += 1
        if self.events is not None:
            self.events.append((self._segment, self._births, size_bytes))
        return self._births

    def _died(self, number: int, size_bytes: int) -> None:
        if self.events is not None:
            self.events.append((self._segment, number, -size_bytes))

    def _segment_ends(self) -> None:
        self.segment_peaks[self._segment] = max(self.segment_peaks.get(self._segment, 0), self._segment_peak)


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """Return a tensor's storage, or None: sparse and opaque tensors have none."""
    try:
        return _storage_of(tensor)
    except (NotImplementedError, RuntimeError):
        return None


def _storage_of(tensor: torch.Tensor) -> torch.UntypedStorage:
    with torch._C.DisableTorchFunctionSubclass():  # of a streamed weight: that of what is in its place, unread
        return tensor.untyped_storage()


def opens(types: Any) -> bool:
    """Whether an operator is on tensors that are made of others: their own classes then say what is done with those."""
    return any(is_wrapper_type(kind) for kind in types)
