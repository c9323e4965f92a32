"""Putting a plan to work on a model, and taking it away again. All or nothing, in both directions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from memplan.errors import ModelError, PlanMismatchError
from memplan.hooks.compiled import forget_compiled
from memplan.model.weights import mark_adapters
from memplan.program.check.judge import require
from memplan.program.page_lock import is_state_locked
from memplan.program.schema import Plan
from memplan.program.support import require_supported
from memplan.run.handle import Handle, handle_of
from memplan.run.memory.home import Checkpoint
from memplan.run.memory.prefault import touch_ahead
from memplan.run.memory.storage_aliases import Watched, refuse_gaps, refuse_shared
from memplan.run.modules.install import install
from memplan.run.modules.match_model import match_weights, stored_tensors, trigger_modules
from memplan.run.modules.optimizer_state import OptimizerState
from memplan.run.runtime import Files, Runtime, resettle, settle
from memplan.run.transfer.interrupts import Undo, defer_sigint


def attach(
    model: nn.Module,
    plan: Plan,
    *,
    checkpoint: str | Path | Checkpoint | None = None,
    checked: bool = False,
    traced: bool = False,
    cache: str | Path | None = None,
    verify: bool = False,
    progress: Callable[[int], None] | None = None,
    replan: Callable[[Plan, int], Plan] | None = None,
) -> Handle:
    """Put every frozen block of ``model`` in its home and stream it as ``plan`` says.

    ``checkpoint``: folder of safetensors that blocks homed on disk are read from where it holds the very bytes of the
    model (default: where the model says it came from), or its tensors by name; else they are packed into files under
    ``cache``, once, which needs ``disk`` in the plan's budgets. ``verify``: compare each packed file's checksum when it
    is first read (a checkpoint's own files have none: of those size and date are watched, always). ``progress`` is told
    the bytes of each block that has come home or is the one on its way. ``checked``: poison each slot before it is
    loaded, check every saved weight at its use in backward, and the order of every load and read by vector clocks;
    slower, for tests and new kinds of models. ``traced``: note when each access and load of a pass takes place, for the
    record's ``spans``, and name accesses in torch's profiler. ``replan``: gives the same plan for less vram, in bytes
    (see ``Handle.micro_batch``).

    Raises PlanCheckError, PlanMismatchError, ModelError, CheckpointError; the model then is as it was.
    """
    require(plan)
    device = torch.device(plan.table.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PlanMismatchError(
            f"the plan was made for the CUDA device of {plan.hardware!r}, and torch sees none here: "
            "make a plan with hardware='auto'"
        )
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    return attach_on(
        model,
        plan,
        device,
        checkpoint=checkpoint,
        checked=checked,
        traced=traced,
        cache=cache,
        verify=verify,
        progress=progress,
        replan=replan,
    )


def attach_on(
    model: nn.Module,
    plan: Plan,
    device: torch.device,
    *,
    checkpoint: str | Path | Checkpoint | None = None,
    checked: bool = False,
    traced: bool = False,
    cache: str | Path | None = None,
    verify: bool = False,
    progress: Callable[[int], None] | None = None,
    replan: Callable[[Plan, int], Plan] | None = None,
) -> Handle:
    """As :func:`attach`, on ``device``: a plan that was made for a GPU runs on the CPU too, where nothing is pinned."""
    require_supported(plan)
    if handle_of(model) is not None:
        raise ModelError("the model is under a plan already: detach() that one first")
    mark_adapters(model)
    weights = match_weights(model, plan)
    triggers = trigger_modules(model, plan)
    refuse_gaps(weights)
    refuse_shared(model, weights)
    watched = Watched(weights)
    files = Files(stored=stored_tensors(model, checkpoint), cache=_cache(cache), verify=verify)
    with Undo() as modes, Undo() as undo:
        # A Ctrl-C on the way in or out of a no_grad leaves it on.
        modes.callback(torch.set_grad_enabled, torch.is_grad_enabled())
        parts = Runtime(plan, device, weights, poisoned=checked)
        undo.callback(parts.reader.close)
        with Undo() as ahead:
            touch_ahead(parts.to_be_filled(), ahead)
            settle(model, parts, files, undo, progress)
        handle = Handle(model, parts)
        if plan.optimizer_state == "host":
            is_locked = is_state_locked(plan.table.state_on_host_bytes, plan.budgets.page_lock_bytes)
            with defer_sigint():
                parts.optimizer_state = OptimizerState(model, device, is_pageable=not is_locked)
                undo.callback(parts.optimizer_state.close)

        def change(other: Plan) -> None:
            """Have the same blocks run under another plan. On failure the model is detached."""
            try:
                with defer_sigint():
                    parts.installed.close()
                    resettle(parts, other, files)
                    install(model, parts, handle, triggers, checked=checked, traced=traced)
            except BaseException:
                handle.detach()
                raise

        with defer_sigint():
            undo.callback(forget_compiled)
            forget_compiled()
            undo.callback(lambda: parts.installed.close())
            install(model, parts, handle, triggers, checked=checked, traced=traced)
            handle.change, handle.replan = change, replan
            handle.undo.enter_context(undo.pop_all())
    watched.tell(model)
    return handle


def _cache(cache: str | Path | None) -> Path:
    if cache is not None:
        return Path(cache)
    from memplan.hardware.machine import cache_folder

    return cache_folder()
