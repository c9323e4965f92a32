"""The contract between the solver and the runtime: a Plan, how it is written, replayed and checked.

Read ``schema`` first, ``support`` (what of it this version runs), then ``timeline`` (when each access and each load
of it takes place; ``duplex`` where a link is busy both ways), ``memory_timeline`` and ``page_lock`` (what lies
where), ``check`` (the judge of plans, who shares no code with solvers), ``record`` (what a run did), ``results``
(what plans amount to), ``whole`` (what all weights on the device would take), ``arrangements`` (what would help ranks
that wait), ``codec`` and ``reading`` (files).
"""

from __future__ import annotations

from memplan.program.check.judge import require
from memplan.program.schema import JUDGES

JUDGES.append(require)
