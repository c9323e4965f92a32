"""PyTorch Lightning: a callback that places a module's model before its trainer moves it to a device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Unpack

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import nn

from memplan import api
from memplan.errors import InputError
from memplan.hooks.compiled import replace_call
from memplan.model.calls import Call
from memplan.plan_options import PlanOptions
from memplan.program.schema import Plan
from memplan.queries.one_plan import one_plan
from memplan.request import completed
from memplan.run.attach import attach
from memplan.run.handle import Handle, handle_of
from memplan.state.process_state import random_states_kept
from memplan.state.snapshot import unchanged
from memplan.trainers.hf_trainer import Called, check_early, loss_of
from memplan.trainers.launch import one_by_one
from memplan.trainers.loading.deferred_placement import forget, move, waits
from memplan.trainers.loading.mapped_weights import folder_of
from memplan.trainers.loading.stored import checkpoint_of
from memplan.trainers.longest_batch import longest_batch

_AUTOCAST = {"bf16-mixed": "bf16", "16-mixed": "fp16"}


class Placement(Callback):
    """Plans for the model within a LightningModule that has frozen weights, and puts the plan to work before it is
    moved.

    ``batch``: the keywords of the largest call of that model that will come, or a :class:`memplan.Call`; without it,
    what ``training_step`` calls it with for the longest rows of a dataset of ``datasets``, or else for the loader's
    first batch (random states are put back). ``plan``: one made before, in place of ``options``. ``log``: log the
    scalars of :meth:`memplan.Handle.scalars` after each batch, as the module logs its own. The handle is ``handle``,
    once fitting has begun; the model stays under its plan until ``handle.detach()``.

    ``options``: those of :func:`memplan.plan` (:class:`memplan.PlanOptions`). Where they are left out the trainer's own
    hold: its accumulation and precision, and the folder that the model came from; ``gains`` are not looked at.

    Raises InputError for options that cannot be used. Fitting raises what ``plan`` and ``attach`` raise; the model then
    is as it was.
    """

    def __init__(
        self,
        *,
        plan: Plan | None = None,
        batch: Mapping[str, torch.Tensor] | Call | None = None,
        checked: bool = False,
        log: bool = False,
        **options: Unpack[PlanOptions],
    ) -> None:
        check_early(plan, options)
        self.handle: Handle | None = None
        self._plan = plan
        self._batch = batch
        self._checked = checked
        self._log = log
        self._options = options

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Place it, before anything is moved."""
        if stage != "fit" or handle_of(pl_module) is not None:
            return
        if trainer.world_size > 1 and not _is_ddp(trainer):
            raise InputError(
                f"the trainer's strategy is {type(trainer.strategy).__name__}, and memplan serves several processes "
                'with DDP alone: give it strategy="ddp", or devices=1'
            )
        model, call = _first_call(trainer, pl_module)
        options = completed(
            one_by_one(self._options),
            accumulation=trainer.accumulate_grad_batches,
            autocast=_AUTOCAST.get(str(trainer.precision)),
            loss=loss_of,
            checkpoint=folder_of(model),
            gains=False,
        )
        batch = self._batch or call
        plan = self._plan or one_plan(model, lambda given: api.plan(model, batch, **given), options, batch)
        files = self._options.get("checkpoint") or checkpoint_of(model)
        self.handle = attach(model, plan, checkpoint=files, checked=self._checked, replan=api.smaller)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have what the optimizers know from a checkpoint lie where the plan has it."""
        if self.handle is not None:
            for optimizer in trainer.optimizers:
                self.handle.adopt(optimizer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Log what was measured."""
        if self._log and self.handle is not None:
            pl_module.log_dict(self.handle.scalars())


class PlacementAtFirstCall(Callback):
    """Under ``memplan run``: has the model of a module that makes it itself placed, when it is first called to be
    trained.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have it wait for that, where it does not already."""
        from memplan.trainers.serve_loop import say_aside, serve_model

        if stage == "fit" and trainer.world_size > 1 and not _is_ddp(trainer):
            forget(pl_module)
            move(pl_module)
            say_aside(f"Lightning's {type(trainer.strategy).__name__} places the model")
            return
        if stage == "fit" and handle_of(pl_module) is None and not waits(pl_module):
            for module in frozen_within(pl_module):
                serve_model(module)
                break


def _is_ddp(trainer: Trainer) -> bool:
    """Whether a trainer has whole models on its ranks, whose gradients are summed; DeepSpeed's is a DDPStrategy too."""
    return isinstance(trainer.strategy, DDPStrategy) and not isinstance(trainer.strategy, DeepSpeedStrategy)


def _first_call(trainer: Trainer, pl_module: LightningModule) -> tuple[nn.Module, Call]:
    """Return what has the frozen weights, as ``training_step`` calls it, and with what. Random states stay as they
    were.
    """
    seen: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def called(module: nn.Module) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            seen.append((module, args, kwargs))
            raise Called

        return call

    why: Exception | None = None
    with random_states_kept(), unchanged(model=pl_module), _buffers_kept(pl_module):
        undo = [replace_call(module, called(module)) for module in frozen_within(pl_module)]
        try:
            loader = trainer.fit_loop._data_source.dataloader()
            batch = longest_batch(loader) or next(iter(loader))
            pl_module.training_step(batch, 0)
        except Called:
            pass
        except Exception as error:
            why = error
        finally:
            for put_back in undo:
                put_back()
    if not seen:
        raise InputError(
            f"the training_step of {type(pl_module).__name__} did not come to call a module that holds all frozen "
            f"weights{f' ({type(why).__name__}: {why})' if why else ''}: attach that module with memplan.attach "
            "before fitting"
        )
    module, args, kwargs = seen[0]
    return module, Call(*args, **kwargs)


@contextlib.contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Leave a module's buffers as they were: a ``training_step`` may count its calls in one."""
    before = [(buffer, buffer._version, buffer.clone()) for buffer in module.buffers() if not buffer.is_inference()]
    try:
        yield
    finally:
        for buffer, version, contents in before:
            if buffer._version != version:  # else it was not written to
                buffer.detach().copy_(contents)
                torch._C._autograd._unsafe_set_version_counter((buffer,), (version,))


def frozen_within(pl_module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules within that hold all frozen weights, the outermost first."""
    frozen = {id(parameter) for parameter in pl_module.parameters() if not parameter.requires_grad}
    module: nn.Module | None = pl_module
    while module is not None and frozen:
        module = next(
            (part for part in module.children() if frozen <= {id(parameter) for parameter in part.parameters()}), None
        )
        if module is not None:
            yield module
