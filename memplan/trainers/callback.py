"""transformers.Trainer: a callback, for those who have their trainer built from a configuration."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from memplan import api
from memplan.errors import InputError
from memplan.hooks.compiled import WAY_OUT
from memplan.model.calls import Step
from memplan.plan_options import PlanOptions
from memplan.queries.one_plan import one_plan
from memplan.ranks.world import world
from memplan.request import completed
from memplan.run.handle import Handle, handle_of
from memplan.trainers.hf_trainer import check_early, put_under, said_by
from memplan.trainers.launch import one_by_one
from memplan.trainers.loading.deferred_placement import wait, waits
from memplan.trainers.log_callback import Telling
from memplan.trainers.other_models import Scope


class MemplanCallback(TrainerCallback):
    """Plans for a Trainer's model at its first call in training, and puts the plan to work.

    Trainers give a callback their model and not themselves, so it does less than :func:`memplan.wrap`, which is to be
    preferred where there is a trainer at hand: the plan is for the first micro-batch, not for the longest rows; other
    models (a reference, a reward) are not counted; a micro-batch that runs out of memory is not retried; and reporters
    see no figures of memplan's. On a GPU the Trainer moves its model there before training begins: where it would not
    fit, build the trainer inside :func:`memplan.placing`, or run the script by ``memplan run``. A model that one of
    those has placed, or is about to, is left to it. The handle is ``handle``, once training has begun.

    ``checked``: as for :func:`memplan.attach`.
    ``lines``: print the scalars of :meth:`memplan.Handle.scalars` after each step, on standard error.
    ``options``: those of :func:`memplan.plan`. Where they are left out the trainer's own hold: its accumulation, steps,
    optimizer and autocast, and the folder that the model came from; ``gains`` are not looked at.

    Raises InputError for options that cannot be used. Training raises what ``plan`` and ``attach`` raise, and
    InputError for what only one device a process and uncompiled models can have; the model then is as it was.
    """

    def __init__(self, *, checked: bool = False, lines: bool = False, **options: Unpack[PlanOptions]) -> None:
        check_early(None, options)
        self.handle: Handle | None = None
        self._checked = checked
        self._lines = lines
        self._telling: Telling | None = None
        self._options = options

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse what cannot be served, before a model is compiled or several processes wait for each other."""
        _require_served(args)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Have the model placed when it is first called to be trained."""
        if not isinstance(model, nn.Module):
            raise InputError("the trainer gave MemplanCallback no model: use memplan.wrap(trainer, ...)")
        if handle_of(model) is not None or waits(model):
            return
        _require_served(args)

        def place(model: nn.Module, step: Step) -> None:
            self._place(model, step, args, state, optimizer)

        wait(model, place)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say the step's line."""
        if self._telling is not None:
            self._telling.on_step_end(args, state, control, **kwargs)

    def _place(
        self,
        model: nn.Module,
        step: Step,
        args: TrainingArguments,
        state: TrainerState,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        options = completed(
            one_by_one(self._options),
            **said_by(args, model),
            steps=state.max_steps or None,
            autocast="bf16" if args.bf16 else "fp16" if args.fp16 else None,
        )
        plan = one_plan(model, lambda given: api.plan(model, step, **given), options, step)
        checkpoint = self._options.get("checkpoint")
        self.handle = put_under(model, plan, Scope(), checked=self._checked, checkpoint=checkpoint)
        if optimizer is not None:
            self.handle.adopt(optimizer)  # its state may come from a checkpoint
        if self._lines:
            self._telling = Telling(self.handle, log=False, lines=True)


def _require_served(args: TrainingArguments) -> None:
    if args.deepspeed or args.fsdp:
        raise InputError("MemplanCallback was to place the model, but DeepSpeed or FSDP does: leave one of them out")
    if args.n_gpu > 1 or (args.world_size > 1 and world() is None):
        raise InputError(
            "MemplanCallback serves one device a process, and the trainer uses several: set CUDA_VISIBLE_DEVICES to "
            "one, or start a process for each (torchrun)"
        )
    if args.torch_compile:
        raise InputError(f"the trainer compiles its model as a whole: leave torch_compile out, and {WAY_OUT}")
