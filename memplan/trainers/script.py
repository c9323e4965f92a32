"""A script that knows nothing of memplan: its model is mapped as it loads, and placed when its trainer first needs it.

Whatever cannot be served is left as it would be without memplan, and one line says why.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from memplan import api
from memplan.checkpoint import has_checkpoint
from memplan.errors import CheckpointError, DoesNotFitError, InputError, MemplanError, ModelError
from memplan.program.schema import Plan
from memplan.run.handle import handle_of
from memplan.trainers.launch import Settings, say, settings
from memplan.trainers.mapped import give_way, is_mapped, map_weights
from memplan.trainers.transformers import not_served, plan_for, skeleton_of, wrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer

_ENTRIES = ("train", "evaluate", "predict")
_ANY_PLACE = ("auto", {"": "auto"})
_DISTRIBUTED = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")


def serve_models(kind: type[PreTrainedModel]) -> None:
    """Have ``from_pretrained`` map the weights that it can."""
    original = kind.__dict__["from_pretrained"]

    @functools.wraps(original.__func__)
    def from_pretrained(cls: type[PreTrainedModel], name: Any, *args: Any, **kwargs: Any) -> Any:
        return _mapped(cls, name, args, kwargs) or original.__get__(None, cls)(name, *args, **kwargs)

    setattr(kind, "from_pretrained", classmethod(from_pretrained))  # noqa: B010


def serve_trainer(kind: type[Trainer]) -> None:
    """Have a trainer's model placed before it is first used, and left alone until then."""
    for name in _ENTRIES:
        setattr(kind, name, _placed_first(getattr(kind, name)))
    move: Callable[..., None] = kind._move_model_to_device

    @functools.wraps(move)
    def _move_model_to_device(trainer: Trainer, model: nn.Module, device: torch.device) -> None:
        if not _waits(trainer, model):
            move(trainer, model, device)

    setattr(kind, "_move_model_to_device", _move_model_to_device)  # noqa: B010


def _mapped(cls: type[PreTrainedModel], name: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the model with its weights mapped, or None where the script had better load it as ever."""
    if any(os.environ.get(variable, "").lower() in ("1", "true") for variable in _DISTRIBUTED):
        return None
    given = {key: value for key, value in kwargs.items() if key != "device_map" or value not in _ANY_PLACE}
    if not isinstance(name, (str, Path)) or not has_checkpoint(name) or not_served(args, given):
        return None
    try:
        model = skeleton_of(cls, Path(name), given)
        if getattr(model.config, "quantization_config", None) is not None:
            return None
        map_weights(model, name)
    except (CheckpointError, InputError, ModelError) as error:
        say(f"{name} is loaded whole: {error}")
        return None
    return model


def _placed_first(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def entry(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        if not trainer.__dict__.get("_memplan_seen"):
            trainer.__dict__["_memplan_seen"] = True
            _place(trainer)
        try:
            return original(trainer, *args, **kwargs)
        finally:
            if original.__name__ == "train":
                _report(trainer)

    return entry


def _waits(trainer: Trainer, model: nn.Module) -> bool:
    """Whether a model is not to be moved, because it is still to be placed."""
    return not trainer.__dict__.get("_memplan_seen") and is_mapped(model)


def _place(trainer: Trainer) -> None:
    """Plan and attach, or say why not. Raises DoesNotFitError; the model then is as it was."""
    model = trainer.model
    if not isinstance(model, nn.Module) or handle_of(model) is not None:
        return
    why = _why_not(trainer, model)
    if why is None:
        try:
            why = _attach(trainer, model, settings())
        except DoesNotFitError:
            raise
        except MemplanError as error:
            why = str(error)
    if why is not None:
        say(f"stands aside: {why}")
        if is_mapped(model) and trainer.place_model_on_device:
            trainer._move_model_to_device(model, trainer.args.device)


def _why_not(trainer: Trainer, model: nn.Module) -> str | None:
    frozen = [not parameter.requires_grad for parameter in model.parameters()]
    if not any(frozen):
        return "nothing in the model is frozen, so there is nothing to stream"
    if all(frozen):
        return "nothing in the model is trained"
    if trainer.train_dataset is None:
        return "the trainer has no data to train on"
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return "DeepSpeed or FSDP places the model"
    if trainer.args.world_size > 1:
        return "it serves one process, and this is one of several"
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "accelerate offloads the model already (device_map)"
    return "unsloth offloads by itself" if "unsloth" in sys.modules else None


def _attach(trainer: Trainer, model: nn.Module, given: Settings) -> str | None:
    """Put the model under a plan; return why it had better stay as it is, if so."""
    plan = Plan.load(given.plan) if given.plan else None
    if plan is None:
        plan = plan_for(trainer, vram=given.vram, ram=given.ram, disk=given.disk, hardware=given.hardware)
    if all(residence.begins == "always" for residence in plan.residences):
        return "the whole model fits"
    device = torch.device(plan.table.device)
    undo = give_way(model, device)
    try:
        wrap(trainer, plan=plan)
    except BaseException:
        undo()
        raise
    api.report(plan, file=sys.stderr)
    return None


def _report(trainer: Trainer) -> None:
    handle = trainer.__dict__.get("memplan")
    if handle is None:
        return
    api.report(handle.plan, handle.record, file=sys.stderr)
    report = settings().report
    if report is not None:
        with Path(report).open("w", encoding="utf-8") as file:
            api.report(handle.plan, handle.record, file=file)
