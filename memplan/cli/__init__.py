"""The command line. Exit codes: 0 fits or done, 1 does not fit, 2 bad input, 130 interrupted.

What a command needs is imported inside it, so that ``memplan report`` starts without torch.
"""

from __future__ import annotations

from memplan.cli import machine, plan, run  # each adds its commands
from memplan.cli.entry import group, main

__all__ = ["group", "machine", "main", "plan", "run"]
