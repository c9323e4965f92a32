"""A script that knows nothing of memplan: its model is mapped as it loads, and placed when its trainer first needs it.

Whatever cannot be served is left as it would be without memplan, and one line says why.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import ref

from torch import nn

from memplan.hooks.compiled import IN_SCRIPT
from memplan.queries.one_plan import agreed
from memplan.run.handle import handle_of
from memplan.trainers.hf_trainer import (
    compiles,
    is_of_library,
    loss_may_be_asked,
    placed_by_others,
    plan_for,
    wrap_within,
)
from memplan.trainers.launch import saw_model, saw_training, settings
from memplan.trainers.loading.deferred_placement import (
    ask,
    is_trained_in_part,
    move,
    not_waiting,
    tell_device,
    waits,
)
from memplan.trainers.loading.from_pretrained import (
    device_asked,
    map_loaded,
    of_diffusers,
    of_transformers,
)
from memplan.trainers.loading.mapped_weights import is_mapped
from memplan.trainers.serve_loop import (
    FINISHED,
    SCOPE,
    TRAINING,
    free_dropped,
    nothing_to_do,
    report,
    say_aside,
    serve_model,
    served,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, Trainer

_ENTRIES = ("train", "evaluate", "predict")


def serve_models(kind: type[PreTrainedModel]) -> None:
    """Have transformers' ``from_pretrained`` map the weights that it can."""
    tell_device(kind)
    map_loaded(kind, of_transformers, SCOPE.loaded.add, _mapped)


def serve_diffusers(kind: Any) -> None:
    """Have diffusers' ``from_pretrained`` map the weights that it can."""
    tell_device(kind)
    map_loaded(kind, of_diffusers, SCOPE.loaded.add, _mapped)


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


def _mapped(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    saw_model()
    device = device_asked(kwargs)
    if device is not None:
        ask(model, device)
    serve_model(model)


def _wait(model: nn.Module) -> None:
    if waits(model) or is_mapped(model):
        serve_model(model)


def _placed_first(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def entry(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        if original.__name__ == "train":
            saw_training()
        if not trainer.__dict__.get("_memplan_seen"):
            trainer.__dict__["_memplan_seen"] = True
            try:
                _place(trainer)
            except BaseException:
                del trainer.__dict__["_memplan_seen"]
                raise
        model = trainer.model
        if isinstance(model, nn.Module):
            FINISHED.pop(model, None)
        TRAINING.append(trainer)
        try:
            return original(trainer, *args, **kwargs)
        finally:
            TRAINING.remove(trainer)
            if original.__name__ == "train":
                if isinstance(model, nn.Module):
                    FINISHED[model] = ref(trainer)
                if "memplan" in trainer.__dict__:
                    handle = trainer.__dict__["memplan"]
                    report((handle.plan, handle.record))

    return entry


def _place(trainer: Trainer) -> None:
    """Plan and attach, or say why not. Raises DoesNotFitError; the model then is as it was."""
    model = trainer.model
    if not isinstance(model, nn.Module) or handle_of(model) is not None:
        return
    free_dropped(model)
    why = _why_not(trainer, model)
    if why is None and is_mapped(model) and not (is_trained_in_part(model) and _may_be_asked(trainer)):
        return  # placed at its first call, as for a loop
    if why is None and not is_trained_in_part(model):
        why = "nothing in the model is trained"
    why = agreed(why)
    with not_waiting(model):
        if why is None:
            asked = settings()
            files = {name: value for name, value in asked.options.items() if name == "checkpoint"}
            why = served(
                model,
                lambda: plan_for(trainer, SCOPE, **asked.options),
                lambda plan: wrap_within(SCOPE, trainer, plan=plan, log=asked.log, lines=asked.lines, **files),
            )
    if why is not None:
        move(model)
        say_aside(why)


def _why_not(trainer: Trainer, model: nn.Module) -> str | None:
    if trainer.train_dataset is None:
        return "the trainer has no data to train on"
    others = placed_by_others(trainer)
    if others is not None:
        return others
    if trainer.args.bf16_full_eval or trainer.args.fp16_full_eval:
        return "the trainer casts the model to evaluate it (bf16_full_eval, fp16_full_eval)"
    if compiles(trainer):
        return f"the trainer compiles the model as a whole: {IN_SCRIPT}"
    if getattr(trainer, "model_init", None) is not None:
        return "the trainer makes its model anew as it trains (model_init)"
    return nothing_to_do(model)


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
