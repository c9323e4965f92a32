"""One process a contender: asked through a pipe, given so long, and ended with all that it began."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.versus.training import Setting, end_with_parent, forget_peak_rss, peak_rss_bytes

CLOSE_S = 10


class WorkerError(RuntimeError):
    """A contender could not do what it was asked; says why in one line."""


class Worker:
    """A process that does what it is asked. The CPU's are forked from this one, which has imported all they need; the
    others begin anew, since CUDA does not survive a fork.
    """

    def __init__(self, name: str, setting: Setting) -> None:
        self.name = name
        self.setting = setting
        context = multiprocessing.get_context("fork" if setting.device == "cpu" else "spawn")
        setting.scratch.mkdir(parents=True, exist_ok=True)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, setting), name=f"versus-{name}")
        self._process.start()
        theirs.close()

    def ask(self, what: str, *args: Any, seconds: float) -> Any:
        """Return what the contender answers. Raises WorkerError; it has ended then."""
        try:
            self._pipe.send((what, args))
            if not self._pipe.poll(max(0.0, seconds)):
                raise WorkerError(f"did not answer within {seconds:.0f} s ({what})")
            fine, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(CLOSE_S)
            code = self._process.exitcode
            how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            self.close()
            raise WorkerError(f"ended with {how} while asked to {what}") from error
        except WorkerError:
            self.close()
            raise
        if not fine:
            self.close()
            raise WorkerError(answer)
        return answer

    def close(self) -> None:
        """End the process and every other of its group, and remove its folder."""
        pid = self._process.pid
        with contextlib.suppress(OSError):
            self._pipe.send(None)  # it ends by itself, unless it hangs; others that were forked hold the pipe open too
        self._pipe.close()
        self._process.join(CLOSE_S)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):  # none is left
                os.killpg(pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        shutil.rmtree(self.setting.scratch, ignore_errors=True)


def _serve(pipe: Connection, name: str, setting: Setting) -> None:
    """Answer until the pipe is closed. Runs in the worker's process."""
    os.setsid()
    end_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TMPDIR"] = str(setting.scratch)
    with (setting.scratch / "log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    warnings.simplefilter("ignore")
    commands = _Commands(name, setting)
    while True:
        asked = pipe.recv()
        if asked is None:
            break
        what, args = asked
        try:
            answer = (True, getattr(commands, what)(*args))
        except BaseException as error:
            traceback.print_exc()
            sys.stderr.flush()
            answer = (False, _said(error))
        pipe.send(answer)
    # Not through Python's end: a process group, or a library's thread, may wait there for ever.
    commands.end()
    os._exit(0)


def _said(error: BaseException) -> str:
    """Return an error's type and first line, short enough for a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


class _Commands:
    """What a worker may be asked."""

    def __init__(self, name: str, setting: Setting) -> None:
        self._name = name
        self._setting = setting
        self._training: Any = None

    def begin(self) -> dict[str, Any]:
        """Make the model ready; return the seconds and the peak of RAM that it took."""
        import torch

        from benchmarks.versus import contenders

        if self._setting.device == "cpu":
            torch.set_num_threads(1)  # the other core is for copies
        began = time.perf_counter()
        self._training = contenders.begin(self._name, self._setting)
        loaded = {"load_s": time.perf_counter() - began, "load_rss_peak_bytes": peak_rss_bytes()}
        return {**loaded, "rss_peak_is_with_load": not forget_peak_rss()}

    def checkpoint(self) -> int:
        """Write the model's checkpoint; return its bytes."""
        import torch

        from benchmarks.versus.models import write_checkpoint

        return write_checkpoint(self._setting.model, self._setting.checkpoint, torch.device(self._setting.device))

    def plans(self, names: tuple[str, ...], whole_s: float | None) -> dict[str, Any]:
        import torch

        from benchmarks.versus.planning import make_plans

        if self._setting.device == "cpu":
            torch.set_num_threads(1)
        return make_plans(self._setting, names, whole_s)

    def first(self) -> dict[str, Any]:
        return self._do(lambda training: training.first())

    def gradients(self) -> Path:
        return self._setting.scratch / "gradients.safetensors"

    def train(self, steps: int) -> list[float]:
        return self._do(lambda training: training.train(steps))

    def figures(self) -> dict[str, Any]:
        return self._do(lambda training: training.figures())

    def profile(self) -> dict[str, Any]:
        from benchmarks.versus.profile import account

        return self._do(account)

    def end(self) -> None:
        if self._training is not None and self._training.handle is not None:
            self._training.handle.detach()

    def _do(self, what: Callable[[Any], Any]) -> Any:
        assert self._training is not None, "asked before begin"
        return what(self._training)
