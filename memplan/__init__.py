"""memplan plans where the frozen blocks of a model live while an adapter is trained, and streams them.

    plan = memplan.plan(config, batch, vram="6GiB")     # before any weight is loaded
    with memplan.attach(model, plan):                   # then train as ever
        ...
    memplan.report(plan)

Only what ``__all__`` names is public. Importing this loads neither torch nor networkx: names come when asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from memplan.errors import (
    CheckpointError,
    DoesNotFitError,
    HardwareError,
    InputError,
    MemplanError,
    ModelError,
    MovedWeightsError,
    PlanCheckError,
    PlanError,
    PlanFormatError,
    PlanMismatchError,
    RunError,
    SizeError,
    StrayReadError,
    TooSlowError,
    TransferError,
)

if TYPE_CHECKING:
    from memplan.api import attach, fit, frontier, materialise, memory_timeline, plan, report
    from memplan.model.calls import Call
    from memplan.plan_options import PlanOptions
    from memplan.program.record import RunRecord
    from memplan.program.schema import Plan
    from memplan.run.handle import Handle, handle_of
    from memplan.trainers.hf_trainer import wrap
    from memplan.trainers.loading.load import load
    from memplan.trainers.placing import placing

__version__ = "0.1.0"

__all__ = [
    "Call",
    "CheckpointError",
    "DoesNotFitError",
    "Handle",
    "HardwareError",
    "InputError",
    "MemplanError",
    "ModelError",
    "MovedWeightsError",
    "Plan",
    "PlanCheckError",
    "PlanError",
    "PlanFormatError",
    "PlanMismatchError",
    "PlanOptions",
    "RunError",
    "RunRecord",
    "SizeError",
    "StrayReadError",
    "TooSlowError",
    "TransferError",
    "__version__",
    "attach",
    "fit",
    "frontier",
    "handle_of",
    "load",
    "materialise",
    "memory_timeline",
    "placing",
    "plan",
    "report",
    "wrap",
]

_HOMES = {
    "Call": "memplan.model.calls",
    "Handle": "memplan.run.handle",
    "Plan": "memplan.program.schema",
    "PlanOptions": "memplan.plan_options",
    "RunRecord": "memplan.program.record",
    "attach": "memplan.api",
    "fit": "memplan.api",
    "frontier": "memplan.api",
    "handle_of": "memplan.run.handle",
    "load": "memplan.trainers.loading.load",
    "materialise": "memplan.api",
    "memory_timeline": "memplan.api",
    "placing": "memplan.trainers.placing",
    "plan": "memplan.api",
    "report": "memplan.api",
    "wrap": "memplan.trainers.hf_trainer",
}

# Not for the type checker: it would take any misspelt name for an object.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
