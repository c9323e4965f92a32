"""A script that knows nothing of memplan: its model is mapped as it loads, and placed when its trainer first needs it.

Whatever cannot be served is left as it would be without memplan, and one line says why.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import io
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from memplan import api
from memplan.compiled import WAY_OUT
from memplan.errors import DoesNotFitError, MemplanError
from memplan.files import write
from memplan.program.schema import Plan
from memplan.run.guard import MERGES
from memplan.run.handle import Handle, handle_of
from memplan.show.lines import startup_lines
from memplan.trainers.launch import say, settings
from memplan.trainers.loading import checkpoint_of
from memplan.trainers.mapped import folder_of, give_way, is_mapped
from memplan.trainers.mapping import map_loaded, of_diffusers, of_transformers
from memplan.trainers.transformers import compiles, is_of_library, loss_may_be_asked, loss_of, plan_for, wrap
from memplan.trainers.waiting import arrived, forget, move, tell_device, wait, waits

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, Trainer

_ENTRIES = ("train", "evaluate", "predict")
_LAST: list[Handle] = []
"""The handle of the model that was last placed for a loop of the script's own, to tell of it at the end."""


def serve_models(kind: type[PreTrainedModel]) -> None:
    """Have transformers' ``from_pretrained`` map the weights that it can."""
    tell_device(kind)
    map_loaded(kind, of_transformers, _wait)


def serve_diffusers(kind: Any) -> None:
    """Have diffusers' ``from_pretrained`` map the weights that it can."""
    tell_device(kind)
    map_loaded(kind, of_diffusers, _wait)


def serve_adapters(kind: type[PeftModel]) -> None:
    """Have the model with its adapter be what is placed, not the one within it, which it does not even call."""
    original = kind.__init__

    @functools.wraps(original)
    def init(model: PeftModel, *args: Any, **kwargs: Any) -> None:
        original(model, *args, **kwargs)
        _wait(model)

    setattr(kind, "__init__", init)  # noqa: B010


def serve_trainer(kind: type[Trainer]) -> None:
    """Have a trainer's model placed before it is first used."""
    for name in _ENTRIES:
        setattr(kind, name, _placed_first(getattr(kind, name)))


def serve_model(model: nn.Module) -> None:
    """Have a model placed when it is first called to be trained, where that has not happened by then."""
    wait(model, _place_for_loop)


def _wait(model: nn.Module) -> None:
    if waits(model) or is_mapped(model):
        serve_model(model)


def _place_for_loop(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Plan for a call that a loop of the script's own makes, and attach."""
    why = _nothing_to_do(model)
    if why is None and args and kwargs:
        why = "the model is called with both positional arguments and keywords: call it with keywords"
    if why is None:
        from accelerate.state import GradientState

        accumulation = int(GradientState().num_steps) if GradientState._shared_state else 1

        def planned() -> Plan:
            return api.plan(
                model,
                kwargs or args,
                **settings().planning(),
                accumulation=accumulation,
                loss=loss_of,
                checkpoint=folder_of(model),
                gains=False,
            )

        def attach(plan: Plan) -> None:
            handle = api.attach(model, plan, checkpoint=checkpoint_of(model))
            if not _LAST:
                atexit.register(lambda: _report(_LAST[0]))
            _LAST[:] = [handle]

        why = _served(model, planned, attach)
    if why is not None:
        move(model)
        say(f"stands aside: {why}")


def _placed_first(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def entry(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        if not trainer.__dict__.get("_memplan_seen"):
            trainer.__dict__["_memplan_seen"] = True
            try:
                _place(trainer)
            except BaseException:
                del trainer.__dict__["_memplan_seen"]
                raise
        try:
            return original(trainer, *args, **kwargs)
        finally:
            if original.__name__ == "train" and "memplan" in trainer.__dict__:
                _report(trainer.__dict__["memplan"])

    return entry


def _place(trainer: Trainer) -> None:
    """Plan and attach, or say why not. Raises DoesNotFitError; the model then is as it was."""
    model = trainer.model
    if not isinstance(model, nn.Module) or handle_of(model) is not None:
        return
    why = _why_not(trainer, model)
    if why is None and is_mapped(model) and not _may_be_asked(trainer):
        return  # placed at its first call, as for a loop
    waited = waits(model)
    forget(model)
    try:
        if why is None:
            asked = settings()
            why = _served(
                model,
                lambda: plan_for(trainer, **asked.planning()),
                lambda plan: wrap(trainer, plan=plan, log=asked.log, lines=asked.lines),
            )
    except BaseException:
        if waited:
            serve_model(model)
        raise
    if why is not None:
        move(model)
        say(f"stands aside: {why}")


def _why_not(trainer: Trainer, model: nn.Module) -> str | None:
    if trainer.train_dataset is None:
        return "the trainer has no data to train on"
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return "DeepSpeed or FSDP places the model"
    if trainer.args.world_size > 1:
        return "it serves one process, and this is one of several"
    if trainer.args.n_gpu > 1:
        return "the trainer copies the model to several devices: let it see one"
    if trainer.args.bf16_full_eval or trainer.args.fp16_full_eval:
        return "the trainer casts the model to evaluate it (bf16_full_eval, fp16_full_eval)"
    if compiles(trainer):
        return f"the trainer compiles the model as a whole: leave that out, and {WAY_OUT}"
    if getattr(trainer, "model_init", None) is not None:
        return "the trainer makes its model anew as it trains (model_init)"
    return _nothing_to_do(model)


def _may_be_asked(trainer: Trainer) -> bool:
    """Whether a batch and what the loss makes of it can be had before training without the script's own code seeing it.

    A dataset, a collator or a loss of the script's own may count, print, or draw random numbers of its own.
    """
    dataset, collator = trainer.train_dataset, trainer.data_collator
    return (
        loss_may_be_asked(trainer)
        and is_of_library(type(trainer).get_train_dataloader)
        and is_of_library(collator if inspect.isfunction(collator) else type(collator))
        and getattr(collator, "seed", None) is None
        and hasattr(getattr(dataset, "data", None), "column_names")
        and getattr(dataset, "format", {}).get("type") != "custom"
    )


def _nothing_to_do(model: nn.Module) -> str | None:
    frozen = [not parameter.requires_grad for parameter in model.parameters()]
    if not any(frozen):
        return "nothing in the model is frozen, so there is nothing to stream"
    if all(frozen):
        return "nothing in the model is trained"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return "it serves one process, and this is one of several"
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "accelerate offloads the model already (device_map)"
    return "unsloth offloads by itself" if "unsloth" in sys.modules else None


def _served(model: nn.Module, planned: Callable[[], Plan], attach: Callable[[Plan], Any]) -> str | None:
    """Put a model under a plan; return why it had better stay as it is, if so. Raises DoesNotFitError."""
    file = settings().plan
    try:
        try:
            plan = Plan.load(file) if file else planned()
        except MemplanError:
            raise
        except Exception as error:  # the trace runs the script's own code, and the script is to run all the same
            return f"the model cannot be planned for ({type(error).__name__}: {error})"
        if all(residence.begins == "always" for residence in plan.residences):
            return "the whole model fits"
        undo = give_way(model, torch.device(plan.table.device))
        try:
            attach(plan)
        except BaseException:
            undo()
            raise
        arrived(model)
        _let_merge(model, undo)
    except DoesNotFitError:
        raise
    except MemplanError as error:
        return str(error)
    for line in startup_lines(plan):
        say(line)
    api.report(plan, file=sys.stderr)
    return None


def _let_merge(model: nn.Module, give_back: Callable[[], None]) -> None:
    """Have an adapter merged as without memplan: the weights are then mapped from the files again, and written to."""

    def merging(module: nn.Module, name: str) -> Callable[..., Any]:
        def merge(*args: Any, **kwargs: Any) -> Any:
            handle = handle_of(model)
            if handle is not None:
                handle.detach()
                give_back()
                model.to("cpu")  # where the weights are mapped
                say("the adapter is merged: from here on the model is whole")
            return getattr(module, name)(*args, **kwargs)

        return merge

    for module in model.modules():
        for name in MERGES:
            if name in module.__dict__:
                module.__dict__[name] = merging(module, name)


def _report(handle: Handle) -> None:
    """Tell what was measured, at the end."""
    api.report(handle.plan, handle.record, file=sys.stderr)
    file = settings().report
    if file is not None:
        text = io.StringIO()
        api.report(handle.plan, handle.record, file=text)
        try:
            write(file, text.getvalue().encode())
        except (MemplanError, OSError) as error:  # the training is done: its script goes on
            say(str(error))
