"""When each access and each load of a pass took place: the traced mode.

Marks are taken where the triggers are told and where channels do their work. On the CPU a mark is the clock;
elsewhere an event in the stream that does the work, so nothing waits for it and its time is known later (unproven: no
GPU has run it). Each access is a range in torch's profiler too, named after what it reads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.autograd.profiler import record_function

from memplan.hooks.triggers import Watcher
from memplan.program.record import Lane, Span
from memplan.program.schema import Channel
from memplan.run.transfer.device import current_stream, is_apart, synchronize

Mark = float | torch.Event


class _Timed(NamedTuple):
    lane: Lane
    name: str
    begins: Mark
    ends: Mark


class Spans:
    """What took place in the pass that is under way, and in the last whole one."""

    def __init__(self, device: torch.device, names: dict[int, str]) -> None:
        """``names``: what is moved, by what the transfers call it."""
        self._device = device
        self._names = names
        self._lock = threading.Lock()
        self._now: list[_Timed] = []
        self._last: list[_Timed] = []

    def mark(self, stream: torch.Stream | None = None) -> Mark:
        """Return the present moment; elsewhere that of ``stream``, or else of the compute."""
        if not is_apart(self._device):
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record(stream or current_stream(self._device))
        return event

    def add(self, lane: Lane, what: str | int, begins: Mark, ends: Mark) -> None:
        """Note that something took place. ``what``: its name, or what the transfers call it."""
        name = what if isinstance(what, str) else self._names.get(what, str(what))
        with self._lock:
            self._now.append(_Timed(lane, name, begins, ends))

    @contextmanager
    def of(self, channel: Channel, what: int, stream: torch.Stream | None = None) -> Iterator[None]:
        """Note a load that is done inside."""
        begins = self.mark(stream)
        yield
        self.add(channel, what, begins, self.mark(stream))

    def drop(self) -> None:
        """What is under way is no pass."""
        with self._lock:
            self._now = []

    def turn(self) -> None:
        """A pass is over."""
        with self._lock:
            self._last, self._now = self._now, []

    def last(self) -> tuple[Span, ...]:
        """Return the last whole pass, in seconds from the first moment that is known of it."""
        with self._lock:
            timed = list(self._last)
        if not timed:
            return ()
        synchronize(self._device)
        base = timed[0].begins
        rows = [(row, _seconds(base, row.begins), _seconds(base, row.ends)) for row in timed]
        first_s = min(begins for _, begins, _ in rows)
        spans = [
            Span(lane=row.lane, name=row.name, start_s=begins - first_s, end_s=ends - first_s)
            for row, begins, ends in rows
        ]
        return tuple(sorted(spans, key=lambda span: (span.start_s, span.lane, span.name)))


def _seconds(base: Mark, mark: Mark) -> float:
    if isinstance(base, torch.Event):
        assert isinstance(mark, torch.Event)
        return float(base.elapsed_time(mark)) / 1e3
    assert not isinstance(mark, torch.Event)
    return mark - base


class TracedWatcher:
    """A :class:`memplan.hooks.triggers.Watcher` around another one, which notes when each access waited and computed.

    An access ends where the next one begins, or with its forward.
    """

    def __init__(self, inner: Watcher, spans: Spans) -> None:
        self._inner = inner
        self._spans = spans
        self._open: tuple[str, Mark, record_function] | None = None
        self._came_back = False
        """Whether a backward was seen in this pass."""
        self._forwards: set[str] = set()
        """Modules whose forward was seen in it."""

    def forward_begins(self, module: str, *, in_backward: bool) -> int:
        if not in_backward:
            if self._came_back:
                self._end()
                self._spans.turn()
                self._came_back = False
                self._forwards.clear()
            elif module in self._forwards:  # a forward without a backward, as in an evaluation: that was no pass
                self._end()
                self._spans.drop()
                self._forwards.clear()
            self._forwards.add(module)
        with self._access("recompute" if in_backward else "forward", module):
            return self._inner.forward_begins(module, in_backward=in_backward)

    def forward_ends(self, module: str, call: int, *, in_backward: bool) -> None:
        if not in_backward:
            self._end()
        self._inner.forward_ends(module, call, in_backward=in_backward)

    def forward_failed(self) -> None:
        self._inner.forward_failed()

    def backward_begins(self, module: str, call: int) -> None:
        self._came_back = True
        with self._access("backward", module):
            self._inner.backward_begins(module, call)

    def backward_ends(self) -> None:
        self._end()
        self._inner.backward_ends()

    def lane(self) -> tuple[set[str], bool]:
        """End the access under way, of a micro-batch that lets others go on; return what is its own."""
        self._end()
        return self._forwards, self._came_back

    def be_lane(self, lane: tuple[set[str], bool] | None) -> None:
        """Go on with another micro-batch; None: with one that has not begun."""
        self._forwards, self._came_back = (set(), False) if lane is None else lane

    @contextmanager
    def _access(self, kind: str, module: str) -> Iterator[None]:
        """Begin an access once what it reads, which is waited for inside, is there."""
        self._end()
        before = self._spans.mark()
        yield
        after = self._spans.mark()
        self._spans.add("wait", module, before, after)
        within = record_function(f"memplan: {kind} {module}")
        within.__enter__()
        self._open = (f"{kind} {module}", after, within)

    def _end(self) -> None:
        if self._open is not None:
            name, begins, within = self._open
            self._open = None
            within.__exit__(None, None, None)
            self._spans.add("compute", name, begins, self._spans.mark())
