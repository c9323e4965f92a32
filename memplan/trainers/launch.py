"""What ``memplan run`` was asked for, handed on to every Python that it starts, and telling the user of it.

Nothing but the standard library is needed here.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from memplan.ranks.world import is_first

VARIABLE = "MEMPLAN_RUN"
PROCESS = "MEMPLAN_RUN_PROCESS"
"""Names the process that became the command."""
STARTUP = Path(__file__).with_name("startup")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What ``memplan run`` was asked for. ``options``: those of :class:`memplan.PlanOptions` that were given, which go
    before what a script's trainer says; ``plan``, ``report``, ``trace``: files; ``log``, ``lines``: as in
    :func:`memplan.wrap`.
    """

    options: dict[str, Any] = field(default_factory=dict)
    plan: str | None = None
    report: str | None = None
    trace: str | None = None
    log: bool = False
    lines: bool = False


def environment(settings: Settings, given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment in which every Python that is started does as the settings say."""
    path = given.get("PYTHONPATH")
    return {
        **given,
        VARIABLE: json.dumps(asdict(settings)),
        PROCESS: str(os.getpid()),
        "PYTHONPATH": f"{STARTUP}{os.pathsep}{path}" if path else str(STARTUP),
    }


def settings() -> Settings:
    """Return what the environment says."""
    return Settings(**json.loads(os.environ[VARIABLE]))


def say(text: str) -> None:
    """Tell the user, apart from what the script itself prints; of several ranks the first does."""
    if is_first():
        print(f"memplan: {text}", file=sys.stderr, flush=True)  # noqa: T201


def one_by_one(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options without groups of micro-batches, where whoever trains runs them one by one; say so where groups
    were asked for.
    """
    if options.get("group") not in (None, 1) and not Seen.group:
        Seen.group = True
        say(
            "group has no effect: this loop runs its micro-batches one by one, so each loads weights for itself. "
            "Have handle.accumulate(run, batches) run those of a step (docs/howto/loop.md), or use a Trainer"
        )
    return {**options, "group": 1}


def saw_model() -> None:
    """Note that a model was loaded."""
    Seen.model = True


def saw_training() -> None:
    """Note that a model was trained, or was to be."""
    Seen.training = True


def saw_decision() -> None:
    """Note that a model was placed, or was said not to be."""
    Seen.training = Seen.served = True


class Seen:
    """What this process was seen to do."""

    model = False
    training = False
    served = False
    group = False
    error = False
