"""transformers.Trainer: what memplan measures, among what the trainer logs."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from memplan.run.handle import Handle
from memplan.run.verify.scalars import Scalars
from memplan.show.log_lines import step_line
from memplan.trainers.launch import say


class Telling(TrainerCallback):
    """Adds scalars to the trainer's log, or says a line a step, or both."""

    def __init__(self, handle: Handle, *, log: bool, lines: bool) -> None:
        self._handle = handle
        self._log = log
        self._lines = Scalars() if lines else None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to what is logged of training."""
        if self._log and self._handle.is_attached and logs is not None and "loss" in logs:
            logs |= self._handle.scalars()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say the step's line."""
        if self._lines is not None and self._handle.is_attached:
            say(step_line(state.global_step, self._lines.take(self._handle.record)))
