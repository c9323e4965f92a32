"""transformers.Trainer: wrap one that exists, with a plan of what it will do."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import nn

from memplan import api
from memplan.errors import InputError
from memplan.hooks.compiled import WAY_OUT, call_of, replace_call
from memplan.hooks.nested import tensors_in
from memplan.model.calls import Call, Step
from memplan.plan_options import PlanOptions
from memplan.program.schema import Plan
from memplan.queries.one_plan import planning
from memplan.ranks.world import world
from memplan.request import Request, completed, refuse_beside_plan
from memplan.run.attach import attach, device_of_rank
from memplan.run.handle import Handle
from memplan.state.process_state import random_states_kept
from memplan.state.snapshot import unchanged
from memplan.trainers.hf_groups import GroupedSteps
from memplan.trainers.launch import one_by_one
from memplan.trainers.loading.deferred_placement import arrived, not_waiting
from memplan.trainers.loading.load import at_detach
from memplan.trainers.loading.mapped_weights import folder_of, is_mapped, release_mapped
from memplan.trainers.loading.stored import checkpoint_of
from memplan.trainers.longest_batch import longest_batch
from memplan.trainers.other_models import Scope

if TYPE_CHECKING:
    from transformers import Trainer


def wrap(
    trainer: Trainer,
    *,
    plan: Plan | None = None,
    batch: Mapping[str, torch.Tensor] | Call | None = None,
    checked: bool = False,
    log: bool = False,
    lines: bool = False,
    **options: Unpack[PlanOptions],
) -> Trainer:
    """Put a plan to work on a trainer that exists. Return the same trainer, its handle as ``trainer.memplan``.

    A micro-batch that runs out of device memory is retried under a smaller plan (:meth:`memplan.Handle.micro_batch`).

    ``trainer``: a transformers Trainer, or one built on it.
    ``plan``: one made before, in place of ``options``.
    ``batch``: the largest micro-batch that will come (a :class:`memplan.Call` where the model takes positions too);
    without it that of the longest rows of a dataset of ``datasets``, or else the first that the trainer's loader gives
    (its random state is put back).
    ``checked``: as for :func:`memplan.attach`.
    ``log``: add the scalars of :meth:`memplan.Handle.scalars` to what the trainer logs.
    ``lines``: print them after each step, on standard error.
    ``options``: those of :func:`memplan.plan` (:class:`memplan.PlanOptions`). Where they are left out the trainer's own
    hold: its accumulation, steps, optimizer and loss, the autocast that ``bf16`` or ``fp16`` among its arguments will
    have it run in, and the folder that its model came from; ``gains`` are not looked at.

    Other models that the trainer holds (a reference, a teacher, a reward) take their part of the budgets
    (:mod:`memplan.trainers.other_models`). Raises what ``plan`` and ``attach`` raise; trainer and model then are as
    they were.
    """
    wrap_within(Scope(), trainer, plan=plan, batch=batch, checked=checked, log=log, lines=lines, **options)
    return trainer


def wrap_within(
    scope: Scope,
    trainer: Trainer,
    *,
    plan: Plan | None = None,
    batch: Mapping[str, torch.Tensor] | Call | Step | None = None,
    checked: bool = False,
    log: bool = False,
    lines: bool = False,
    **options: Unpack[PlanOptions],
) -> Handle:
    """As :func:`wrap`, with budgets that a scope's models share; return the handle."""
    check_early(plan, options)
    if not isinstance(trainer.model, nn.Module) or getattr(trainer, "model_init", None) is not None:
        raise InputError("wrap needs a trainer with a model: build it with model=, not model_init=")
    model: Any = trainer.model
    args = trainer.args
    others = placed_by_others(trainer)
    if others is not None:
        raise InputError(f"memplan was to place the model of {type(trainer).__name__}, but {others}")
    if compiles(trainer):
        raise InputError(
            "the trainer was asked to compile the model (torch_compile, or accelerate's own setting), which it would "
            "do as a whole once training starts, while memplan brings weights layer by layer: leave it out, and "
            f"{WAY_OUT}"
        )
    with not_waiting(model), contextlib.ExitStack() as undo:
        if args.gradient_checkpointing:
            undo.callback(_checkpoint_activations(model, args.gradient_checkpointing_kwargs))
        if plan is None:
            if args.auto_find_batch_size:  # which has steps of its own
                options["group"] = one_by_one(options)["group"]
            plan = _plan(trainer, scope, batch, **options)
        handle = put_under(model, plan, scope, checked=checked, checkpoint=options.get("checkpoint"))
        undo.pop_all()
    trainer.__dict__["memplan"] = handle
    if log or lines:
        from memplan.trainers.log_callback import Telling

        # Before all others: those that report see what it adds.
        trainer.callback_handler.callbacks.insert(0, Telling(handle, log=log, lines=lines))
    if not args.auto_find_batch_size:  # the trainer itself then takes a smaller batch
        GroupedSteps(trainer, handle)
    return handle


def check_early(plan: Plan | None, options: PlanOptions) -> None:
    """Raise InputError for options that cannot be used, before anything is done: a trainer may be built much later."""
    Request.of(None, None, options)  # the model and its calls are not known yet, and are no words
    if plan is not None:
        refuse_beside_plan(options)


def placed_by_others(trainer: Trainer) -> str | None:
    """Return who else places a trainer's model or copies it, if someone does."""
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return "DeepSpeed or FSDP places the model"
    if trainer.args.world_size > 1 and world() is None:
        return "this is one of several processes that torch.distributed does not know"
    if splits(getattr(trainer, "accelerator", None)):
        return "accelerate's parallelism_config splits the model"
    if trainer.args.n_gpu > 1:
        return "the trainer copies the model to several devices: let it see one"
    return None


def splits(accelerator: Any) -> bool:
    """Whether an accelerator splits a model, or what goes through it, over ranks (tensor or context parallel)."""
    config = getattr(accelerator, "parallelism_config", None)
    return config is not None and any(
        getattr(config, f"{kind}_enabled", False) for kind in ("tp", "cp", "sp", "dp_shard")
    )


def compiles(trainer: Trainer) -> bool:
    """Whether a trainer will compile its model as a whole."""
    from accelerate.utils import DynamoBackend

    return bool(trainer.args.torch_compile) or trainer.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO


def plan_for(trainer: Trainer, scope: Scope | None = None, **options: Unpack[PlanOptions]) -> Plan:
    """Return the plan that :func:`wrap` would make, and change nothing."""
    with contextlib.ExitStack() as undo:
        if trainer.args.gradient_checkpointing:
            undo.callback(_checkpoint_activations(trainer.model, trainer.args.gradient_checkpointing_kwargs))
        return _plan(trainer, scope or Scope(), None, **options)


def _plan(
    trainer: Trainer,
    scope: Scope,
    batch: Mapping[str, torch.Tensor] | Call | Step | None,
    **options: Unpack[PlanOptions],
) -> Plan:
    """Return a plan of what the trainer will do, but for what the options say."""
    args = trainer.args
    ranks = planning()
    with contextlib.nullcontext() if ranks is None else ranks.telling("looking at the largest micro-batch"):
        first, steps = _first_call(trainer) if batch is None else (batch, _steps(args, None))
    model: Any = trainer.model
    asked = completed(options, **said_by(args, model), steps=steps)
    own = options.get("autocast") is None
    with _autocast_as_in_training(model, trainer.accelerator) if own else contextlib.nullcontext():
        return scope.plan(
            model,
            lambda within: api.plan(model, first, **within),
            asked,
            models_beside(trainer),
            call=first,
            ranks=ranks,
        )


def said_by(args: Any, model: nn.Module) -> dict[str, Any]:
    """Return the options of a plan that a trainer's arguments say, but for its steps and autocast."""
    return {
        "accumulation": args.gradient_accumulation_steps,
        "optimizer": optimizer_of(args),
        "loss": loss_of,
        "checkpoint": folder_of(model),
        "gains": False,
    }


def optimizer_of(args: Any) -> str:
    """Return the optimizer of a trainer's arguments, by the name that a plan knows."""
    optimizer = str(getattr(args.optim, "value", args.optim))
    return "momentum" if optimizer == "sgd" and "momentum" in (args.optim_args or "") else optimizer


def models_beside(trainer: Trainer) -> list[nn.Module]:
    """Return the models that a trainer holds beside the one that it trains."""
    found: list[nn.Module] = []
    for held in vars(trainer).values():
        listed = held.values() if isinstance(held, dict) else held if isinstance(held, (list, tuple)) else [held]
        found += [value for value in listed if isinstance(value, nn.Module)]
    return found


def put_under(
    model: nn.Module,
    plan: Plan,
    scope: Scope,
    *,
    checked: bool = False,
    traced: bool = False,
    checkpoint: str | Path | None = None,
) -> Handle:
    """Attach a plan to a model, mapped or not, and return the handle; what is mapped is mapped again once it is
    detached.

    ``checked``, ``traced``: as for ``attach``. ``checkpoint``: else what the model was mapped from.

    Raises what ``attach`` raises; the model then is as it was.
    """
    device = device_of_rank(model, torch.device(plan.table.device))
    give_back = release_mapped(model, device) if is_mapped(model) else None
    try:
        files = checkpoint or checkpoint_of(model)
        handle = attach(model, plan, checkpoint=files, checked=checked, traced=traced, replan=api.smaller)
    except BaseException:
        if give_back is not None:
            give_back()
        raise
    if give_back is not None:
        at_detach(handle, give_back)
    arrived(model)
    scope.placed.add(handle)
    return handle


def _checkpoint_activations(model: Any, options: Any) -> Callable[[], None]:
    """Turn on what the trainer would turn on when training starts: the plan must see it. Return what undoes it."""
    name = "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"
    getattr(model, f"{name}_enable")(options)
    disable: Callable[[], None] = getattr(model, f"{name}_disable")
    return disable


@contextlib.contextmanager
def _autocast_as_in_training(model: nn.Module, accelerator: Any) -> Iterator[None]:
    """Have the model compute as it will from ``train()`` on: accelerate then wraps its forward in autocast, and makes
    what that returns float32 again. On the CPU here, where it is traced.
    """
    from accelerate.utils import convert_outputs_to_fp32

    if not accelerator.native_amp:
        yield
        return
    dtype = torch.float16 if accelerator.mixed_precision == "fp16" else torch.bfloat16
    undo = replace_call(model, convert_outputs_to_fp32(torch.autocast("cpu", dtype)(call_of(model))))
    try:
        yield
    finally:
        undo()


class CallUnknownError(InputError):
    """What a trainer will call its model with cannot be known before it does."""


class Called(Exception):
    """A model was called, and that is all that was to be known."""


def _steps(args: Any, loader: Any) -> int | None:
    """Return how many steps the trainer will do, as it counts them itself; None where its loader has no length."""
    if args.max_steps > 0:
        return int(args.max_steps)
    try:
        batches = len(loader)
    except TypeError:
        return None
    return math.ceil(args.num_train_epochs * max(1, -(-batches // args.gradient_accumulation_steps))) or None


def _first_call(trainer: Trainer) -> tuple[Call, int | None]:
    """Return what the model will be called with in training, and the steps; every random state stays as it was.

    That is what the trainer's loss makes of its loader's largest micro-batch, or of the first where no lengths are
    known: TRL's batches name other things than the model knows.
    """
    loaders = getattr(trainer.accelerator, "_dataloaders", [])
    known = len(loaders)
    looked_at = {"model": trainer.model, "collator": trainer.data_collator, "loss": trainer.compute_loss_func}
    with random_states_kept(), unchanged(**looked_at):
        try:
            loader = trainer.get_train_dataloader()
            if world() is not None and getattr(loader, "rng_types", None):
                loader.rng_types = None  # else the ranks' random states are made one as it begins, all at once
            batch = longest_batch(loader) or next(iter(loader))
            call = _call_of_loss(trainer, batch)
            steps = _steps(trainer.args, loader)
        finally:
            del loaders[known:]  # the trainer prepares its own again; a second one would be saved with its state
    if call is None:
        if not isinstance(batch, Mapping):
            raise CallUnknownError(
                f"the data of {type(trainer).__name__} comes as {type(batch).__name__}, of which the trainer makes "
                "what it calls the model with only while it trains: give wrap the largest such call with batch=, or "
                "have it planned for at the first call by memplan.placing or memplan run"
            )
        call = Call(**{name: value for name, value in batch.items() if isinstance(value, torch.Tensor)})
    return call, steps


def _call_of_loss(trainer: Trainer, batch: Mapping[str, Any]) -> Call | None:
    """Return how the trainer's loss first calls the model, or None where that cannot be seen."""
    if not loss_may_be_asked(trainer):
        return None
    seen: list[Call] = []

    def called(*args: Any, **kwargs: Any) -> None:
        seen.append(Call(*args, **kwargs))
        raise Called

    model: Any = trainer.model
    undo = replace_call(model, called)
    try:
        trainer.compute_loss(model, trainer._prepare_inputs(dict(batch)))
    except Exception:
        pass
    finally:
        undo()
    return seen[0] if seen else None


def loss_may_be_asked(trainer: Trainer) -> bool:
    """Whether a trainer's loss is its library's, which nobody notices the use of: one of a script's own may count or
    print.
    """
    from transformers import Trainer

    return (
        is_of_library(type(trainer).compute_loss)
        and trainer.compute_loss_func is None
        and type(trainer)._prepare_inputs is Trainer._prepare_inputs  # others may generate in it
    )


def is_of_library(what: Any) -> bool:
    """Whether a class or function is of transformers or TRL."""
    return what.__module__.partition(".")[0] in ("transformers", "trl")


def loss_of(output: Any) -> torch.Tensor:
    """Return the model's loss, or where the trainer makes its own something that has a gradient for as much."""
    held = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(held, torch.Tensor):
        return held
    made = [tensor for tensor in tensors_in(output) if tensor.is_floating_point() and tensor.requires_grad]
    return torch.stack([tensor.float().square().mean() for tensor in made]).sum()
