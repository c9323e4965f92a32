"""transformers.Trainer: the micro-batches of a step that share each load of weights.

A Trainer takes the micro-batches of a step from its loader together (``get_batch_samples``), then hands them one by one
to ``training_step``. The first of a group runs them all, the others return what they gave.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from memplan.errors import RunError
from memplan.run.handle import Handle
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

        first, *others = handle.micro_batch(lambda: handle.accumulate(run, group))
        self._done.extend(others)
        return first

    def _size(self) -> int:
        """Return how many micro-batches may run together."""
        control = self._trainer.control
        if self._handle.plan.group == 1 or control.should_training_stop or control.should_epoch_stop:
            return 1  # no other comes after this one
        reason = reason_against(self._trainer)
        if reason is None:
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
