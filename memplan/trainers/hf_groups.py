"""transformers.Trainer: the micro-batches of a step that share each load of weights.

A Trainer takes the micro-batches of a step from its loader together (``get_batch_samples``), then hands them one by one
to ``training_step``. The first of a group runs them all, the others return what they gave.
"""

from __future__ import annotations

import copy
import dis
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

import torch

from memplan.errors import RunError
from memplan.run.handle import Handle
from memplan.run.lanes.hooked import HookState
from memplan.trainers.launch import say

if TYPE_CHECKING:
    from transformers import Trainer


class GroupedSteps:
    """Stands for a trainer's ``get_batch_samples`` and ``training_step`` from its construction on."""

    def __init__(self, trainer: Trainer, handle: Handle) -> None:
        self._trainer = trainer
        self._handle = handle
        self._batches: Callable[..., tuple[list[Any], Any]] = trainer.get_batch_samples
        self._step: Callable[..., torch.Tensor] = trainer.training_step
        self._window: deque[Any] = deque()
        """The micro-batches of the step under way that have not come yet."""
        self._done: deque[torch.Tensor] = deque()
        """What those of them gave that were run ahead of their turn."""
        self._is_said = False
        self._kept: str | None = None
        """What is in the way of its own code's making, or nothing; None before the first micro-batch."""
        trainer.__dict__["get_batch_samples"] = self.batches
        trainer.__dict__["training_step"] = self.step

    def batches(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Stand for ``get_batch_samples``."""
        samples, count = self._batches(*args, **kwargs)
        self._refuse_left()
        self._window = deque(samples)
        return samples, count

    def step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Stand for ``training_step``. Memory that runs out has a group repeated. It takes the inputs apart: a copy
        each time.
        """
        trainer, handle = self._trainer, self._handle
        is_next = bool(self._window) and self._window[0] is inputs
        if self._done:
            if not is_next:
                self._refuse_left()
            self._window.popleft()
            return self._done.popleft()
        if trainer.optimizer is not None:
            handle.adopt(trainer.optimizer)  # its state may come from a checkpoint
        group = [inputs]
        if is_next:
            size = self._size()
            group = [self._window[turn] for turn in range(min(size, len(self._window)))]
            self._window.popleft()

        def run(batch: Any) -> torch.Tensor:
            return self._step(model, copy.copy(batch), *args, **kwargs)

        name = type(trainer).__name__
        if self._kept is None and handle.plan.group > 1:
            held = _held(trainer)
            with _reads_noted() as reads:
                first = handle.micro_batch(lambda: handle.accumulate(run, group[:1]))[0]
            self._kept = f"{name} or its loss function keeps something of each" if held.is_changed() else ""
            if reads:
                self._kept = f"{name}, or what it calls, asks which micro-batch is the last of a step (sync_gradients)"
            return first
        noted = _reads_noted() if len(group) > 1 else nullcontext(list[bool]())
        with noted as reads:
            first, *others = handle.micro_batch(lambda: handle.accumulate(run, group))
        if reads:
            self._kept = "in an earlier group it was asked which micro-batch is the last of a step (sync_gradients)"
            raise RunError(
                f"{name}, or what it calls, asked which micro-batch is the last of a step (sync_gradients) in a group, "
                "where none is, and had not asked in the first one: its gradients are not those of one by one. Resume "
                "from the last checkpoint, or use group=1"
            )
        self._done.extend(others)
        return first

    def _size(self) -> int:
        """Return how many micro-batches may run together."""
        control = self._trainer.control
        if self._handle.plan.group == 1 or control.should_training_stop or control.should_epoch_stop:
            return 1  # no other comes after this one
        reason = reason_against(self._trainer) or self._kept
        if not reason:
            return self._handle.plan.group
        if not self._is_said:
            self._is_said = True
            say(f"each micro-batch loads weights for itself: {reason}")
        return 1

    def _refuse_left(self) -> None:
        """Raise RunError where what was run ahead is wanted by nobody: its gradients are among the others."""
        if self._done:
            left = len(self._done)
            self._done.clear()
            self._window.clear()
            raise RunError(
                f"{type(self._trainer).__name__} left a step in its middle, {left} of whose micro-batches had run ahead"
                " of their turn to share loads of weights: its gradients are of more than it asked for. Resume from "
                "the last checkpoint, or use group=1"
            )


def reason_against(trainer: Trainer) -> str | None:
    """Return what of a trainer must see each micro-batch end before the next begins, if something does."""
    from transformers import Trainer, TrainerCallback
    from transformers.training_args import OptimizerNames

    if trainer.args.world_size > 1:  # DDP sums gradients in the last one's backward, under a context of its own
        return "several processes train together"
    kind = type(trainer)
    if kind._prepare_inputs is not Trainer._prepare_inputs:  # GRPO generates there, with the model as it is by then
        return f"{kind.__name__} prepares its micro-batches itself, one by one"
    if trainer.args.optim in (OptimizerNames.LOMO, OptimizerNames.ADALOMO):
        return f"the optimizer {trainer.args.optim} steps in each backward"
    for callback in trainer.callback_handler.callbacks:
        if type(callback).on_substep_end is not TrainerCallback.on_substep_end:
            return f"{type(callback).__name__} is called after each micro-batch"
    return None


class _NotedReads:
    """Stands for ``sync_gradients`` of accelerate's state, which the loop sets before each micro-batch."""

    def __init__(self, reads: list[bool]) -> None:
        self._reads = reads

    def __get__(self, state: Any, kind: type | None = None) -> Any:
        self._reads.append(True)
        return state.__dict__["sync_gradients"]

    def __set__(self, state: Any, value: bool) -> None:
        state.__dict__["sync_gradients"] = value


@contextmanager
def _reads_noted() -> Iterator[list[bool]]:
    """Yield a list that is empty until somebody asks, within, whether a micro-batch is the last of its step."""
    from accelerate.state import GradientState

    reads: list[bool] = []
    before = GradientState.__dict__.get("sync_gradients")  # of a trainer that trains within another's step
    GradientState.sync_gradients = _NotedReads(reads)
    try:
        yield reads
    finally:
        if before is None:
            del GradientState.sync_gradients
        else:
            GradientState.sync_gradients = before


_LIBRARIES = ("accelerate", "builtins", "transformers", "trl")


def _held(trainer: Trainer) -> HookState:
    """Return what a trainer's own code and its loss function hold: objects that they name, and the attributes, of the
    trainer and of its own classes, that they name and no library's code sets.
    """
    own = _kinds(type(trainer), own=True)
    named = {name for kind in own for code in _codes(kind) for name in code.co_names}
    libraries = {
        step.argval
        for kind in (_kinds(type(trainer), own=False) if named else ())
        for code in _codes(kind)
        for step in dis.get_instructions(code)
        if step.opname == "STORE_ATTR"
    }
    functions = [value for kind in own for value in vars(kind).values() if isinstance(value, FunctionType)]
    places = [trainer.__dict__, *map(vars, own)]
    attributes = [(place, name) for place in places for name in sorted(named - libraries)]
    return HookState((trainer.compute_loss_func, *functions), attributes)


def _kinds(kind: type, *, own: bool) -> list[type]:
    """Return a trainer's classes that are the script's ``own``, or those of libraries."""
    return [one for one in kind.__mro__ if (one.__module__.partition(".")[0] not in _LIBRARIES) == own]


def _codes(kind: type) -> Iterator[CodeType]:
    """Yield the code of a class's functions."""
    for value in vars(kind).values():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        waiting = [code] if (code := getattr(function, "__code__", None)) is not None else []
        while waiting:
            yield (code := waiting.pop())
            waiting += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
