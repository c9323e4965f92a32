"""The whole way on one screen: model + batch -> LayerGraph -> CostTable -> Plan -> run -> report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, Unpack

from msgspec.structs import replace

from memplan.plan_options import PlanOptions
from memplan.program.record import RunRecord
from memplan.program.schema import Plan
from memplan.request import Request, refuse

if TYPE_CHECKING:
    from torch import nn

    from memplan.program.memory_timeline import Moment
    from memplan.program.results import Fit, Point
    from memplan.run.handle import Handle
    from memplan.show.html.view import Machine


def plan(model: Any, batch: Any, **options: Unpack[PlanOptions]) -> Plan:
    """Say where each frozen block lives and when it moves, before any weight is loaded.

    ``model``: an ``nn.Module`` on any device (``meta`` included), a transformers configuration, a directory with
    ``config.json`` (of transformers or diffusers), or a name: of ``memplan/model/models.json``, or on the hub.
    ``batch``: a mapping of tensors (one micro-batch, given as keywords), a tuple of tensors (as positions),
    ``memplan.Call(ids, attention_mask=mask)`` (as both), or a shape: (batch, sequence), or (batch,) for images.
    ``options``: budgets and the machine (``vram``, ``margin``, ``ram``, ``disk``, ``page_lock``, ``hardware``); how a
    model that is given by its configuration is built (``adapter``, ``dtype``, ``attention``, ``quantization``,
    ``qlora``, ``kbit``, ``gradient_checkpointing``); the training (``autocast``, ``accumulation``, ``group``,
    ``steps``, or ``examples`` and ``epochs``, ``optimizer``, ``loss``, ``trained_by``); its ranks (``gpus``, ``nodes``,
    ``network``); the placement (``pins``, ``activations``, ``elastic``, ``blocks``, ``optimizer_state``,
    ``checkpoint``); what is looked at (``measure``, ``max_step_s``, ``gains``, ``progress``).
    :class:`memplan.PlanOptions` says what each takes and is when it is left out, and so does
    ``docs/reference/options.md``.

    Raises DoesNotFitError (with the least vram that would), TooSlowError, InputError and its children. The model is
    unchanged.
    """
    from memplan.case import case_of

    request = Request.of(model, batch, options)
    case = case_of(request)
    made = case.place()
    if request.choices.max_step_s is not None:
        from memplan.queries.frontier import require_speed

        require_speed(case, made, request.choices.max_step_s)
    if request.choices.gains:
        from memplan.queries.gains import with_gains

        # Of the case: a plan's own blocks may be split, and its optimizer's state has its place.
        made = replace(with_gains(made), least_vram_bytes=case.least_vram_bytes())
    return made


def frontier(model: Any, batch: Any, *, points: int = 17, **options: Unpack[PlanOptions]) -> tuple[Point, ...]:
    """Return device memory against step time: budgets of vram, each with a shorter step than every smaller one.

    ``model``: as for :func:`plan`.
    ``batch``: as for :func:`plan`.
    ``points``: how many budgets are tried, from the minimum to all weights and activations on the GPU.
    ``options``: those of :func:`plan`, but for ``max_step_s`` and ``gains``.

    Raises InputError, and DoesNotFitError where no vram would do.
    """
    from memplan.case import case_of
    from memplan.queries import frontier as questions

    refuse(options, ("max_step_s", "gains"), "frontier", "which shows a step for each vram")
    return questions.frontier(case_of(Request.of(model, batch, options)), points, options.get("progress"))


def fit(
    model: Any,
    batch: tuple[int, ...],
    *,
    rank: int = 16,
    targets: str | Sequence[str] = "all-linear",
    slowdown: float = 0.05,
    quantizations: bool = True,
    **options: Unpack[PlanOptions],
) -> Fit:
    """Return the most that fits, each alone and the rest as asked: micro-batch, sequence, LoRA rank, quantization; and
    the least vram, with and without a bound on the step.

    ``model``: its configuration or name, as for :func:`plan`.
    ``batch``: a shape.
    ``rank``: of the LoRA.
    ``targets``: modules that get one, by the ends of their names.
    ``slowdown``: accepted for the least vram, as a share of the step with all weights on the device.
    ``quantizations``: whether those that a model given by name may have are looked at, which takes longest.
    ``options``: those of :func:`plan`, but for ``adapter``, ``max_step_s`` and ``gains``.

    Raises InputError.
    """
    from memplan.queries.fit import fit

    return fit(model, batch, rank=rank, targets=targets, slowdown=slowdown, quantizations=quantizations, **options)


def memory_timeline(plan: Plan) -> tuple[Moment, ...]:
    """Return the bytes of each tier by kind, at the peak of each access: :mod:`memplan.program.memory_timeline` says
    what kinds.

    ``plan``: any plan.
    """
    from memplan.program.memory_timeline import timeline

    return timeline(plan)


def attach(model: nn.Module, plan: Plan, **options: Any) -> Handle:
    """Put every block of ``model`` in its home and stream it as ``plan`` says: :func:`memplan.run.attach.attach`."""
    from memplan.run.attach import attach

    options.setdefault("replan", smaller)
    return attach(model, plan, **options)


def smaller(plan: Plan, vram_bytes: int) -> Plan:
    """Return a plan of the same model for another budget of vram, in bytes. Raises DoesNotFitError."""
    from memplan.case import again

    return again(plan, vram_bytes)


def materialise(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """A context in which all weights of a model are readable: for looking at them, comparing, hashing.

    Takes no memory: weights are read where they are, in RAM or mapped from disk. Raises RunError where the model is
    called inside.

    ``model``: one under a plan, or any other, which is left alone.
    """
    from memplan.run.handle import materialise

    return materialise(model)


def report(
    plan: Plan,
    record: RunRecord | None = None,
    file: TextIO | None = None,
    *,
    html: str | Path | None = None,
    points: Sequence[Point] = (),
) -> None:
    """Print the plan, and what was measured beside it where a record is given. In a notebook a page is shown.

    ``plan``: what was predicted.
    ``record``: what was measured in a run under it.
    ``file``: to print to, in place of standard output.
    ``html``: write one page to this file instead, which needs no network and no script.
    ``points``: those of :func:`frontier`, to draw on the page.

    Raises PlanMismatchError where the record is of another model, InputError where the page cannot be written.
    """
    if html is not None:
        from memplan.show.html import render

        render.write(html, plan, record, points, _machine(plan))
        return
    if file is None and _in_notebook():
        from IPython.display import display

        from memplan.show import terminal
        from memplan.show.html import render

        page = render.text(plan, record, points, _machine(plan))
        display(render.Frame(page=page, plain=terminal.text(plan, record)))
        return
    from memplan.show.terminal import write

    write(plan, record, file)


def _machine(plan: Plan) -> Machine | None:
    """Return the profile that a plan was timed with, where it is still at hand."""
    from memplan.hardware.machine import profile_of_plan
    from memplan.hardware.profile import as_rows
    from memplan.show.html.view import Machine

    table = plan.table
    rates = (table.host_to_device_bytes_per_s, table.device_to_host_bytes_per_s, table.disk_bytes_per_s)
    profile = profile_of_plan(plan.hardware, rates)
    if profile is None:
        return None
    return Machine(figures=as_rows(profile), device_bytes=int(profile.device_bytes.value))


def _in_notebook() -> bool:
    """Whether this runs in a kernel that shows HTML."""
    if "IPython" not in sys.modules:
        return False
    from rich.console import Console

    return Console().is_jupyter
