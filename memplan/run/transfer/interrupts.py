"""Ctrl-C comes when nothing is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType, TracebackType


@contextmanager
def defer_sigint() -> Iterator[None]:
    """Let a Ctrl-C wait until what is inside is done. A second one does not wait."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    pressed: list[FrameType | None] = []

    def wait(number: int, frame: FrameType | None) -> None:
        if pressed:
            handler(number, frame)
        pressed.append(frame)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pressed:
            handler(signal.SIGINT, pressed[0])


class Undo(ExitStack):
    """An ExitStack that is unwound to its end, whatever is pressed."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> bool:
        with defer_sigint():
            return bool(super().__exit__(kind, error, trace))
