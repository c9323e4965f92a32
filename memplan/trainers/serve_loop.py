"""Loops of a script's own: a model is placed when it is first called to be trained.

And what the model of a trainer shares with that: one budget, why a model is left as it is, the report at the end.
"""

from __future__ import annotations

import atexit
import gc
import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import nn

from memplan import api
from memplan.atomic_write import write
from memplan.errors import DoesNotFitError, MemplanError, TooSlowError, first_line
from memplan.hooks.compiled import IN_SCRIPT
from memplan.model.calls import Step
from memplan.program.record import RunRecord
from memplan.program.schema import Plan
from memplan.queries.one_plan import agreed
from memplan.ranks.session import RankError, session, stage
from memplan.ranks.world import is_first, unknown_ranks, world
from memplan.request import completed
from memplan.run.handle import Handle, handle_of
from memplan.show.log_lines import begin_lines, end_lines
from memplan.show.tables import progress
from memplan.show.trace import write_trace
from memplan.trainers.compiled_whole import serve_compiled
from memplan.trainers.hf_trainer import (
    loss_of,
    models_beside,
    put_under,
)
from memplan.trainers.launch import one_by_one, saw_decision, say, settings
from memplan.trainers.loading.deferred_placement import (
    Again,
    forget,
    is_trained_in_part,
    move,
    wait,
    waits,
    waits_itself,
)
from memplan.trainers.loading.from_pretrained import (
    is_distributed,
)
from memplan.trainers.loading.mapped_weights import folder_of, is_mapped
from memplan.trainers.other_models import Scope, Unplaced, name_of, plan_of_least, together
from memplan.trainers.release import give_back, let_go, taken_back

if TYPE_CHECKING:
    from transformers import Trainer

SCOPE = Scope()
"""All models of this process share the budgets."""
_HANDLES: list[Handle] = []
"""Those of models that were placed for a loop of the script's own, to tell of them at the end."""
_DROPPED: list[tuple[Plan, RunRecord]] = []
"""Of models that the script has dropped since."""
_FROZEN: WeakKeyDictionary[nn.Module, frozenset[int]] = WeakKeyDictionary()
"""By model under a plan, the ids of its frozen parameters."""
_ASIDE: WeakKeyDictionary[nn.Module, frozenset[int]] = WeakKeyDictionary()
"""Models that run without a plan, with the ids of what was trained of them as that was found."""
_BEGAN = time.monotonic()
_looked_s = 0.0
"""What looking for models has taken."""
TRAINING: list[Trainer] = []
"""Those at work: what they do not hold is not trained beside their model."""
FINISHED: WeakKeyDictionary[nn.Module, ReferenceType[Trainer]] = WeakKeyDictionary()
"""Models whose training is over, and who trained them."""


def serve_model(model: nn.Module) -> None:
    """Have a model placed when it is first called to be trained, where that has not happened by then."""
    SCOPE.loaded.add(model)
    wait(model, _place_for_loop)


def serve_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Have models wait whose weights were not mapped: a script's own, or such as were filled by ``load_state_dict``,
    where the optimizer trains them in part.

    A model that is under a plan, of which it trains what was frozen, is whole again before. Models are looked for as
    long as that takes a fiftieth of the time: some scripts make an optimizer for each parameter.
    """
    global _looked_s
    if is_distributed() or unknown_ranks() is not None:
        return
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for handle in list(_HANDLES):
        thawed = _FROZEN.get(handle.model, frozenset()) & trained  # an optimizer may be given frozen ones too
        if handle.is_attached and thawed & _trained_ids(handle.model):
            taken_back(handle)
            say(f"{name_of(handle.model)} is trained in more of its parameters from here on, and planned anew for that")
    began = time.monotonic()
    if _looked_s > max(1.0, (began - _BEGAN) / 50):
        return
    for model in _trained_in_part(trained):
        if not (waits(model) or handle_of(model) is not None or _ASIDE.get(model) == _trained_ids(model)):
            SCOPE.loaded.add(model)
            wait(model, _place_for_loop)
    _looked_s += time.monotonic() - began


def serve_compiled_models(kind: type[nn.Module]) -> None:
    """Have a model that torch.compile has as a whole say why it is not placed; it then waits no more."""
    serve_compiled(kind, _compiled_whole)


def _compiled_whole(model: nn.Module) -> None:
    if (handle := handle_of(model)) is not None:
        give_back(handle, "the model is compiled as a whole")
        return
    forget(model)
    move(model)
    _ASIDE[model] = _trained_ids(model)
    say_aside(f"{name_of(model)} is compiled as a whole: {IN_SCRIPT}")


def _trained_in_part(trained: set[int]) -> Iterator[nn.Module]:
    """Yield the models, of those that are within no other, of which some parameters are trained and some frozen."""
    modules = [held for held in gc.get_objects() if issubclass(type(held), nn.Module)]
    within = {id(part) for module in modules for part in module.__dict__.get("_modules", {}).values()}
    for model in modules:
        if id(model) in within or isinstance(model, torch.jit.ScriptModule) or "_modules" not in model.__dict__:
            continue
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        if is_split(model):
            continue
        if is_trained_in_part(model) and any(id(parameter) in trained for parameter in model.parameters()):
            yield model


def _trained_ids(model: nn.Module) -> frozenset[int]:
    return frozenset(id(parameter) for parameter in model.parameters() if parameter.requires_grad)


def _place_for_loop(model: nn.Module, step: Step) -> Again | None:
    """Plan for what a loop of the script's own calls, and attach. Return what does so again for all of its first step.

    Where other models wait to be trained beside it, it gets the least vram that works and its share of the RAM: what
    the others need is known once they are called.
    """
    free_dropped(model)
    why = agreed(nothing_to_do(model))
    if why is None:
        unplaced = _UNPLACED.take(model)
        more = {} if unplaced is None else {"vram": 0}  # to know what both need
        try:
            why = served(model, lambda: _planned(model, step, more, is_first=True), partial(_attached, model))
        except DoesNotFitError as error:
            if not is_trained_in_part(model) and any(handle.is_attached for handle in SCOPE.placed):
                move(model)  # what it takes was counted as that of a model that is read
                say_aside(f"{name_of(model)} is wholly frozen, and beside what is under a plan {first_line(error)}")
                return None
            if not is_mapped(model) and unplaced is None:  # it ran whole before memplan was asked
                move(model)
                _ASIDE[model] = _trained_ids(model)
                say_aside(f"{name_of(model)} was loaded whole, and {first_line(error)}")
                return None
            if unplaced is not None:
                raise together(unplaced.error, unplaced.model, error, model) from None
            if not _others(model) or _UNPLACED.is_known(model) or torch.cuda.is_available():
                raise
            _UNPLACED.put(model, error)
            serve_model(model)
            return None
        if unplaced is not None:
            raise unplaced.error
    if why is not None:
        move(model)
        _ASIDE[model] = _trained_ids(model)
        say_aside(why)
        return None
    # What the first step calls may differ between ranks, and one of them would wait for the others in vain.
    return None if settings().plan or world() is not None else partial(_place_again, model)


def free_dropped(model: nn.Module) -> None:
    """Have the budgets free of models that were placed before ``model`` and that nobody but memplan holds any more, as
    those of the folds before.
    """
    if not any(handle.model is not model for handle in SCOPE.placed):
        return
    measured = [(ref(handle), handle.plan, handle.record) for handle in _HANDLES]
    _HANDLES.clear()
    gc.collect()
    for held, plan, record in measured:
        handle = held()
        if handle is None:
            _DROPPED.append((plan, record))
        else:
            _HANDLES.append(handle)


def _others(model: nn.Module) -> list[nn.Module]:
    """Return the models that wait to be trained beside one."""
    return [other for other in SCOPE.trained_beside(model) if not TRAINING or other in models_beside(TRAINING[-1])]


def _planned(model: nn.Module, step: Step, more: Mapping[str, Any], *, is_first: bool = False) -> Plan:
    """Return the plan of a model for what a script calls. ``more``: options in place of those that were given.

    ``is_first``: not all calls may be known yet. Where a module within is called first, the activations of the rest
    get all the room that there can be.
    """
    from accelerate.state import GradientState

    options = completed(
        one_by_one(settings().options),
        accumulation=int(GradientState().num_steps) if GradientState._shared_state else 1,
        loss=loss_of,
        checkpoint=folder_of(model),
        gains=False,
    )
    others = _others(model)
    within = SCOPE.share_of_ram(model, others, {**options, **more})
    plan = SCOPE.plan(model, lambda within: api.plan(model, step, **within), within, call=step)
    return plan_of_least(plan) if others or (is_first and step.reads_rest) else plan


def _attached(model: nn.Module, plan: Plan) -> Handle:
    asked = settings()
    checkpoint = asked.options.get("checkpoint")
    handle = put_under(model, plan, SCOPE, traced=asked.trace is not None, checkpoint=checkpoint)
    if not _HANDLES:
        atexit.register(_report_all)
    _FROZEN[model] = frozenset(id(parameter) for parameter in model.parameters() if not parameter.requires_grad)
    _HANDLES[:] = [other for other in _HANDLES if other.model is not model] + [handle]
    return handle


def _place_again(model: nn.Module, step: Step, differs: bool) -> None:
    """Have a model placed for all that its first step has called, where that ``differs`` from what it was placed for,
    or was not known.

    What was read in the step by none of its modules, such as a head by a loss in chunks, then stays on the device where
    that fits. Where no plan for all of it does, the first one stays.
    """
    handle = handle_of(model)
    if handle is None or not (differs or step.reads_rest):
        return
    read = handle.read_directly() if step.reads_rest else ()
    pins = {**dict.fromkeys(read, "device"), **(settings().options.get("pins") or {})}
    taken_back(handle)
    plan = handle.plan
    for more in ({"pins": pins}, {}) if read else ({},):
        try:
            plan = _planned(model, step, more)
            break
        except DoesNotFitError as error:
            if not more:
                say(f"a step calls more of the model than was planned for, and {first_line(error)}: it goes on so")
        except Exception as error:  # as of the first plan: the script is to run all the same
            say(f"the model is not planned for anew ({type(error).__name__}: {first_line(error)})")
            break
    let_go(_attached(model, plan))
    if plan is not handle.plan:
        say("planned anew for all that a step calls")
        for line in begin_lines(plan):
            say(line)


_UNPLACED = Unplaced()


def is_split(model: nn.Module) -> bool:
    """Whether FSDP or tensor parallelism has split a model's weights over processes."""
    return any(type(parameter).__name__ in ("DTensor", "FlatParameter") for parameter in model.parameters())


def nothing_to_do(model: nn.Module) -> str | None:
    frozen = [not parameter.requires_grad for parameter in model.parameters()]
    if not any(frozen):
        return "nothing in the model is frozen, so there is nothing to stream"
    if not all(isinstance(parameter, nn.Parameter) for parameter in model.parameters()):
        return "it is called with other tensors in the place of its parameters (torch.func.functional_call)"
    if is_split(model):
        return "FSDP or tensor parallelism splits its weights over processes"
    if (unknown := unknown_ranks()) is not None:
        return unknown
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "accelerate offloads the model already (device_map)"
    return "unsloth offloads by itself" if "unsloth" in sys.modules else None


def served(model: nn.Module, planned: Callable[[], Plan], attach: Callable[[Plan], Handle]) -> str | None:
    """Put a model under a plan; return why it had better stay as it is, if so. Raises DoesNotFitError, TooSlowError."""
    saw_decision()
    file = settings().plan
    try:
        try:
            with progress("memplan: planning"):
                plan = _loaded(file) if file else _with_room(planned)
        except MemplanError:
            raise
        except Exception as error:  # the trace runs the script's own code, and the script is to run all the same
            if world() is not None:  # the other ranks know no more than that this one has failed
                raise
            return f"the model cannot be planned for ({type(error).__name__}: {error})"
        if all(residence.begins == "always" for residence in plan.residences):
            return "the whole model fits"
        with progress("memplan: placing blocks"):
            handle = attach(plan)
        let_go(handle)
    except (DoesNotFitError, TooSlowError):
        raise
    except MemplanError as error:
        if isinstance(error, RankError) and not error.is_expected:  # that rank ends
            raise
        return str(error)
    for line in begin_lines(plan):
        say(line)
    return None


def _loaded(file: str) -> Plan:
    """Return the plan of a file, which every rank must be able to read."""
    with stage(session("load a plan"), "reading the plan"):
        return Plan.load(file)


def _with_room(planned: Callable[[], Plan]) -> Plan:
    """Return a plan; where it does not fit, in the room of the models whose training is over."""
    try:
        return planned()
    except DoesNotFitError:
        finished = [(handle, by()) for model, by in FINISHED.items() if (handle := handle_of(model)) is not None]
        if not finished:
            raise
    for handle, trainer in finished:
        give_back(handle, "another model is trained, and this one no more")
        serve_model(handle.model)  # placed anew should it be used again
        if trainer is not None:
            trainer.__dict__.pop("_memplan_seen", None)
    return planned()


def say_aside(why: str) -> None:
    saw_decision()
    say(f"inactive: {why}")


def _report_all() -> None:
    report(*_DROPPED, *((handle.plan, handle.record) for handle in _HANDLES))
    for model in SCOPE.loaded:
        if waits_itself(model) and is_trained_in_part(model):
            say(f"{name_of(model)} was not placed: it is trained in part, and was not called with gradients")


def report(*measured: tuple[Plan, RunRecord]) -> None:
    """Tell what was measured, at the end, of one model after the other."""
    if not is_first():
        return
    file = settings().report
    text = io.StringIO()
    for plan, record in measured:
        api.report(plan, record, file=text)
    if file is not None:
        try:
            write(file, text.getvalue().encode())
        except (MemplanError, OSError) as error:  # the training is done: its script goes on
            say(str(error))
            file = None
    for plan, record in measured:
        for line in end_lines(plan, record, file):
            say(line)
    _write_trace(settings().trace, measured)


def _write_trace(file: str | None, measured: Sequence[tuple[Plan, RunRecord]]) -> None:
    """Write the last whole pass of the model that was trained last, beside the planned one."""
    traced = [(plan, record) for plan, record in measured if record.spans]
    if file is None:
        return
    if not traced:
        say(f"no trace in {file}: no whole pass was trained under a plan")
        return
    try:
        write_trace(Path(file), *traced[-1])
    except (MemplanError, OSError) as error:  # as for the report
        say(str(error))
