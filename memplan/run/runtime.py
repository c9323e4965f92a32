"""What serves a model under a plan."""

from __future__ import annotations

from dataclasses import dataclass

from memplan.run.access.direct_access import DirectAccess
from memplan.run.lanes.accumulate import Accumulation
from memplan.run.schedule.conductor import Conductor
from memplan.run.tiers import Tiers
from memplan.run.transfer.interrupts import Undo
from memplan.run.verify.saved_tensor_check import CheckedReads
from memplan.run.verify.spans import Spans
from memplan.run.verify.unplanned_copies import Copies


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Runtime:
    """Made whole by :func:`memplan.run.modules.install.install`. Where the plan changes another one takes its place,
    over the same tiers.
    """

    tiers: Tiers
    conductor: Conductor
    direct: DirectAccess
    checked: CheckedReads | None
    """In checked mode alone."""
    copies: Copies | None
    """Outside of it alone."""
    spans: Spans | None
    """In traced mode alone."""
    accumulation: Accumulation | None
    """Where the plan has groups of micro-batches alone."""
    undo: Undo
    """What unhooks the model and ends the transfers."""
