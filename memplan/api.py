"""The whole way on one screen: model + batch -> LayerGraph -> CostTable -> Plan -> run -> report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from memplan.program.record import RunRecord
from memplan.program.schema import Plan

if TYPE_CHECKING:
    from torch import nn

    from memplan.hardware import HardwareProfile
    from memplan.program.answers import Fit, Point
    from memplan.program.memory import Moment
    from memplan.run.handle import Handle
    from memplan.show.html.view import Machine


def plan(
    model: Any,
    batch: Any,
    *,
    vram: int | str = "auto",
    ram: int | str | None = None,
    disk: int | str | None = None,
    page_lock: int | str | None = None,
    adapter: Any = None,
    dtype: Any = None,
    attention: str | None = None,
    quantization: Any = None,
    qlora: bool = False,
    kbit: bool | None = None,
    gradient_checkpointing: bool | None = None,
    autocast: str | None = None,
    accumulation: int = 1,
    steps: int | None = None,
    examples: int | None = None,
    epochs: int | None = None,
    optimizer: str | None = None,
    hardware: str | Path | HardwareProfile = "auto",
    pins: Mapping[str, str] | None = None,
    activations: str | Mapping[str, str] | None = None,
    loss: Callable[[Any], Any] | None = None,
    checkpoint: str | Path | None = None,
    measure: bool = False,
    max_step_s: float | None = None,
    gains: bool = True,
    elastic: bool | None = None,
    optimizer_state: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """Say where each frozen block lives and when it moves, before any weight is loaded.

    ``model``: an ``nn.Module`` on any device (``meta`` included), a transformers configuration, a directory with
    ``config.json`` (of transformers or diffusers), or a name: of ``memplan/models.json``, or on the hub.
    ``batch``: a mapping of tensors (one micro-batch), or a shape: (batch, sequence), or (batch,) for images.
    ``vram``, ``ram``, ``disk``: bytes, or text such as ``"6GiB"``. ``vram="auto"``: what is free less a reserve;
    ``ram=None``: what is available less a reserve; ``disk=None``: no disk beyond the checkpoint's own files.
    ``page_lock``: of ``ram`` what may be page-locked for a CUDA device, the rest is read at the rate of pageable RAM; None:
    the profile's limit, where page-locking was seen to be refused, and else all.
    ``adapter``: a PEFT configuration or ``{"rank": 16, "targets": "all-linear"}``, where the model has none yet.
    ``dtype``, ``attention``, ``quantization``: for a model built here from its configuration. ``quantization``: ``"nf4"``,
    ``"nf4-nested"``, ``"fp4"``, ``"int8"`` and others (:data:`memplan.quantization.NAMES`), or transformers' configuration
    of it; None: as the model's configuration says. ``kbit``: prepared by PEFT's ``prepare_model_for_kbit_training`` (what is
    not quantized in float32, and gradient checkpointing). ``gradient_checkpointing``: turned on as the model is built; None:
    as ``kbit`` does, else not, and memplan chooses what is recomputed. ``qlora``: QLoRA as PEFT documents it, each part
    unless it is given otherwise: ``quantization="nf4-nested"`` (or the configuration's own), ``kbit=True``,
    ``autocast="bf16"``, ``optimizer="paged_adamw_8bit"``. ``autocast``: ``"bf16"`` or ``"fp16"``, where
    the forward will run under ``torch.autocast``, which saves casts of a float32 base for backward; None: as the autocast
    that this is called in, if any. ``accumulation``: passes of a step.
    ``steps``: of the whole run, for its time; or ``examples`` of an epoch and ``epochs`` (default: one), where the batch is a
    shape: each epoch then ends with a step, however few are left for it. ``optimizer``: as transformers' ``optim``, or
    ``"adamw"`` (the default), ``"sgd"``, ``"momentum"`` and others.
    ``hardware``: ``"auto"`` (measured once, then cached), a shipped profile's name, or a profile's file.
    ``pins``: tier by block name. ``activations``: ``"keep"``, ``"recompute"`` or ``"offload"`` (to RAM, until backward)
    for every layer, or by layer name; None: kept or recomputed, as is fastest; ``"any"``: one of the three, as is fastest
    on a device with memory of its own (a look more at the model). ``loss``: from the model's output to a scalar, where the output holds none.
    ``checkpoint``: folder of safetensors that blocks may be read from (default: where the model says it came from).
    ``measure``: time each access on this machine, with one block's memory, in place of estimating it from rates;
    ``max_step_s``: the longest step that will do, in seconds. ``gains``: look at what one more GiB (of vram, of
    RAM, a second of the link) or a loss in chunks would save, for the report. ``elastic``: whether weights may have more
    room where activations leave it, in bytes that come and go; None: on the CPU alone, since no GPU has proven it.
    ``optimizer_state``: ``"device"``, or ``"host"`` for RAM between steps, from where it is brought for each step of the
    optimizer and sent back; None: as a step is shorter (on the CPU on the device).
    ``progress`` is called with a short text before each part.

    Raises DoesNotFitError (with the least vram that would), TooSlowError, InputError and its children. The model is
    unchanged.
    """
    from memplan.case import case_of

    if max_step_s is not None:
        from memplan.questions.frontier import check_speed, require_speed

        check_speed(max_step_s)
    case = case_of(
        model,
        batch,
        vram=vram,
        ram=ram,
        disk=disk,
        page_lock=page_lock,
        adapter=adapter,
        dtype=dtype,
        attention=attention,
        quantization=quantization,
        qlora=qlora,
        kbit=kbit,
        gradient_checkpointing=gradient_checkpointing,
        autocast=autocast,
        accumulation=accumulation,
        steps=steps,
        examples=examples,
        epochs=epochs,
        optimizer=optimizer,
        hardware=hardware,
        pins=pins,
        activations=activations,
        loss=loss,
        checkpoint=checkpoint,
        measure=measure,
        elastic=elastic,
        optimizer_state=optimizer_state,
        progress=progress,
    )
    made = case.place()
    if max_step_s is not None:
        require_speed(case, made, max_step_s)
    if gains:
        from memplan.questions.gains import with_gains

        made = with_gains(made)
    return made


def frontier(model: Any, batch: Any, *, points: int = 17, **options: Any) -> tuple[Point, ...]:
    """Return device memory against step time: budgets of vram, each with a shorter step than every smaller one.

    ``points`` budgets are tried, from the least that works to what holds everything; ``options`` are those of :func:`plan`, but for
    ``max_step_s``.
    Raises InputError, and DoesNotFitError where no vram would do.
    """
    from memplan.case import case_of
    from memplan.questions import frontier as questions

    return questions.frontier(case_of(model, batch, **options), points, options.get("progress"))


def fit(
    model: Any,
    batch: tuple[int, ...],
    *,
    rank: int = 16,
    targets: str | Sequence[str] = "all-linear",
    slowdown: float = 0.05,
    **options: Any,
) -> Fit:
    """Return the most that fits, each alone and the rest as asked: micro-batch, sequence, LoRA rank, quantization; and the
    least vram, with and without a bound on the step (``slowdown``: a share of the step with everything on the device).

    ``batch``: a shape. ``options``: those of :func:`plan`, but for ``adapter`` and ``max_step_s``. Raises InputError.
    """
    from memplan.questions.fit import fit

    return fit(model, batch, rank=rank, targets=targets, slowdown=slowdown, **options)


def memory_timeline(plan: Plan) -> tuple[Moment, ...]:
    """Return the bytes of each tier by kind, at the peak of each access: :mod:`memplan.program.memory` says what kinds."""
    from memplan.program.memory import timeline

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
    """A context in which all weights are readable; see :func:`memplan.run.handle.materialise`."""
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
    """Print the plan, and what was measured beside it where a record is given, to ``file`` (default: standard output).

    ``html``: write one page to this file instead, with ``points`` of :func:`frontier` on it. In a notebook, where no file is
    given, the page is shown.

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
    from memplan import hardware
    from memplan.show.html.view import Machine

    table = plan.table
    rates = (table.host_to_device_bytes_per_s, table.device_to_host_bytes_per_s, table.disk_bytes_per_s)
    profile = hardware.behind(plan.hardware, rates)
    if profile is None:
        return None
    return Machine(figures=hardware.listed(profile), device_bytes=int(profile.device_bytes.value))


def _in_notebook() -> bool:
    """Whether this runs in a kernel that shows HTML."""
    if "IPython" not in sys.modules:
        return False
    from rich.console import Console

    return Console().is_jupyter
